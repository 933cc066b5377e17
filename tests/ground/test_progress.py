"""Messages while something takes long."""

import os
import pty
import subprocess
import sys
import time

from alarms import ERROR, SLOW

from ip2p_jax import progress


def test_a_log_file_gets_one_line_per_slow_job(capfd):
  with progress.waiting('compiling', after=0.05):
    os.write(2, SLOW + ERROR)  # as C++ does
    print('of Python', file=sys.stderr)
    time.sleep(0.3)
  with progress.waiting('something fast', after=10):
    pass
  with progress.waiting('of another process', is_quiet=True, after=0):
    time.sleep(0.05)
  lines = capfd.readouterr().err.splitlines()
  assert sorted(lines) == sorted(['compiling', ERROR.decode().strip(), 'of Python'])


DIES = """
import os, sys
from ip2p_jax import progress
with progress.waiting('compiling', after=60):
  os.write(2, b'F1128 10:00:00.000000 7 xla.cc:1] Check failed: the last words\\n')
  os.abort()
"""


def test_the_last_output_of_an_aborted_process_is_shown():
  done = subprocess.run([sys.executable, '-c', DIES], capture_output=True, text=True)
  assert done.returncode < 0 and 'Check failed: the last words' in done.stderr


CLOCK = """
import sys, time
from ip2p_jax import progress
with progress.waiting('compiling', after=0.2):
  time.sleep(2)
print('ready', file=sys.stderr)
"""


def test_a_terminal_gets_a_clock_that_goes_away():
  ours, theirs = pty.openpty()
  with subprocess.Popen([sys.executable, '-c', CLOCK], stderr=theirs) as process:
    os.close(theirs)
    output = b''
    try:
      while part := os.read(ours, 1000):
        output += part
    except OSError:  # the terminal's end is closed
      pass
  os.close(ours)
  assert process.returncode == 0
  shown = output.split(b'\r')
  assert b'compiling: 0 s' in shown and b'compiling: 1 s' in shown
  assert output.endswith(b'\rready\r\n') and b'\r' + b' ' * 14 + b'\r' in output
