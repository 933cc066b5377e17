"""Flags of `train.py` that join processes. `test_training.py` tests joint training."""

import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from ip2p_jax.cli import train
from ip2p_jax.config import TrainConfig

ALONE = {'coordinator': None, 'num_processes': None, 'process_id': None, 'multihost': False}


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'coordinator': 'localhost:1'}, 'needs --num_processes=N and --process_id'),
    (
      {'coordinator': 'localhost:1', 'num_processes': 2},
      'needs --num_processes=N and --process_id',
    ),
    ({'num_processes': 2}, 'need --coordinator'),
    ({'coordinator': 'localhost:1', 'num_processes': 2, 'process_id': 2}, 'use 0 to 1'),
    ({'multihost': True}, '--multihost: the other processes were not found'),
  ],
)
def test_incomplete_flags_for_joining_are_refused(flags, message, monkeypatch, capsys):
  def alone(*_):  # the message of jax
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr('jax.distributed.initialize', alone)
  values = types.SimpleNamespace(workdir='W', config=TrainConfig(), **ALONE | flags)
  monkeypatch.setattr(train.flags, 'FLAGS', values)
  with pytest.raises(SystemExit, match='2'):
    train.train([])
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['log.validation_examples=0'], 'checkpoint is empty'),  # the last check
    (['log.validation_examples=0', 'log.validate_every=20'], 'log.validate_every is 20, which'),
  ],
)
def test_a_flag_may_switch_off_what_the_config_file_sets(flags, message, tmp_path):
  root = Path(__file__).parents[2]  # tiny.py sets log.validate_every
  words = ['--config=configs/tiny.py', f'--workdir={tmp_path}', *(f'--config.{x}' for x in flags)]
  result = subprocess.run(
    [sys.executable, 'train.py', *words], cwd=root, capture_output=True, text=True
  )
  assert result.returncode == 2 and message in result.stderr


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks at libraries in /proc')
def test_ctrl_c_while_libraries_load_is_one_line(tmp_path):
  root = Path(__file__).parents[2]
  argv = [sys.executable, 'train.py', '--config=configs/tiny.py', f'--workdir={tmp_path}']
  signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
  process = subprocess.Popen(
    argv, cwd=root, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  while 'jaxlib' not in Path(f'/proc/{process.pid}/maps').read_text():
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  assert (process.communicate(timeout=60)[1], process.returncode) == ('train.py: stopped\n', 130)
