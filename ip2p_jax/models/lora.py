"""Low-rank adapters, which are trained instead of kernels.

The adapter of a kernel W is two arrays of rank R, named after it (Hu et al. 2021, section 4.1):

  Linear  W [in, out]          lora_down [in, R]          lora_up [R, out]
  Conv    W [kh, kw, in, out]  lora_down [kh, kw, in, R]  lora_up [1, 1, R, out]

It means W + alpha / R * lora_down @ lora_up. Kernels and adapters are dicts {dotted name: array}:
'mid_block.attentions.0...to_q.kernel' gets '...to_q.lora_down' and '...to_q.lora_up'.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.config import LoraConfig
from ip2p_jax.errors import InputError
from ip2p_jax.parameters import compiled


def adapters(
  shapes: Mapping[str, Any], config: LoraConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """New adapters, float32, for every kernel whose name matches `config.targets`.

  lora_down is uniform within 1 / sqrt(inputs of one output), peft's default; lora_up is zero, so
  that training starts at the base model.

  Args:
    shapes: {name: anything with a shape} of all parameters.
    rng: the same seed gives the same numbers for any order of `shapes`.

  Raises:
    InputError: no kernel matches, or a setting has a wrong value.
  """
  _check(config)
  search = compiled(config.targets, 'lora.targets').search
  kernels = sorted(name for name in shapes if name.endswith('.kernel') and search(name))
  if not kernels:
    raise InputError(
      f'lora.targets: {config.targets!r} matches no kernel; they are called, for instance,'
      f' {next((name for name in shapes if name.endswith(".kernel")), "to_q.kernel")}.'
    )
  arrays = {}
  for kernel in kernels:
    (down, up), (down_shape, up_shape) = (
      names_of(kernel),
      shapes_of(shapes[kernel].shape, config.rank),
    )
    bound = 1 / math.sqrt(math.prod(down_shape[:-1]))
    arrays[down] = rng.uniform(-bound, bound, down_shape).astype(np.float32)
    arrays[up] = np.zeros(up_shape, np.float32)
  return arrays


def merged(
  fixed: Mapping[str, Array], adapters: Mapping[str, Array], config: LoraConfig
) -> dict[str, Array]:
  """`fixed` with W + alpha / rank * lora_down @ lora_up for every kernel W that has an adapter.

  In float32, then cast to W's dtype. Pure, for use under jit and grad: the gradients of adapters
  are those of the layer with a second, narrow branch. In training, keep kernels that have adapters
  in float32 and cast after merging: a bfloat16 kernel loses changes below half its last digit; of a
  change of a thousandth of the kernel, only 58 % would remain.

  Raises:
    InputError: an adapter's kernel is missing, or has another shape.
  """
  scale, result = config.alpha / config.rank, dict(fixed)
  for kernel in kernels_of(adapters):
    down, up = (adapters[name].astype(jnp.float32) for name in names_of(kernel))
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

  For large layers: W keeps its type and gets no gradient, and small changes are not lost to its
  rounding. The branch has the type of x.
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
  """Replaces Linear layers of `model` that have an adapter by `Branched`, in place.

  Names are as in `merged`, which gives the same function of x.
  """
  for kernel in kernels_of(adapters):
    *path, layer = kernel.removesuffix('.kernel').split('.')
    owner = model
    for key in path:
      owner = owner[int(key)] if key.isdecimal() else getattr(owner, key)
    down, up = (adapters[name] for name in names_of(kernel))
    setattr(owner, layer, Branched(getattr(owner, layer), down, up, config.alpha / config.rank))


def _check(config):
  if config.rank < 1:
    raise InputError(f'lora.rank is {config.rank}; give a whole number from 1 on.')
  if not 0 < config.alpha < math.inf:
    raise InputError(f'lora.alpha is {config.alpha}; give a number above 0, such as the rank.')


def names_of(kernel: str) -> tuple[str, str]:
  """The names of a kernel's two adapter arrays."""
  module = kernel.removesuffix('.kernel')
  return f'{module}.lora_down', f'{module}.lora_up'


def shapes_of(kernel_shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of a kernel's lora_down and lora_up."""
  *window, in_width, out_width = kernel_shape
  return (*window, in_width, rank), (*(1 for _ in window), rank, out_width)


def kernels_of(adapters: Mapping[str, Any]) -> list[str]:
  """The names of the kernels of `adapters`."""
  downs = (name for name in adapters if name.endswith('.lora_down'))
  return [name.removesuffix('lora_down') + 'kernel' for name in downs]
