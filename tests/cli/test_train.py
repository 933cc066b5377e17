"""Flags of `train.py` that join processes; that these train together is in `test_training.py`."""

import types

import pytest

from ip2p_jax.cli import train
from ip2p_jax.config import TrainConfig

ALONE = {'coordinator': None, 'num_processes': None, 'process_id': None, 'multihost': False}


@pytest.mark.parametrize(
  ('given', 'message'),
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
def test_flags_that_do_not_tell_who_is_there_are_refused(given, message, monkeypatch, capsys):
  def alone(*_):  # as jax says it; in earnest it may only be asked before anything else
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(train.jax.distributed, 'initialize', alone)
  values = types.SimpleNamespace(workdir='W', config=TrainConfig(), **ALONE | given)
  monkeypatch.setattr(train.flags, 'FLAGS', values)
  with pytest.raises(SystemExit, match='2'):
    train.train([])
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line
