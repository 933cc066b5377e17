"""The workdir of a training run: its config, its checkpoints, and the weights to take out of it.

  config.json    the knobs
  base/          what training leaves alone: VAE, text encoder, tokenizer, untrained weights
  checkpoints/   STEP/state and STEP/extras, by Orbax

A workdir is a local folder or gs://bucket/folder. A run is killed at any time: what is not complete
is never read, and cleared by the next start.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ip2p_jax import parameters, storage, weights
from ip2p_jax.config import LoraConfig
from ip2p_jax.errors import InputError
from ip2p_jax.models import lora
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.weights import names
from ip2p_jax.weights.tensors import COMPONENTS

CONFIG, BASE, CHECKPOINTS = 'config.json', 'base', 'checkpoints'
BASE_CONFIGS = 'configs.json'  # written last: with it, a base is complete

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


def is_workdir(path: Workdir) -> bool:
  """Whether a training run was started at `path`."""
  folder = storage.folder(path)
  return (folder / CONFIG).exists() and any((folder / x).exists() for x in (BASE, CHECKPOINTS))


def load(
  path: Workdir,
  variant: str | None = None,
  ema: bool | None = None,
  prediction_type: str | None = None,
) -> weights.Checkpoint:
  """The weights of a workdir's latest checkpoint, or of any file or folder that `weights.read` can.

  Raises InputError for anything that is missing, damaged or not supported.
  """
  if not is_workdir(path):
    return weights.read(path, variant=variant, ema=ema, prediction_type=prediction_type)
  if variant or prediction_type:
    raise InputError(f'{path}: a training run has one variant and knows its prediction type; leave '
                     'out variant and prediction_type.')  # fmt: skip
  return read(path, ema is not False)


def read(workdir: Workdir, ema: bool = True, step: int | None = None) -> weights.Checkpoint:
  """A run's weights as a checkpoint, float32, adapters merged; runs on any number of devices.

  The run may be going on. Only the weights asked for are read, and not the optimizer's state.

  Args:
    ema: the moving average, or the weights that are being trained.
    step: None takes the latest checkpoint.

  Raises InputError if there is none, or if something of it is missing or damaged.
  """
  base = load_base(workdir)
  if base is None:
    raise InputError(f'{workdir}: has no complete {BASE} folder; start the run again to write it.')
  step, trained = read_part(workdir, 'ema' if ema else 'params', step)
  config = lora_config(workdir)
  trained = _merged(base, trained, config) if config.rank else trained
  fixed = base.tensors['unet']
  makers = {name: lambda name=name: fixed[name] for name in fixed} | tensor_makers(trained)
  tensors = base.tensors | {'unet': weights.Tensors(makers)}
  return dataclasses.replace(base, tensors=tensors, source=f'{workdir} (step {step})')


def read_adapters(
  workdir: Workdir, ema: bool = True, step: int | None = None
) -> tuple[dict[str, np.ndarray], LoraConfig]:
  """The adapters of a LoRA run, {dotted name: float32}, and their settings; as `read` otherwise."""
  config = lora_config(workdir)
  if not config.rank:
    raise InputError(f'{workdir}: trained the weights themselves (lora.rank is 0), so it has no '
                     'adapters; convert it to diffusers or ldm.')  # fmt: skip
  return read_part(workdir, 'ema' if ema else 'params', step)[1], config


def save_base(workdir: Workdir, checkpoint: weights.Checkpoint, trained: Collection[str]) -> None:
  """Keeps what training does not change, float32, so that a run needs its starting point only once.

  Does nothing if the workdir has a base and a training checkpoint. Every process must call it.

  Args:
    trained: dotted names of the UNet's parameters that lie in the state instead.

  Raises OSError if the disk refuses it, InputError if a weight is not finite.
  """
  folder = storage.folder(workdir)
  is_there = (folder / BASE / BASE_CONFIGS).exists() and saved_steps(workdir)
  if jax.process_index() == 0 and not is_there:
    _write_base(folder / BASE, checkpoint, {tensor_name(name) for name in trained})
  multihost_utils.sync_global_devices('ip2p_jax base')


def load_base(workdir: Workdir) -> weights.Checkpoint | None:
  """What `save_base` kept, read lazily; its 'unet' has only what is not trained. None if absent."""
  folder = storage.folder(workdir) / BASE
  if not (folder / BASE_CONFIGS).exists():
    return None
  configs = storage.read_json(folder / BASE_CONFIGS)
  tokenizer = {file.name: file.read_bytes() for file in (folder / 'tokenizer').iterdir()}
  tensors = {}
  for part in COMPONENTS:
    with storage.fetched(folder / f'{part}.safetensors') as file:
      tensors[part] = weights.read_tensors(file)[0]
  return weights.Checkpoint(configs, tensors, tokenizer, str(workdir))


def read_unet(checkpoint: weights.Checkpoint, shapes: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """{dotted name: array} of those parameters of the UNet, typed as `shapes`.

  Raises InputError naming tensors that are missing, misshapen or not finite.
  """
  tensors = checkpoint.tensors['unet']
  found = [name for name in map(tensor_name, shapes) if name in tensors]
  chosen = weights.Tensors({name: lambda name=name: tensors[name] for name in found})
  tree = names.to_params(chosen, parameters.unflatten(shapes), 'unet', source=checkpoint.source)
  return parameters.flatten(tree)


def write_config(workdir: Workdir, config: Mapping[str, Any]) -> None:
  """Writes config.json, at once or not at all; only the first process does."""
  if jax.process_index() == 0:
    storage.write_json(storage.folder(workdir) / CONFIG, config)


def read_config(workdir: Workdir) -> dict[str, Any] | None:
  """The config.json of a run, with lists where tuples were; None if there is none."""
  file = storage.folder(workdir) / CONFIG
  return storage.read_json(file) if file.exists() else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """A line per knob that differs: 'optimizer.learning_rate: 0.0001 -> 3e-05'."""
  as_text = lambda config: {k: json.dumps(v) for k, v in parameters.flatten(config).items()}
  old, new = as_text(old), as_text(new)
  knobs = [*old, *(knob for knob in new if knob not in old)]
  return [
    f'{knob}: {old.get(knob, "absent")} -> {new.get(knob, "absent")}'
    for knob in knobs
    if old.get(knob) != new.get(knob)
  ]


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


def tensor_makers(params: Mapping[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
  """Torch names -> functions that make the tensor, so that no more than one is there twice."""
  one = lambda name: names.to_tensors(parameters.unflatten({name: params[name]}))
  return {tensor_name(name): lambda name=name: one(name)[tensor_name(name)] for name in params}


def tensor_name(name: str) -> str:
  """The torch name of a parameter's dotted name."""
  return names.tensor_name(tuple(name.split('.')))


