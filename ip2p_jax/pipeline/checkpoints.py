"""The checkpoints of a run, written and read by Orbax: STEP/state and STEP/extras.

A run may be killed at any time: incomplete files are never read, and the next start deletes them.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ip2p_jax import storage
from ip2p_jax.errors import InputError

CHECKPOINTS = 'checkpoints'

Workdir = str | os.PathLike
State = dict[str, Any]


class Checkpoints:
  """The checkpoints of a running training run. Every process must make every call."""

  def __init__(self, workdir: Workdir, keep: int = 3):
    """Deletes half-written files of an interrupted run.

    The `keep` newest checkpoints stay, and the one that `save` marks as good.
    """
    _hush()
    self.folder = storage.folder(workdir) / CHECKPOINTS
    self._policy = _Policy(keep)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._policy, cleanup_tmp_directories=True
    )
    handlers = {'state': _state_handler(), 'extras': ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

  def save(
    self, step: int, state: State, extras: Mapping[str, Any], good: int | None = None
  ) -> None:
    """Begins to write a checkpoint, and returns when the state is copied from the devices.

    Then the state may be donated. An existing step is not written again.

    Args:
      state: tree of arrays.
      extras: a JSON object.
      good: step of a checkpoint that stays even if it is old.

    Raises OSError if the disk refused this checkpoint or the previous one.
    """
    if step == self.latest_step():
      return
    self._policy.good = good
    items = {'state': ocp.args.PyTreeSave(state), 'extras': ocp.args.JsonSave(dict(extras))}
    with _writing(self.folder):
      self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, target: State) -> tuple[State, dict[str, Any]] | None:
    """The state and extras of the latest complete checkpoint; None if there is none.

    Args:
      target: the state's tree, of ShapeDtypeStructs with the shardings to restore to. Any number of
        devices and processes may have written the checkpoint.

    Raises InputError if the files are damaged, or the run had another state; it names the setting
    that differs.
    """
    self.check_fits(target)
    step = self.latest_step()
    if step is None:
      return None
    as_target = ocp.checkpoint_utils.construct_restore_args(target)
    state = ocp.args.PyTreeRestore(target, restore_args=as_target)
    items = ocp.args.Composite(state=state, extras=ocp.args.JsonRestore())
    with _reading(self.folder / str(step)):
      restored = self._manager.restore(step, args=items)
    return restored.state, restored.extras

  def check_fits(self, target: State) -> None:
    """Raises the InputError of `restore` for a state of another run, without reading arrays."""
    self.wait()
    step = self.latest_step()
    if step is not None:
      folder = self.folder / str(step)
      with _reading(folder):
        saved = _state_handler().metadata(folder / 'state').tree
      _check_same(folder, saved, target)

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint that is complete or being written."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """The steps of all checkpoints that are complete or being written, ascending."""
    return sorted(self._manager.all_steps())

  def wait(self) -> None:
    """Waits until all is written; raises OSError if the disk refused it."""
    with _writing(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the threads."""
    with _writing(self.folder):
      self._manager.close()


class _Policy(ocp.checkpoint_managers.PreservationPolicy):
  """The `keep` newest checkpoints stay, and that of step `good`."""

  def __init__(self, keep: int):
    self.keep, self.good = keep, None

  def should_preserve(self, checkpoints, *, context):
    newest = sorted(checkpoint.step for checkpoint in checkpoints)[-self.keep :]
    return [checkpoint.step in (*newest, self.good) for checkpoint in checkpoints]


def saved_steps(workdir: Workdir) -> list[int]:
  """Steps of the complete checkpoints, ascending."""
  return sorted(ocp.utils.checkpoint_steps(storage.folder(workdir) / CHECKPOINTS))


