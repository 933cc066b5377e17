"""Layers that several models share.

B batch, H W height and width, C channels, N tokens. Tensors are NHWC, kernels HWIO. The dtype of
the weights is the compute dtype: cast the weights to change it, and all activations follow.
Statistics of norms and softmax are always float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.models.attention import ATTENTION_OUT

Params = Any  # a nested dict of arrays, as nnx.to_pure_dict gives


class Keys:
  """Keys for parameters, in order. nnx.Rngs does the same, but traces a full UNet in 7 s."""

  def __init__(self, key: Array):
    self.key, self.count = key, 0

  def params(self) -> Array:
    self.count += 1
    return jax.random.fold_in(self.key, self.count)


def abstract(make: Callable[[Keys], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
  """The graphdef of `make(keys)` and its parameters as a dict of ShapeDtypeStructs; runs nothing.

  `nnx.merge(graphdef, params)` makes the module, inside jit.
  """
  graphdef, state = nnx.split(jax.eval_shape(lambda: make(Keys(jax.random.key(0)))))
  return graphdef, nnx.to_pure_dict(state)


def conv3x3(in_width: int, out_width: int, *, strides=1, padding=((1, 1), (1, 1)), rngs):
  return nnx.Conv(in_width, out_width, (3, 3), strides, padding=padding, rngs=rngs)


class Linear(nnx.Module):
  """A matrix product over the last axis."""

  def __init__(self, in_width: int, out_width: int, *, use_bias: bool = True, rngs):
    self.kernel = nnx.Param(_initial(rngs, (in_width, out_width)))
    self.bias = nnx.Param(jnp.zeros((out_width,))) if use_bias else None

  def __call__(self, x):  # [..., in_width]
    return product(x, self.kernel[...], self.bias)


class Conv1x1(nnx.Module):
  """A 1x1 convolution."""

  def __init__(self, in_width: int, out_width: int, *, rngs):
    self.kernel = nnx.Param(_initial(rngs, (1, 1, in_width, out_width)))
    self.bias = nnx.Param(jnp.zeros((out_width,)))

  def __call__(self, x):  # [B, H, W, in_width]
    return product(x, self.kernel[0, 0], self.bias)


def _initial(rngs, shape):
  return nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32)


def product(x: Array, kernel: Array, bias: Array | None) -> Array:
  """[..., in_width] by [in_width, out_width], plus [out_width]."""
  out = _times(x, kernel)
  return out if bias is None else out + bias[(None,) * (out.ndim - 1)]


@jax.custom_vjp
def _times(x, kernel):
  return x @ kernel


def _times_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _times_backward(inputs, grad):
  x, kernel = inputs
  return grad @ kernel.T, _kernel_gradient(x, grad)


def _kernel_gradient(x, grad):
  direct = lambda x, grad: jnp.einsum('...c,...d->cd', x, grad)
  # On a CPU, XLA is three times slower over several axes; on a TPU, flattening would copy data.
  flat = lambda *both: direct(*(y.reshape(-1, y.shape[-1]) for y in both))
  return jax.lax.platform_dependent(x, grad, cpu=flat, default=direct)


_times.defvjp(_times_forward, _times_backward)


@jax.custom_vjp
def halves(x: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
  """`product` by both halves of a kernel. To split the product, a TPU would write it several times.

  The kernel's gradient is one product: if devices hold parts of it, halves would have to move.
  """
  return _halves_forward(x, kernel, bias)[0]


def _halves_forward(x, kernel, bias):
  # Not by `product`: a remat policy does not see a product inside a nested custom_vjp function.
  parts = zip(jnp.split(kernel, 2, 1), jnp.split(bias, 2), strict=True)
  return tuple(x @ part + half[(None,) * (x.ndim - 1)] for part, half in parts), (x, kernel)


def _halves_backward(inputs, grads):
  x, kernel = inputs
  by_input = [grad @ part.T for grad, part in zip(grads, jnp.split(kernel, 2, 1), strict=True)]
  by_bias = [grad.sum(tuple(range(grad.ndim - 1))) for grad in grads]
  by_kernel = _kernel_gradient(x, jnp.concatenate(grads, -1))
  return sum(by_input), by_kernel, jnp.concatenate(by_bias)


halves.defvjp(_halves_forward, _halves_backward)


Remat = Callable[[Callable], Callable]


def _is_costly(primitive, *args, **params) -> bool:
  # jax's dots_saveable would compute every convolution twice: convolutions are not dots.
  policies = jax.checkpoint_policies
  return (
    primitive.name == 'conv_general_dilated'
    or policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)  # no attention scores
    or policies.save_only_these_names(ATTENTION_OUT)(primitive, *args, **params)
    or primitive.name.startswith('dot_product_attention')  # cuDNN's
  )


# By name, what the backward pass computes a second time to save memory: nothing; all except
# convolutions, matrix products and attention (a sixth of the memory, a few percent more time);
# everything (a thirtieth of the memory, a third more time).
REMATS: dict[str, Remat] = {
  'none': lambda layer: layer,
  'convdot': functools.partial(jax.checkpoint, policy=_is_costly),
  'full': jax.checkpoint,
}


class GroupNorm(nnx.Module):
  """Group normalisation over [B, H, W, C]; statistics and arithmetic in float32."""

  def __init__(self, groups: int, width: int, eps: float):
    self.groups, self.eps = groups, eps
    self.scale = nnx.Param(jnp.ones((width,)))
    self.bias = nnx.Param(jnp.zeros((width,)))

  def __call__(self, x):
    B, C = x.shape[0], x.shape[-1]
    x32 = x.astype(jnp.float32)
    # Two sums of each channel in one pass; XLA for TPU fuses it with the convolution before it.
    grouped = lambda y: y.reshape(B, self.groups, -1)
    channel = grouped(x32.mean((1, 2)))
    square = grouped(jnp.square(x32).mean((1, 2)))
    mean = channel.mean(-1, keepdims=True)
    # Variance within channels, plus that of the channels' means: exact if only channels differ.
    inside = jnp.maximum(square - jnp.square(channel), 0)
    variance = (inside + jnp.square(channel - mean)).mean(-1, keepdims=True)
    each = lambda y: jnp.repeat(y[..., 0], C // self.groups, 1)  # [B, groups, 1] -> [B, C]
    gain, bias = (p[...].astype(jnp.float32)[None] for p in (self.scale, self.bias))
    scale = each(jax.lax.rsqrt(variance + self.eps)) * gain
    shift = bias - each(mean) * scale
    return (x32 * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer normalisation over the last axis of [B, N, C]; statistics and arithmetic in float32."""

  def __init__(self, width: int, eps: float = 1e-5):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,)))
    self.bias = nnx.Param(jnp.zeros((width,)))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    normed = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
    scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
    return (normed * scale + bias).astype(x.dtype)


