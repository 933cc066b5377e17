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
