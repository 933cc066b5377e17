"""The workdir of a training run: its config, its checkpoints, and how to read its weights.

  config.json    the settings
  base/          parts that are not trained: VAE, text encoder, tokenizer, untrained weights
  checkpoints/   STEP/state and STEP/extras, by Orbax

A workdir is a local folder or gs://bucket/folder. A run may be killed at any time: incomplete files
are never read, and the next start deletes them.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ip2p_jax import parameters, storage, weights
from ip2p_jax.config import LoraConfig
from ip2p_jax.errors import InputError
from ip2p_jax.models import lora
from ip2p_jax.pipeline.checkpoints import CHECKPOINTS, Workdir, read_part, saved_steps
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.weights import names
from ip2p_jax.weights.tensors import COMPONENTS

CONFIG, BASE = 'config.json', 'base'
BASE_CONFIGS = 'configs.json'  # written last: with it, a base is complete


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
  """The weights of a workdir's latest checkpoint, or of any checkpoint that `weights.read` reads.

  Raises InputError if something is missing, damaged or not supported.
  """
  if not is_workdir(path):
    return weights.read(path, variant=variant, ema=ema, prediction_type=prediction_type)
  if variant or prediction_type:
    raise InputError(f'{path}: a training run has one variant and knows its prediction type; leave '
                     'out variant and prediction_type.')  # fmt: skip
  return read(path, ema is not False)


def read(workdir: Workdir, ema: bool = True, step: int | None = None) -> weights.Checkpoint:
  """A run's weights as a checkpoint, float32, adapters merged; runs on any number of devices.

  The run may still go on. Only the requested weights are read, not the optimizer's state.

  Args:
    ema: whether to read the moving average or the trained weights.
    step: None takes the latest checkpoint.

  Raises InputError if there is no checkpoint, or a part of it is missing or damaged.
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


def read_adapters(workdir: Workdir, ema: bool = True) -> tuple[dict[str, np.ndarray], LoraConfig]:
  """The adapters of a LoRA run, {dotted name: float32}, and their settings; otherwise as `read`."""
  config = lora_config(workdir)
  if not config.rank:
    raise InputError(f'{workdir}: trained the weights themselves (lora.rank is 0), so it has no '
                     'adapters; convert it to diffusers or ldm.')  # fmt: skip
  return read_part(workdir, 'ema' if ema else 'params')[1], config


def save_base(workdir: Workdir, checkpoint: weights.Checkpoint, trained: Collection[str]) -> None:
  """Writes what training does not change, float32, so that a run reads its checkpoint only once.

  Does nothing if the workdir has a base and a training checkpoint. Every process must call it.

  Args:
    trained: dotted names of the UNet's parameters that the state holds instead.

  Raises OSError if the disk refuses it, InputError if a weight is not finite.
  """
  folder = storage.folder(workdir)
  is_there = (folder / BASE / BASE_CONFIGS).exists() and saved_steps(workdir)
  if jax.process_index() == 0 and not is_there:
    _write_base(folder / BASE, checkpoint, {tensor_name(name) for name in trained})
  multihost_utils.sync_global_devices('ip2p_jax base')


def load_base(workdir: Workdir) -> weights.Checkpoint | None:
  """The result of `save_base`, read lazily; 'unet' has only untrained weights. None if missing."""
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
  """{dotted name: array} of the UNet's parameters that `shapes` names, typed as there.

  Raises InputError that names tensors that are missing, of another shape or not finite.
  """
  tensors = checkpoint.tensors['unet']
  stored = [name for name in map(tensor_name, shapes) if name in tensors]
  chosen = weights.Tensors({name: lambda name=name: tensors[name] for name in stored})
  tree = names.to_params(chosen, parameters.unflatten(shapes), 'unet', source=checkpoint.source)
  return parameters.flatten(tree)


def write_config(workdir: Workdir, config: Mapping[str, Any]) -> None:
  """Writes config.json, whole or not at all; only the first process writes."""
  if jax.process_index() == 0:
    storage.write_json(storage.folder(workdir) / CONFIG, config)


def read_config(workdir: Workdir) -> dict[str, Any] | None:
  """The config.json of a run, with lists for tuples; None if there is none."""
  file = storage.folder(workdir) / CONFIG
  return storage.read_json(file) if file.exists() else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """A line per setting that differs: 'optimizer.learning_rate: 0.0001 -> 3e-05'."""
  as_text = lambda config: {k: json.dumps(v) for k, v in parameters.flatten(config).items()}
  old, new = as_text(old), as_text(new)
  settings = [*old, *(name for name in new if name not in old)]
  return [
    f'{name}: {old.get(name, "absent")} -> {new.get(name, "absent")}'
    for name in settings
    if old.get(name) != new.get(name)
  ]


def tensor_makers(params: Mapping[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
  """Torch names -> functions that make the tensor, so that at most one is in memory twice."""
  tensors = lambda name: names.to_tensors(parameters.unflatten({name: params[name]}))
  return {tensor_name(name): lambda name=name: tensors(name)[tensor_name(name)] for name in params}


def tensor_name(name: str) -> str:
  """The torch name of a parameter's dotted name."""
  return names.tensor_name(tuple(name.split('.')))


def lora_config(workdir: Workdir) -> LoraConfig:
  """The run's LoRA settings; InputError if it has no config.json."""
  config = read_config(workdir)
  if config is None or 'lora' not in config:
    raise InputError(f'{workdir}: has no {CONFIG} of a training run; give the workdir of one.')
  return LoraConfig(**config['lora'])


def _merged(base, adapters, config):
  """{kernel: array} of the kernels that have adapters, with the adapters merged."""
  shapes = parameters.flatten(networks_of(base).shapes['unet'])
  has_adapter = lambda name: name.removesuffix('kernel') + 'lora_down' in adapters
  kernels = {name: shape for name, shape in shapes.items() if has_adapter(name)}
  return lora.merged(read_unet(base, kernels), adapters, config)


def _write_base(folder, checkpoint, trained):
  (folder / BASE_CONFIGS).unlink(missing_ok=True)
  (folder / 'tokenizer').mkdir(parents=True, exist_ok=True)
  for name, content in checkpoint.tokenizer.items():
    (folder / 'tokenizer' / name).write_bytes(content)
  for part in COMPONENTS:
    tensors = checkpoint.tensors[part]
    fixed = [name for name in tensors if part != 'unet' or name not in trained]
    lazy = weights.Tensors({name: lambda name=name, all=tensors: all[name] for name in fixed})
    with storage.sent(folder / f'{part}.safetensors') as file:
      weights.write_safetensors(file, lazy)
  storage.write_json(folder / BASE_CONFIGS, checkpoint.configs)
