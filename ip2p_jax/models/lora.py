"""Low-rank adapters: what is trained instead of kernels, and diffusers' files of them.

Of a kernel W an adapter is two arrays, named after it, of rank R (Hu et al. 2021, section 4.1):

  Linear  W [in, out]          lora_down [in, R]          lora_up [R, out]
  Conv    W [kh, kw, in, out]  lora_down [kh, kw, in, R]  lora_up [1, 1, R, out]

and stands for W + alpha / R * lora_down @ lora_up. Kernels and adapters come as {dotted name:
array}: 'mid_block.attentions.0...to_q.kernel' gets '...to_q.lora_down' and '...to_q.lora_up'.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax import weights
from ip2p_jax.config import LoraConfig
from ip2p_jax.errors import InputError
from ip2p_jax.parameters import compiled, flatten, unflatten
from ip2p_jax.weights import names

FILE_NAME = 'pytorch_lora_weights.safetensors'  # what diffusers looks for in a folder

# The two styles of names that diffusers writes: peft's, and its own.
_TENSOR = re.compile(r'unet\.(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight')
_HALVES = {'lora_A': 'down', 'lora.down': 'down', 'lora_B': 'up', 'lora.up': 'up'}
_OUR_NOTE, _PEFT_NOTE = 'ip2p_jax_lora', 'lora_adapter_metadata'  # keys of a file's metadata
_NOT_PLAIN = ('use_dora', 'use_rslora', 'lora_bias', 'rank_pattern', 'alpha_pattern')


def adapters(
  shapes: Mapping[str, Any], config: LoraConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """New adapters, float32, for every kernel whose name matches `config.targets`.

  lora_down is uniform within 1 / sqrt(numbers that one output is made of), as peft's default;
  lora_up is zero, so that training starts at the very base model.

  Args:
    shapes: {name: anything with a shape} of all parameters.
    rng: the same seed gives the same numbers, whatever the order of `shapes`.

  Raises:
    InputError: no kernel matches, or a knob has a wrong value.
  """
  _check(config)
  search = compiled(config.targets, 'lora.targets').search
  kernels = sorted(name for name in shapes if name.endswith('.kernel') and search(name))
  if not kernels:
    raise InputError(
      f'lora.targets: {config.targets!r} matches no kernel; they are called, for instance,'
      f' {next((name for name in shapes if name.endswith(".kernel")), "to_q.kernel")}.'
    )
  found = {}
  for kernel in kernels:
    (down, up), (down_shape, up_shape) = _names(kernel), _shapes(shapes[kernel].shape, config.rank)
    bound = 1 / math.sqrt(math.prod(down_shape[:-1]))
    found[down] = rng.uniform(-bound, bound, down_shape).astype(np.float32)
    found[up] = np.zeros(up_shape, np.float32)
  return found


def merged(
  fixed: Mapping[str, Array], adapters: Mapping[str, Array], config: LoraConfig
) -> dict[str, Array]:
  """`fixed` with W + alpha / rank * lora_down @ lora_up for every kernel W that has an adapter.

  In float32, then in W's dtype. Pure, for use under jit and grad: gradients by the adapters are
  those of the layer with a second, narrow branch. While training, keep kernels that have adapters
  in float32 and cast after merging: a bfloat16 kernel swallows what is below half its last digit,
  and of a change of a thousandth of the kernel only 58 % would arrive.

  Raises:
    InputError: an adapter's kernel is not there, or has another shape.
  """
  scale, result = config.alpha / config.rank, dict(fixed)
  for kernel in _kernels(adapters):
    down, up = (adapters[name].astype(jnp.float32) for name in _names(kernel))
    up = up.reshape(up.shape[-2:])  # [R, out]
    if kernel not in fixed or fixed[kernel].shape != (*down.shape[:-1], up.shape[-1]):
      raise InputError(f'lora: the network has no {kernel} of the shape the adapter was made for; '
                       'use the checkpoint it was trained on.')  # fmt: skip
    product = jnp.einsum('...r,ro->...o', down, up, precision=jax.lax.Precision.HIGHEST)
    base = fixed[kernel]
    result[kernel] = (base.astype(jnp.float32) + scale * product).astype(base.dtype)
  return result


class Branched(nnx.Module):
  """A Linear with its adapter as a second, narrow branch: x W + alpha / R * (x down) up.

  For large layers: W stays in the type it came in and gets no gradient, and no change is too small
  for its last digit. The branch is in the type of x.
  """

  def __init__(self, linear: Callable, down: Array, up: Array, scale: float):
    self.linear, self.scale = linear, scale
    self.lora_down, self.lora_up = nnx.Param(down), nnx.Param(up)

  def __call__(self, x):  # [..., in]
    rows = x.reshape(-1, x.shape[-1])
    narrow = rows @ self.lora_down[...].astype(x.dtype)
    branch = self.scale * (narrow @ self.lora_up[...].astype(x.dtype))
    return self.linear(x) + branch.reshape(*x.shape[:-1], -1)


def attach(model: nnx.Module, adapters: Mapping[str, Array], config: LoraConfig) -> None:
  """Gives those Linear layers of `model` that have an adapter their `Branched`, in place.

  Names are as in `merged`, which gives the same function of x.
  """
  for kernel in _kernels(adapters):
    *path, layer = kernel.removesuffix('.kernel').split('.')
    owner = model
    for key in path:
      owner = owner[int(key)] if key.isdecimal() else getattr(owner, key)
    down, up = (adapters[name] for name in _names(kernel))
    setattr(owner, layer, Branched(getattr(owner, layer), down, up, config.alpha / config.rank))


def to_diffusers(adapters: Mapping[str, Array], config: LoraConfig) -> dict[str, np.ndarray]:
  """The adapters under diffusers' names ('unet...to_q.lora_A.weight') and in torch's layout.

  alpha / rank is multiplied into lora_B, so that the file's own alpha is its rank. Every reader
  takes that for granted, while another alpha would be a note that only some of them look up.
  """
  halves = {'lora_A': {}, 'lora_B': {}}
  for kernel in _kernels(adapters):
    down, up = (np.asarray(adapters[name], np.float32) for name in _names(kernel))
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
    raise InputError(f'{file}: already exists; choose another name, or say to overwrite it.')
  note = {'alpha': config.alpha, 'targets': config.targets}
  tensors = to_diffusers(adapters, config)
  weights.write_safetensors(file, tensors, dtype, {_OUR_NOTE: json.dumps(note)})
  return file


def read(
  path: str | os.PathLike, shapes: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], LoraConfig]:
  """Adapters, float32, and their config, from a file of ours, diffusers' or peft's.

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
  found = _to_adapters(file, halves, shapes, rank)
  config, factor = _config(file, metadata, rank, _kernels(found))
  for name in found:
    if name.endswith('.lora_up'):
      found[name] = found[name] / np.float32(factor)
  return found, config


