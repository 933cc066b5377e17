"""The generator of Text2LIVE: from an image to a layer of colours and opacity that is laid over it.

It is the "skip" network of Deep Image Prior (Ulyanov et al. 2018): one convolution with stride 2
per level on the way down, and few channels that skip each level. It learns from one image alone. So
its batch norms, which use the statistics of that image, are group norms with one channel a group.

B batch, H W pixels, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.models.layers import Conv1x1, GroupNorm, conv3x3

EPS = 1e-5  # of every norm
SLOPE = 0.2  # of the leaky ReLU
# As torch's: uniform within 1 / sqrt(inputs).
INITIAL = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
# A step along a column changes R, G and B as they vary together in photos (Olah et al. 2017).
_COLOURS = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]]) / (1.6, 1, 1)
COLOURS = np.float32(_COLOURS / np.linalg.norm(_COLOURS, axis=0).max())


class LayerGenerator(nnx.Module):
  """`levels` halve the image; each has `width` channels, of which `skip` go past it."""

  def __init__(self, levels: int = 7, width: int = 128, skip: int = 4, *, rngs):
    self.outermost = Level(3, levels, width, skip, is_finest=True, rngs=rngs)
    self.head = _conv1x1(width, 4, rngs=rngs)

  def __call__(self, images: Array) -> Array:
    """[B, H, W, 3] in 0..1 -> [B, H, W, 4] in 0..1: red, green, blue, opacity."""
    colours, opacity = jnp.split(self.head(self.outermost(images)), (3,), -1)
    colours = jnp.einsum('bhwc,dc->bhwd', colours, COLOURS)
    return nnx.sigmoid(jnp.concatenate([colours, opacity], -1))


class Level(nnx.Module):
  """Half of the resolution, with all the levels below, and a skip connection past them."""

  def __init__(self, in_width, levels, width, skip, *, is_finest=False, rngs):
    norm = lambda channels: GroupNorm(channels, channels, EPS)
    self.skip, self.skip_norm = _conv1x1(in_width, skip, rngs=rngs), norm(skip)
    self.down, self.down_norm = _conv3x3(in_width, width, rngs=rngs, strides=2), norm(width)
    self.deep, self.deep_norm = _conv3x3(width, width, rngs=rngs), norm(width)
    self.below = Level(width, levels - 1, width, skip, rngs=rngs) if levels > 1 else None
    self.join_norm = norm(skip + width)
    self.up, self.up_norm = _conv3x3(skip + width, width, rngs=rngs), norm(width)
    self.mix = _conv1x1(width, width, rngs=rngs)
    self.mix_norm = None if is_finest else norm(width)

  def __call__(self, x):  # [B, H, W, in_width] -> [B, H, W, width]
    skipped = _active(self.skip_norm(self.skip(x)))
    deep = _active(self.down_norm(self.down(_padded(x))))
    deep = _active(self.deep_norm(self.deep(_padded(deep))))
    if self.below is not None:
      deep = self.below(deep)
    B, H, W, C = deep.shape
    deep = jax.image.resize(deep, (B, 2 * H, 2 * W, C), 'bilinear')
    # An odd side has grown by one pixel at its end.
    both = jnp.concatenate([skipped, deep[:, : x.shape[1], : x.shape[2]]], -1)
    y = _active(self.up_norm(self.up(_padded(self.join_norm(both)))))
    y = self.mix(y)
    return _active(y if self.mix_norm is None else self.mix_norm(y))


def least_side(levels: int) -> int:
  """The smallest side of an image: the coarsest level needs two pixels for its reflection."""
  return 2**levels + 1


def _padded(x):
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), 'reflect')


def _active(x):
  return nnx.leaky_relu(x, SLOPE)


def _conv3x3(in_width, out_width, *, strides=1, rngs):
  conv = conv3x3(in_width, out_width, strides=strides, padding='VALID', rngs=rngs)
  return _started(conv, rngs)


def _conv1x1(in_width, out_width, *, rngs):
  return _started(Conv1x1(in_width, out_width, rngs=rngs), rngs)


def _started(conv, rngs):
  conv.kernel = nnx.Param(INITIAL(rngs.params(), conv.kernel.shape, jnp.float32))
  return conv
