"""The program of `train.py`: flags, processes, signals, and errors as one line."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from ip2p_jax.cli import console
from ip2p_jax.cli.console import complain, one_line
from ip2p_jax.config import LanguageConfig, TrainConfig
from ip2p_jax.config_check import without_idle
from ip2p_jax.config_text import check_overrides, plain_overrides
from ip2p_jax.errors import InputError
from ip2p_jax.interrupts import INTERRUPTED, interruptible

NAME = 'train.py'
JOINING = ('multihost', 'coordinator', 'num_processes', 'process_id')
KINDS = (TrainConfig, LanguageConfig)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags with absl. A wrong flag is one line."""
  with one_line(NAME, ''):
    check_overrides(argv, KINDS)
    argv = plain_overrides(argv, KINDS)
    for path in (flag.partition('=')[2] for flag in argv if flag.startswith('--config=')):
      if not Path(path).is_file():
        raise InputError(f'--config={path}: no such file; see configs/.')
    try:
      rest = flags.FLAGS(argv)
    except flags.Error as error:
      raise InputError(f'{error} (see --help)') from None
    if len(rest) > 1:
      raise InputError(f'does not know what to do with {rest[1]!r}; flags look like --NAME=VALUE.')
    return rest


def train(argv: Sequence[str]) -> None:
  """Runs or resumes the training of the flags."""
  del argv
  values = flags.FLAGS
  logging.set_verbosity(logging.ERROR)  # Orbax logs every action
  with one_line(NAME, ''):
    if not values.workdir:
      raise InputError('--workdir=FOLDER is missing: where checkpoints and metrics go.')
    if not isinstance(values.config, KINDS):
      raise InputError('--config=FILE is missing: a file whose get_config() gives a TrainConfig.')
  with one_line(NAME, 'lower the batch per device: raise --config.accumulation, or mesh.fsdp.'):
    if any(getattr(values, name) not in (None, False) for name in JOINING):
      _join(values)
    overrides = config_flags.get_override_values(values['config'])
    try:
      with interruptible(_end):
        run = _trainer(values.config)
      status = run(without_idle(values.config, overrides), values.workdir)
    except KeyboardInterrupt:
      _end(signal.SIGINT)
    sys.exit(status)


def _trainer(config):
  # Imported after joining, since nothing may touch the devices before.
  from ip2p_jax.captions.train import train_language
  from ip2p_jax.training.train import train as train_editor

  console.cache_compilations()
  return train_language if isinstance(config, LanguageConfig) else train_editor


def _end(_number):
  complain(NAME, 'stopped')
  sys.stdout.flush()
  os._exit(INTERRUPTED)  # a normal exit could fail while the device works


def _join(values) -> None:
  import jax

  has_numbers = (values.num_processes is not None, values.process_id is not None)
  if values.coordinator and not all(has_numbers):
    raise InputError('--coordinator=HOST:PORT needs --num_processes=N and --process_id=0 to N-1.')
  if not values.coordinator and any(has_numbers):
    raise InputError('--num_processes and --process_id need --coordinator=HOST:PORT.')
  if values.coordinator and not 0 <= values.process_id < values.num_processes:
    raise InputError(
      f'--process_id is {values.process_id}; use 0 to {values.num_processes - 1}, one less than'
      ' --num_processes.'
    )
  if jax.config.jax_platforms == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
  except ValueError as error:  # raised before any waiting
    raise InputError(
      f'--multihost: the other processes were not found ({error}); leave it out on one machine, or'
      ' give --coordinator, --num_processes and --process_id.'
    ) from error