def lora_config(workdir: Workdir) -> LoraConfig:
  """The run's; InputError if it has no config.json."""
  config = read_config(workdir)
  if config is None or 'lora' not in config:
    raise InputError(f'{workdir}: has no {CONFIG} of a training run; give the workdir of one.')
  return LoraConfig(**config['lora'])


def _state_handler():
  # Orbax's own shares the writing of an array out to all devices that hold a copy, and compiles a
  # program for each slice of each shape to do so: half a minute before the first save returns.
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler()),
    (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _merged(base, adapters, config):
  """{kernel: array} of the kernels that have adapters, with those merged into them."""
  shapes = parameters.flatten(networks_of(base).shapes['unet'])
  has_adapter = lambda name: name.removesuffix('kernel') + 'lora_down' in adapters
  kernels = {name: shape for name, shape in shapes.items() if has_adapter(name)}
  return lora.merged(read_unet(base, kernels), adapters, config)


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


def _write_base(folder, checkpoint, trained):
  (folder / BASE_CONFIGS).unlink(missing_ok=True)
  (folder / 'tokenizer').mkdir(parents=True, exist_ok=True)
  for name, content in checkpoint.tokenizer.items():
    (folder / 'tokenizer' / name).write_bytes(content)
  for part in COMPONENTS:
    tensors = checkpoint.tensors[part]
    kept = [name for name in tensors if part != 'unet' or name not in trained]
    lazy = weights.Tensors({name: lambda name=name, all=tensors: all[name] for name in kept})
    with storage.sent(folder / f'{part}.safetensors') as file:
      weights.write_safetensors(file, lazy)
  storage.write_json(folder / BASE_CONFIGS, checkpoint.configs)


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
