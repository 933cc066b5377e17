"""LoRA adapters as diffusers' files (`pytorch_lora_weights.safetensors`), written and read."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from ip2p_jax import storage, weights
from ip2p_jax.config import LoraConfig
from ip2p_jax.errors import InputError
from ip2p_jax.models.lora import kernels_of, names_of, shapes_of
from ip2p_jax.parameters import flatten, unflatten
from ip2p_jax.weights import names

FILE_NAME = 'pytorch_lora_weights.safetensors'  # diffusers' name of the file in a folder

# diffusers writes two styles of names: peft's and its own.
_TENSOR = re.compile(r'unet\.(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight')
_HALVES = {'lora_A': 'down', 'lora.down': 'down', 'lora_B': 'up', 'lora.up': 'up'}
_OUR_NOTE, _PEFT_NOTE = 'ip2p_jax_lora', 'lora_adapter_metadata'  # keys of a file's metadata
_NOT_PLAIN = ('use_dora', 'use_rslora', 'lora_bias', 'rank_pattern', 'alpha_pattern')


def to_diffusers(adapters: Mapping[str, Array], config: LoraConfig) -> dict[str, np.ndarray]:
  """The adapters under diffusers' names ('unet...to_q.lora_A.weight') and in torch's layout.

  lora_B is multiplied by alpha / rank, so that the file's alpha equals its rank. Every reader
  assumes this; only some readers look up another alpha.
  """
  halves = {'lora_A': {}, 'lora_B': {}}
  for kernel in kernels_of(adapters):
    down, up = (np.asarray(adapters[name], np.float32) for name in names_of(kernel))
    halves['lora_A'][kernel] = down
    halves['lora_B'][kernel] = up * np.float32(config.alpha / config.rank)
  return {
    f'unet.{name.removesuffix(".weight")}.{half}.weight': array
    for half, kernels in halves.items()
    for name, array in weights.to_tensors(unflatten(kernels)).items()
  }


def write(
  adapters: Mapping[str, Array],
  config: LoraConfig,
  path: str | os.PathLike,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> Path:
  """Writes a file that diffusers' `pipeline.load_lora_weights(path)` reads; returns its path.

  Args:
    path: the `.safetensors` file, or a folder for `pytorch_lora_weights.safetensors`.
    dtype: 'float32', 'float16' or 'bfloat16'.
    overwrite: whether an older file may be replaced.

  Raises:
    InputError: the file exists, `dtype` is unknown, or an adapter does not fit it.
    OSError: the disk failed.
  """
  file = _file(path)
  if file.exists() and not overwrite:
    storage.refuse_existing(file)
  note = {'alpha': config.alpha, 'targets': config.targets}
  tensors = to_diffusers(adapters, config)
  weights.write_safetensors(file, tensors, dtype, {_OUR_NOTE: json.dumps(note)})
  return file


def read(
  path: str | os.PathLike, shapes: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], LoraConfig]:
  """Adapters, float32, and their config, from a file of ours, of diffusers or of peft.

  Args:
    path: the file, or a folder with `pytorch_lora_weights.safetensors`.
    shapes: {name: anything with a shape} of the UNet that they are for.

  Raises:
    InputError: the file is damaged, of another format or kind of adapter, or for another UNet.
  """
  file = _file(path)
  tensors, metadata = weights.read_tensors(file)
  halves = _split(file, tensors)
  ranks = {array.shape[0] for array in halves['down'].values() if array.ndim > 1}
  if len(ranks) != 1:
    raise InputError(f'{file}: has adapters of ranks {sorted(ranks)}; one rank for all is needed.')
  rank = ranks.pop()
  adapters = _to_adapters(file, halves, shapes, rank)
  config, factor = _config(file, metadata, rank, kernels_of(adapters))
  for name in adapters:
    if name.endswith('.lora_up'):
      adapters[name] = adapters[name] / np.float32(factor)
  return adapters, config


def _file(path):
  path = Path(path)
  return path if path.suffix == '.safetensors' else path / FILE_NAME


def _split(file, tensors):
  """{'down': {torch name of the kernel: array}, 'up': the same}."""
  halves = {'down': {}, 'up': {}}
  for name in tensors:
    match = _TENSOR.fullmatch(name)
    if match is None:
      raise InputError(f"{file}: {name} is not a UNet's adapter in diffusers' format; load the file"
                       ' in diffusers and save_lora_weights(unet_lora_layers=...).')  # fmt: skip
    halves[_HALVES[match[2]]][f'{match[1]}.weight'] = tensors[name]
  return halves


def _to_adapters(file, halves, shapes, rank):
  """Adapters in our names, our layout and float32; InputError if they do not fit the UNet."""
  kernels = [name for name in shapes if name.endswith('.kernel')]
  kernel_of = {names.tensor_name(tuple(kernel.split('.'))): kernel for kernel in kernels}
  adapted = halves['down'] | halves['up']
  unknown = [name for name in adapted if name not in kernel_of]
  if unknown:
    raise InputError(f'{file}: adapts layers that the UNet does not have, such as {unknown[0]}.')
  adapters = {}
  for i, half in enumerate(('down', 'up')):
    wanted = {}
    for kernel in map(kernel_of.get, adapted):
      wanted[kernel] = jax.ShapeDtypeStruct(shapes_of(shapes[kernel].shape, rank)[i], np.float32)
    source = f'{file}: lora_{half}'
    params = weights.to_params(halves[half], unflatten(wanted), 'unet', source=source)
    adapters |= {names_of(kernel)[i]: array for kernel, array in flatten(params).items()}
  return adapters


def _config(file, metadata, rank, kernels):
  """The config, and the factor of lora_up in the file over ours."""
  if _OUR_NOTE in metadata:
    note = _json(file, metadata[_OUR_NOTE])
    config = LoraConfig(rank, note.get('alpha', rank), note.get('targets', ''))
    return config, config.alpha / rank
  note = _json(file, metadata.get(_PEFT_NOTE, '{}'))
  for key in _NOT_PLAIN:
    if note.get(f'unet.{key}'):
      raise InputError(f'{file}: was made with {key}, which is not supported; use plain LoRA.')
  targets = f'^({"|".join(map(re.escape, kernels))})$'
  return LoraConfig(rank, note.get('unet.lora_alpha', rank), targets), 1.0


def _json(file, text):
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError):
    raise InputError(f'{file}: its metadata is not valid JSON; write it again.') from None
