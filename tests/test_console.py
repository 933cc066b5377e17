"""What is said while something takes long, and what XLA says then that nobody needs."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from ip2p_jax import console
from ip2p_jax.xla_alarms import without_alarms

# As XLA writes them.
SLOW = b"""E1128 10:00:00.000000    77 slow_operation_alarm.cc:73]
********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
********************************
E1128 10:01:00.000000    77 slow_operation_alarm.cc:140] The operation took 3m2.1s

********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
********************************
"""  # noqa: E501
FOLDING = b"""E1128 10:00:00.000000    77 slow_operation_alarm.cc:73] Constant folding an instruction is taking > 1s:

  %reduce-window.1 = f32[64]{0} reduce-window(%broadcast)

This isn't necessarily a bug; constant-folding is inherently a trade-off between compilation time and speed at runtime.

If you'd like to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
"""  # noqa: E501
ERROR = b'E1128 10:00:01.000000    77 cuda_executor.cc:1] failed to allocate 16.0G\n'


@pytest.mark.parametrize('alarm', [SLOW, FOLDING])
@pytest.mark.parametrize('other', [ERROR, b'a warning\nof two lines\n', b''])
def test_alarms_are_left_out_and_nothing_else(alarm, other):
  lines = (other + alarm + other).splitlines(keepends=True)
  assert b''.join(without_alarms(lines)) == other + other


def test_an_error_amid_an_alarm_is_kept():
  lines = [*SLOW.splitlines(keepends=True)[:2], ERROR, b'more of it\n']
  assert b''.join(without_alarms(lines)) == ERROR + b'more of it\n'


def test_a_log_file_gets_one_line_and_nothing_for_what_is_fast(capfd):
  with console.waiting('compiling', after=0.05):
    os.write(2, SLOW + ERROR)  # as C++ does
    print('of Python', file=sys.stderr)
    time.sleep(0.3)
  with console.waiting('something fast', after=10):
    pass
  with console.waiting('of another process', is_quiet=True, after=0):
    time.sleep(0.05)
  said = capfd.readouterr().err.splitlines()
  assert sorted(said) == sorted(['compiling', ERROR.decode().strip(), 'of Python'])


DIES = """
import os, sys
from ip2p_jax import console
with console.waiting('compiling', after=60):
  os.write(2, b'F1128 10:00:00.000000 7 xla.cc:1] Check failed: the last words\\n')
  os.abort()
"""


def test_the_last_words_of_a_process_that_aborts_are_shown():
  done = subprocess.run([sys.executable, '-c', DIES], capture_output=True, text=True)
  assert done.returncode < 0 and 'Check failed: the last words' in done.stderr


CLOCK = """
import sys, time
from ip2p_jax import console
with console.waiting('compiling', after=0.2):
  time.sleep(2)
print('ready', file=sys.stderr)
"""


def test_a_terminal_gets_a_clock_that_goes_away():
  ours, theirs = pty.openpty()
  with subprocess.Popen([sys.executable, '-c', CLOCK], stderr=theirs) as process:
    os.close(theirs)
    said = b''
    try:
      while part := os.read(ours, 1000):
        said += part
    except OSError:  # the terminal's end is closed
      pass
  os.close(ours)
  assert process.returncode == 0
  shown = said.split(b'\r')
  assert b'compiling: 0 s' in shown and b'compiling: 1 s' in shown
  assert said.endswith(b'\rready\r\n') and b'\r' + b' ' * 14 + b'\r' in said


# Compiles a program that is kept.
COMPILES = """
import jax
from ip2p_jax.console import cache_compilations
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
cache_compilations()
jax.jit(lambda x: x @ x + 1, inline=False)(jax.numpy.ones((8, 8))).block_until_ready()
"""


def test_a_kept_program_that_was_cut_short_is_written_anew(tmp_path):
  def said():
    done = subprocess.run(
      [sys.executable, '-c', COMPILES], capture_output=True, text=True, check=True,
      env=os.environ | {'XDG_CACHE_HOME': str(tmp_path)},
    )  # fmt: skip
    return done.stderr

  said()
  kept = {file: file.read_bytes() for file in (tmp_path / 'ip2p-jax').iterdir()}
  assert kept
  for file, content in kept.items():
    file.write_bytes(content[: len(content) // 2])
  assert 'Error reading persistent compilation cache' in said()
  assert {file.name for file in (tmp_path / 'ip2p-jax').iterdir()} == {file.name for file in kept}
  assert said() == ''


# Begins by a signal to itself, in two seconds, while no Python runs in the main thread.
UNHEARD = """
import hashlib, os, signal, sys, threading
from ip2p_jax import cli
def command():
  threading.Timer(2, os.kill, [os.getpid(), signal.{name}]).start()
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
cli.run(command, 'ip2p')
"""


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_ends_a_command_that_python_cannot_hear(name):
  code = UNHEARD.format(name=name)
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (130, 'ip2p: stopped\n')


def test_a_signal_within_a_collection_is_not_dropped():
  def _xla_gc_callback():  # as jax's; Python drops what is raised there
    signal.raise_signal(signal.SIGINT)
    return 'undisturbed'

  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  ended = []
  with pytest.raises(KeyboardInterrupt), console.interruptible(ended.append):
    assert _xla_gc_callback() == 'undisturbed'
    time.sleep(30)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  signal.signal(signal.SIGINT, before)
  assert not ended


def test_signals_that_are_heard_end_nothing():
  heard, ended = [], []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
  with console.interruptible(ended.append):
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.01)
    time.sleep(1.5 * console.UNHEARD)
  signal.signal(signal.SIGTERM, before)
  assert heard and not ended
