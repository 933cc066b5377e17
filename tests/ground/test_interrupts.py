"""Ctrl-C and SIGTERM, while Python handles signals and while it does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ip2p_jax import interrupts

# Sends itself a signal after two seconds, while the main thread runs no Python code.
UNHEARD = """
import hashlib, os, signal, sys, threading
from ip2p_jax.cli.console import run
def command():
  threading.Timer(2, os.kill, [os.getpid(), signal.{name}]).start()
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
run(command, 'ip2p')
"""


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_signal_ends_a_command_while_python_cannot_handle_it(name):
  code = UNHEARD.format(name=name)
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (130, 'ip2p: stopped\n')


def test_a_signal_within_a_collection_is_not_dropped():
  def _xla_gc_callback():  # as in jax; Python drops exceptions in it
    signal.raise_signal(signal.SIGINT)
    return 'undisturbed'

  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  ended = []
  with pytest.raises(KeyboardInterrupt), interrupts.interruptible(ended.append):
    assert _xla_gc_callback() == 'undisturbed'
    time.sleep(30)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  signal.signal(signal.SIGINT, before)
  assert not ended


def test_signals_that_python_handles_do_not_end_the_process():
  heard, ended = [], []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
  with interrupts.interruptible(ended.append):
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.01)
    time.sleep(1.5 * interrupts.UNHEARD)
  signal.signal(signal.SIGTERM, before)
  assert heard and not ended


def test_a_child_does_not_hear_a_signal_meant_for_its_parent():
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
  code = 'import time; print("here", flush=True); time.sleep(0.3); print("ended")'
  with interrupts.unheard_by_children(signal.SIGINT):
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
  assert child.stdout.readline() == 'here\n'
  child.send_signal(signal.SIGINT)
  assert child.communicate(timeout=30) == ('ended\n', None) and child.returncode == 0
  assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_an_import_is_not_interrupted(tmp_path, monkeypatch):
  (tmp_path / 'slow_import.py').write_text(
    'import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.1)\ndone = True\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  with pytest.raises(KeyboardInterrupt), interrupts.interruptible(lambda number: None):
    import slow_import

    assert slow_import.done
    time.sleep(30)
  signal.signal(signal.SIGINT, before)
