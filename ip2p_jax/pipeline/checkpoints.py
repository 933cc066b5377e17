"""The checkpoints of a run, written and read by Orbax: STEP/state and STEP/extras.

A run is killed at any time: what is not complete is never read, and cleared by the next start.
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
  """The checkpoints of a run that is going on. Every process of it must make every call."""

  def __init__(self, workdir: Workdir, keep: int = 3):
    """Clears what an interrupted run left half-written; `keep` newest checkpoints stay, and one
    that `save` is told is good.
    """
    _hush()
    self.folder = storage.folder(workdir) / CHECKPOINTS
    self._kept = _Kept(keep)
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._kept, cleanup_tmp_directories=True
    )
    handlers = {'state': _state_handler(), 'extras': ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

  def save(
    self, step: int, state: State, extras: Mapping[str, Any], good: int | None = None
  ) -> None:
    """Begins to write a checkpoint, and returns once the state is copied off the devices.

    From then on the state may be donated. A step that is there already is not written again.

    Args:
      state: tree of arrays.
      extras: a JSON object.
      good: step of a checkpoint that stays, however many newer ones there are.

    Raises OSError if the disk refused this checkpoint or the one before it.
    """
    if step == self.latest_step():
      return
    self._kept.good = good
    items = {'state': ocp.args.PyTreeSave(state), 'extras': ocp.args.JsonSave(dict(extras))}
    with _writing(self.folder):
      self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(self, target: State) -> tuple[State, dict[str, Any]] | None:
    """The state and extras of the latest complete checkpoint; None if there is none.

    Args:
      target: the state's tree, of ShapeDtypeStructs with the shardings to restore to. Any number of
        devices and processes may have written it.

    Raises InputError if the run had another state, naming the setting that differs, or if the files
    are damaged.
    """
    self.check_fits(target)
    step = self.latest_step()
    if step is None:
      return None
    as_target = ocp.checkpoint_utils.construct_restore_args(target)
    state = ocp.args.PyTreeRestore(target, restore_args=as_target)
    items = ocp.args.Composite(state=state, extras=ocp.args.JsonRestore())
    with _reading(self.folder / str(step)):
      found = self._manager.restore(step, args=items)
    return found.state, found.extras

  def check_fits(self, target: State) -> None:
    """Raises the InputError that `restore` would for a state of another run, reading no array."""
    self.wait()
    step = self.latest_step()
    if step is not None:
      folder = self.folder / str(step)
      with _reading(folder):
        saved = _state_handler().metadata(folder / 'state').tree
      _check_same(folder, saved, target)

  def latest_step(self) -> int | None:
    """Of the newest complete checkpoint, or of one on its way."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Of all complete checkpoints, and of one on its way, ascending."""
    return sorted(self._manager.all_steps())

  def wait(self) -> None:
    """Returns when all is written; raises OSError if the disk refused it."""
    with _writing(self.folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and lets go of threads."""
    with _writing(self.folder):
      self._manager.close()


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """The `keep` newest checkpoints stay, and that of step `good`."""

  def __init__(self, keep: int):
    self.keep, self.good = keep, None

  def should_preserve(self, checkpoints, *, context):
    newest = sorted(found.step for found in checkpoints)[-self.keep :]
    return [found.step in (*newest, self.good) for found in checkpoints]


def saved_steps(workdir: Workdir) -> list[int]:
  """Steps of the complete checkpoints, ascending."""
  return sorted(ocp.utils.checkpoint_steps(storage.folder(workdir) / CHECKPOINTS))


def read_part(
  workdir: Workdir, part: str, step: int | None = None
) -> tuple[int, dict[str, np.ndarray]]:
  """(step, {dotted name: array}) of one part of the state: 'ema' or 'params'; None is the latest.

  Raises InputError if there is no such checkpoint, or if it is damaged.
  """
  found = saved_steps(workdir)
  if not found:
    raise InputError(f'{workdir}: has no checkpoint yet; let the run write one.')
  wanted = found[-1] if step is None else step
  if wanted not in found:
    raise InputError(f'{workdir}: has no checkpoint of step {wanted}; there are {found}.')
  folder = storage.folder(workdir) / CHECKPOINTS / str(wanted)
  try:
    with _reading(folder):
      return wanted, _part_of(folder, part)
  except InputError:
    if step is None and saved_steps(workdir)[-1:] not in ([], [wanted]):
      return read_part(workdir, part)  # the run goes on, and has put a newer one in its place
    raise


def _part_of(folder, part) -> dict[str, np.ndarray]:
  handler = _state_handler()
  tree = {part: handler.metadata(folder / 'state').tree[part]}
  # As numpy, or else Orbax asks for the devices that wrote it.
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  arguments = ocp.args.PyTreeRestore(tree, restore_args=as_numpy, partial_restore=True)
  return handler.restore(folder / 'state', args=arguments)[part]


def _state_handler():
  # Orbax's own shares the writing of an array out to all devices that hold a copy, and compiles a
  # program for each slice of each shape to do so: half a minute before the first save returns.
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler()),
    (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _check_same(folder, saved, target):
  """Refuses a saved state that does not fit, by the knob that is the likely reason."""
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
    knob = 'optimizer'
  elif had_adapters and has_adapters and not only_shapes:
    knob = 'lora.targets'
  elif had_adapters or has_adapters:
    knob = 'lora.rank'
  else:
    knob = 'checkpoint' if only_shapes else 'optimizer.rates'
  name = (trained or differing)[0]
  was, now = (list(tree[name]) if name in tree else 'absent' for tree in (saved, wanted))
  raise InputError(f'{folder}: holds another state than this run has: {name} is {was} there and '
                   f'{now} here; set {knob} as it was, or use a new workdir.')  # fmt: skip


@contextlib.contextmanager
def _writing(folder) -> Iterator[None]:
  """Orbax gives what the disk said as a ValueError; this gives it as an OSError."""
  try:
    yield
  except ValueError as error:
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
      number = int(found[1])
      raise OSError(number, os.strerror(number), str(folder)) from error
    if re.match('[A-Z_]+: ', str(error)):  # a store's refusal, as in 'PERMISSION_DENIED: ...'
      raise OSError(errno.EIO, str(error), str(folder)) from error
    raise


@contextlib.contextmanager
def _reading(folder) -> Iterator[None]:
  _hush()
  try:
    yield
  except (InputError, MemoryError):
    raise
  except Exception as error:  # of damaged arrays Orbax raises nothing more special
    raise InputError(f'{folder}: damaged or incomplete ({str(error)[:200]}); remove this folder to '
                     'go on from the checkpoint before it.') from error  # fmt: skip


@functools.cache  # once per process
def _hush() -> None:
  """Drops the tracebacks that each thread of Orbax prints of an error that we raise anyway."""
  is_ours = lambda record: not (record.exc_info and f'{os.sep}orbax{os.sep}' in record.pathname)
  logging.getLogger('absl').addFilter(is_ours)
  is_task = lambda record: 'exception was never retrieved' not in record.getMessage()
  logging.getLogger('asyncio').addFilter(is_task)
  print_unraisable = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      print_unraisable(unraisable)

  sys.unraisablehook = hook
