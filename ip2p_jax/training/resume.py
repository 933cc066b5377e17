"""What a resumed run shares with the run before: workdir, settings and loss."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import jax

from ip2p_jax import parameters, storage
from ip2p_jax.config import knobs
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.checkpoints import CHECKPOINTS
from ip2p_jax.pipeline.workdir import BASE, CONFIG, differences, read_config, write_config
from ip2p_jax.training import logs
from ip2p_jax.training.loop import say
from ip2p_jax.training.loss_course import Course

OURS = (
  CONFIG, BASE, CHECKPOINTS, logs.LINES, logs.EVENTS,
  logs.PREVIEWS, logs.CURVE, 'failures', 'profile',
)  # fmt: skip
# Settings that keep the loss comparable with that before a change.
SAME_LOSS = (
  'optimizer.', 'log.', 'mesh.', 'checkpoint', 'steps', 'batch_size', 'accumulation', 'remat',
  'attention', 'dtype', 'seed',
)  # fmt: skip


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[None]:
  """Locks a local workdir, and refuses a folder that is not a workdir.

  The lock is the operating system's: it ends with the process. InputError if another run has it, or
  if the folder holds a file that no run writes.
  """
  folder = storage.folder(workdir)
  if jax.process_index() or not storage.is_local(workdir):
    yield
    return
  if folder.exists() and not folder.is_dir():
    raise InputError(f'{folder}: is a file, but --workdir must be a folder; give another name.')
  folder.mkdir(parents=True, exist_ok=True)
  names = (file.name for file in folder.iterdir())
  foreign = sorted(name for name in names if name not in OURS and not name.startswith('.'))
  if foreign:
    raise InputError(f'{folder}: holds {foreign[0]}, so it is not a workdir; give a new folder.')
  busy = f'{folder}: another run is writing here; wait for it, or stop it.'
  with storage.locked(folder / '.lock', busy):
    yield


def as_begun(config: Any, fixed: Collection[str], workdir: str) -> Any:
  """The config with the starting checkpoint that the run was begun with, which is not read again.

  InputError for a new value of a setting that the saved weights depend on.
  """
  old, new = parameters.flatten(read_config(workdir) or {}), dict(knobs(config))
  for knob in fixed:
    before, now = old.get(knob, new[knob]), new[knob]
    if before != now:
      raise InputError(
        f'{knob} was {before!r} in this workdir; set it to that, or use a new workdir.'
      )
  begun = {name: old[name] for name in ('checkpoint', 'checkpoint_weights') if name in old}
  if any(getattr(config, name) != value for name, value in begun.items()):
    say(
      'checkpoint is not read again: this workdir has its own weights, and was begun with'
      f' {begun["checkpoint"]}'
    )
  return dataclasses.replace(config, **begun)


def course_before(extras: dict[str, Any], config: Any) -> Course:
  """The course of the loss before a checkpoint with these extras; empty if it was another loss.

  Reports a loss that had grown.
  """
  lines = differences(extras.get('config', {}), dataclasses.asdict(config))
  if 'course' not in extras or not all(line.startswith(SAME_LOSS) for line in lines):
    return Course()
  course = Course(**extras['course'])
  if course.is_grown:
    good = '' if course.good is None else f'; after step {course.good:,} it was normal'
    say(f'the loss had grown from {course.mean:.4g} to {course.last:.4g} at this checkpoint{good}')
  return course


def keep_config(config: Any, workdir: str, step: int) -> None:
  """Writes config.json; reports changed settings, and a warm-up longer than the run.

  InputError if the steps to profile were changed and are past.
  """
  new = dataclasses.asdict(config)
  lines = differences(read_config(workdir) or new, new)
  first, count = config.log.profile
  if count and first + count <= step + 1 and any(line.startswith('log.profile') for line in lines):
    raise InputError(
      f'log.profile is {config.log.profile}, but this run is already at step {step:,}; give later'
      ' steps, or leave it unchanged.'
    )
  for line in lines:
    say(f'changed since the last start: {line}')
  if config.optimizer.warmup_steps > config.steps:
    say(
      f'the warm-up of {config.optimizer.warmup_steps:,} steps is longer than the run: the learning'
      f' rate ends at {config.steps / config.optimizer.warmup_steps:.0%} of its setting'
    )
  write_config(workdir, new)