def read_part(
  workdir: Workdir, part: str, step: int | None = None
) -> tuple[int, dict[str, np.ndarray]]:
  """(step, {dotted name: array}) of one part of the state, 'ema' or 'params'.

  `step` None takes the latest. Raises InputError if the checkpoint is missing or damaged.
  """
  steps = saved_steps(workdir)
  if not steps:
    raise InputError(f'{workdir}: has no checkpoint yet; let the run write one.')
  wanted = steps[-1] if step is None else step
  if wanted not in steps:
    raise InputError(f'{workdir}: has no checkpoint of step {wanted}; there are {steps}.')
  folder = storage.folder(workdir) / CHECKPOINTS / str(wanted)
  try:
    with _reading(folder):
      return wanted, _part_of(folder, part)
  except InputError:
    if step is None and saved_steps(workdir)[-1:] not in ([], [wanted]):
      return read_part(workdir, part)  # the run has replaced it by a newer one meanwhile
    raise


def _part_of(folder, part) -> dict[str, np.ndarray]:
  handler = _state_handler()
  tree = {part: handler.metadata(folder / 'state').tree[part]}
  # As numpy; otherwise Orbax needs the devices that wrote it.
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  arguments = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
  return handler.restore(folder / 'state', args=arguments)[part]


def _state_handler():
  # Orbax's default spreads the writing of an array over all devices with a copy. For this it
  # compiles a program for each slice of each shape: half a minute before the first save returns.
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler()),
    (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _check_same(folder, saved, target):
  """Raises InputError if a saved state does not fit; it names the setting that is probably why."""
  leaf_name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  saved, wanted = (
    {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (saved, target)
  )
  differing = sorted(x for x in saved.keys() | wanted.keys() if saved.get(x) != wanted.get(x))
  if not differing:
    return
  trained = [name for name in differing if name.startswith('params/')]
  only_shapes = all(name in saved and name in wanted for name in trained)
  had_adapters, has_adapters = ('.lora_' in ''.join(tree) for tree in (saved, wanted))
  if not trained:
    setting = 'optimizer'
  elif had_adapters and has_adapters and not only_shapes:
    setting = 'lora.targets'
  elif had_adapters or has_adapters:
    setting = 'lora.rank'
  else:
    setting = 'checkpoint' if only_shapes else 'optimizer.rates'
  name = (trained or differing)[0]
  was, now = (list(tree[name]) if name in tree else 'absent' for tree in (saved, wanted))
  raise InputError(f'{folder}: holds another state than this run has: {name} is {was} there and '
                   f'{now} here; set {setting} as it was, or use a new workdir.')  # fmt: skip


@contextlib.contextmanager
def _writing(folder) -> Iterator[None]:
  """Orbax raises ValueError for an error of the disk; this turns it into an OSError."""
  try:
    yield
  except ValueError as error:
    if match := re.search(r"os_error_code='(\d+)'", str(error)):
      number = int(match[1])
      raise OSError(number, os.strerror(number), str(folder)) from error
    if re.match('[A-Z_]+: ', str(error)):  # an error of a bucket, as in 'PERMISSION_DENIED: ...'
      raise OSError(errno.EIO, str(error), str(folder)) from error
    raise


@contextlib.contextmanager
def _reading(folder) -> Iterator[None]:
  _hush()
  try:
    yield
  except (InputError, MemoryError):
    raise
  except Exception as error:  # Orbax raises no special exception for damaged arrays
    raise InputError(f'{folder}: damaged or incomplete ({str(error)[:200]}); remove this folder to '
                     'go on from the checkpoint before it.') from error  # fmt: skip


@functools.cache  # once per process
def _hush() -> None:
  """Drops the tracebacks that threads of Orbax print for an error that we raise anyway."""
  is_ours = lambda record: not (record.exc_info and f'{os.sep}orbax{os.sep}' in record.pathname)
  logging.getLogger('absl').addFilter(is_ours)
  is_task = lambda record: 'exception was never retrieved' not in record.getMessage()
  logging.getLogger('asyncio').addFilter(is_task)
  print_unraisable = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      print_unraisable(unraisable)

  sys.unraisablehook = hook
