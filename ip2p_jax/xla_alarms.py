"""Copies stdin to stderr, but for XLA's advice to file a bug when it compiles for long.

A program of its own (`python xla_alarms.py`), so that the last words of a process that XLA ends are
shown, too. XLA writes the advice as an error, and has no setting for it alone.
"""

import re
import sys
from collections.abc import Iterable, Iterator

BEGIN, END = b'slow_operation_alarm.cc', b'attach the results.'
LONGEST = 12  # lines of an alarm
_LOGGED = re.compile(rb'[IWEF]\d{4} ')  # how a line of XLA's log begins
_FRAME = re.compile(rb'\**\s*')


def without_alarms(lines: Iterable[bytes]) -> Iterator[bytes]:
  """The lines that are no part of an alarm."""
  left, is_ended = 0, False  # lines that may still be the alarm's; whether its text is over
  for line in lines:
    if BEGIN in line:
      left, is_ended = LONGEST, False
    elif _LOGGED.match(line) or (is_ended and not _FRAME.fullmatch(line)):
      left = 0
    if not left:
      yield line
      continue
    left, is_ended = left - 1, is_ended or END in line


if __name__ == '__main__':
  for line in without_alarms(sys.stdin.buffer):
    sys.stderr.buffer.write(line)
    sys.stderr.buffer.flush()