class ResnetBlock(nnx.Module):
  """Two 3x3 convolutions with a residual; the time embedding, if any, is added between them."""

  def __init__(self, in_width, out_width, *, groups, eps, time_width=None, rngs):
    self.norm1 = GroupNorm(groups, in_width, eps)
    self.conv1 = conv3x3(in_width, out_width, rngs=rngs)
    self.time_emb_proj = Linear(time_width, out_width, rngs=rngs) if time_width else None
    self.norm2 = GroupNorm(groups, out_width, eps)
    self.conv2 = conv3x3(out_width, out_width, rngs=rngs)
    self.conv_shortcut = Conv1x1(in_width, out_width, rngs=rngs) if in_width != out_width else None

  def __call__(self, x, time=None):  # [B, H, W, C], [B, T]
    h = self.conv1(nnx.silu(self.norm1(x)))
    if self.time_emb_proj is not None:
      h = h + self.time_emb_proj(nnx.silu(time))[:, None, None]
    h = self.conv2(nnx.silu(self.norm2(h)))
    return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Upsample(nnx.Module):
  """Nearest-neighbour upsampling, then a 3x3 convolution."""

  def __init__(self, width, *, rngs):
    self.conv = conv3x3(width, width, rngs=rngs)

  def __call__(self, x, size):
    return self.conv(resize_nearest(x, size))


def resize_nearest(x: Array, size: tuple[int, int]) -> Array:
  """[B, H, W, C] -> [B, *size, C]; row i comes from row floor(i * H / size), as in PyTorch."""
  for axis, target in zip((1, 2), size, strict=True):
    source = x.shape[axis]
    if target == 2 * source:
      x = jnp.repeat(x, 2, axis)
    elif target != source:
      x = jnp.take(x, jnp.arange(target) * source // target, axis)
  return x


CUBIC = -0.75  # of the kernel, as in torch; most other libraries have -0.5


def cubic_weights(size: int, new_size: int, step: float | None = None) -> np.ndarray:
  """float32 [new_size, size]: each new pixel from four old ones; edge pixels are repeated.

  `step` is the distance of new pixels in old pixels; None fits the new pixels to the old edges.
  """
  step = size / new_size if step is None else step
  centres = (np.arange(new_size) + 0.5) * step - 0.5
  first = np.floor(centres).astype(int)
  weights = np.zeros((new_size, size))
  for tap in range(-1, 3):
    old = np.clip(first + tap, 0, size - 1)
    np.add.at(weights, (np.arange(new_size), old), _cubic(np.abs(centres - first - tap)))
  return weights.astype(np.float32)


def _cubic(x):  # (Keys 1981, equation 4)
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
  far = ((x - 5) * x + 8) * x - 4
  return np.where(x <= 1, near, CUBIC * far)