def _check(config):
  if config.rank < 1:
    raise InputError(f'lora.rank is {config.rank}; give a whole number from 1 on.')
  if not 0 < config.alpha < math.inf:
    raise InputError(f'lora.alpha is {config.alpha}; give a number above 0, such as the rank.')


def _names(kernel):
  module = kernel.removesuffix('.kernel')
  return f'{module}.lora_down', f'{module}.lora_up'


def _shapes(kernel_shape, rank):
  *window, in_width, out_width = kernel_shape
  return (*window, in_width, rank), (*(1 for _ in window), rank, out_width)


def _kernels(adapters):
  downs = (name for name in adapters if name.endswith('.lora_down'))
  return [name.removesuffix('lora_down') + 'kernel' for name in downs]


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
  """Our names, layout and float32; refuses what does not fit the UNet."""
  kernels = [name for name in shapes if name.endswith('.kernel')]
  kernel_of = {names.tensor_name(tuple(kernel.split('.'))): kernel for kernel in kernels}
  adapted = halves['down'] | halves['up']
  unknown = [name for name in adapted if name not in kernel_of]
  if unknown:
    raise InputError(f'{file}: adapts layers that the UNet does not have, such as {unknown[0]}.')
  found = {}
  for i, half in enumerate(('down', 'up')):
    wanted = {}
    for kernel in map(kernel_of.get, adapted):
      wanted[kernel] = jax.ShapeDtypeStruct(_shapes(shapes[kernel].shape, rank)[i], np.float32)
    source = f'{file}: lora_{half}'
    params = weights.to_params(halves[half], unflatten(wanted), 'unet', source=source)
    found |= {_names(kernel)[i]: array for kernel, array in flatten(params).items()}
  return found


def _config(file, metadata, rank, kernels):
  """The config, and what lora_up in the file is multiplied by, compared with ours."""
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
