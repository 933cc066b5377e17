"""Filters XLA's alarms (advice to file a bug about a slow compilation) out of stderr.

XLA writes them as errors to file descriptor 2, and has no setting for them alone. While a program
is compiled, all output to descriptor 2 goes through a separate process (this file). It is no
thread, so that the last output of a process that XLA aborts is shown, too.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

BEGIN, END = b'slow_operation_alarm.cc', b'attach the results.'
LONGEST = 12  # lines of an alarm
SOONEST = 0.5  # seconds; no alarm comes earlier than one second
PATIENCE = 0.1  # seconds to wait for the rest of a line, before its beginning is shown
ANSWER = 5.0  # seconds to wait for output to be shown, or for a child that may still write
MARK = b'\0shown?\0\n'  # asks the process whether all before it is shown
_LOGGED = re.compile(rb'[IWEF]\d{4} ')  # the beginning of a line of XLA's log
_FRAME = re.compile(rb'\**\s*')


def quietly(program: Callable, *inputs: Any) -> Any:
  """The result of `program(*inputs)`, without alarms if it compiles first."""
  with left_out():
    return program(*inputs)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
  """Leaves out alarms until the end; does nothing in the first half second.

  It affects the whole process, as file descriptors do. Any number of threads may use it at once.
  """
  lock, stack, is_over = threading.Lock(), contextlib.ExitStack(), False

  def begin():
    with lock:
      if not is_over:
        stack.enter_context(diverted())

  timer = threading.Timer(SOONEST, begin)
  timer.daemon = True
  with contextlib.suppress(RuntimeError):  # no thread can start when Python ends
    timer.start()
  try:
    yield
  finally:
    timer.cancel()
    with lock:
      is_over = True
      stack.close()


class _Diversion:
  """Sends output to file descriptor 2 through a filter process."""

  def __init__(self, screen: TextIO):
    self.screen = screen
    # In a session of its own, so that Ctrl-C does not end it.
    self.process = subprocess.Popen(
      [sys.executable, '-I', '-S', __file__],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=screen, start_new_session=True,
    )  # fmt: skip
    os.dup2(self.process.stdin.fileno(), 2)

  def end(self) -> None:
    pipe, answer = self.process.stdin.fileno(), self.process.stdout.fileno()
    with contextlib.suppress(OSError):  # the process was killed
      os.write(pipe, MARK)
      select.select([answer], [], [], ANSWER)
    if os.path.samestat(os.fstat(pipe), os.fstat(2)):  # else other code replaced it meanwhile
      os.dup2(self.screen.fileno(), 2)
    self.process.stdin.close()
    self.process.stdout.close()
    self.screen.close()
    # A child process that was started meanwhile may still write to it.
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(timeout=ANSWER)


_lock = threading.Lock()
_users, _diversion = 0, None


@contextlib.contextmanager
def diverted() -> Iterator[TextIO]:
  """Leaves out alarms from now until the end; yields a file that bypasses the filter."""
  global _users, _diversion
  with _lock:
    if not _users:
      _diversion = _divert()
    _users += 1
    diversion = _diversion
  try:
    yield diversion.screen if diversion else sys.stderr
  finally:
    with _lock:
      _users -= 1
      if not _users and diversion:
        _flush()
        diversion.end()


def _divert() -> _Diversion | None:
  """None if it is impossible: stderr is closed, or Python is embedded in another program."""
  if not sys.executable or getattr(sys, 'frozen', False):
    return None
  _flush()
  try:
    screen = os.fdopen(os.dup(2), 'w')
  except OSError:
    return None
  try:
    return _Diversion(screen)
  except OSError:
    screen.close()
    return None


def _flush() -> None:
  with contextlib.suppress(Exception):  # `sys.stderr` may be any object
    sys.stderr.flush()


def without_alarms(lines: Iterable[bytes]) -> Iterator[bytes]:
  """The lines that do not belong to an alarm."""
  left, is_ended = 0, False  # lines that may still belong to it; whether its text has ended
  for line in lines:
    if BEGIN in line:
      left, is_ended = LONGEST, False
    elif _LOGGED.match(line) or (is_ended and not _FRAME.fullmatch(line)):
      left = 0
    if not left:
      yield line
      continue
    left, is_ended = left - 1, is_ended or END in line


def _lines(source: int, answer: int) -> Iterator[bytes]:
  """Lines as they come, and the beginning of a line whose rest is late, as of a progress bar.

  Answers each MARK when all text before it was taken and the next is asked for.
  """
  text = b''
  while True:
    if text and not select.select([source], [], [], PATIENCE)[0]:
      yield text
      text = b''
    part = os.read(source, 1 << 16)
    text += part
    while MARK in text:
      before, _, text = text.partition(MARK)
      yield from before.splitlines(keepends=True)
      with contextlib.suppress(OSError):
        os.write(answer, b'.')
    *lines, text = re.split(rb'(?<=\n)', text)
    yield from lines
    if not part:
      break
  if text:
    yield text


if __name__ == '__main__':
  for shown in without_alarms(_lines(0, 1)):
    sys.stderr.buffer.write(shown)
    sys.stderr.buffer.flush()
