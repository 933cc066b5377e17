"""LPIPS, a distance of images by features of a classifier (Zhang et al. 2018), version 0.1.

B batch, H W height and width, C channels. The classifiers are torchvision's SqueezeNet 1.1 and
AlexNet. `features` has torchvision's names; `lins.i` are the weights that LPIPS learned for the
i-th feature map.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.errors import InputError

SHIFT = np.float32([[[(-0.030, -0.088, -0.188)]]])  # of colours in -1..1
SCALE = np.float32([[[(0.458, 0.448, 0.450)]]])
EPS = 1e-10  # is added to the length of a pixel's features


class Convolution(NamedTuple):
  """A convolution and a ReLU."""

  width: int
  kernel: int
  strides: int
  padding: int

  def layer(self, in_width, rngs):
    kernel, padding = (self.kernel, self.kernel), (self.padding, self.padding)
    return nnx.Conv(
      in_width, self.width, kernel, self.strides, padding=(padding, padding), rngs=rngs
    )


class Fire(NamedTuple):
  """SqueezeNet's block (Iandola et al. 2016): few channels, then two convolutions side by side."""

  inner_width: int
  width: int

  def layer(self, in_width, rngs):
    return FireLayer(in_width, self.inner_width, self.width // 2, rngs=rngs)


class FireLayer(nnx.Module):
  def __init__(self, in_width, inner_width, width, *, rngs):
    self.squeeze = nnx.Conv(in_width, inner_width, (1, 1), rngs=rngs)
    self.expand1x1 = nnx.Conv(inner_width, width, (1, 1), rngs=rngs)
    self.expand3x3 = nnx.Conv(inner_width, width, (3, 3), rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.squeeze(x))
    return jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], -1)


POOL = None
# By classifier, a row for each feature map: {place in torchvision's `features`: layer}. A ReLU
# follows every layer but the pools.
CLASSIFIERS = {
  'squeeze': (
    {0: Convolution(64, 3, 2, 0)},
    {2: POOL, 3: Fire(16, 128), 4: Fire(16, 128)},
    {5: POOL, 6: Fire(32, 256), 7: Fire(32, 256)},
    {8: POOL, 9: Fire(48, 384)},
    {10: Fire(48, 384)},
    {11: Fire(64, 512)},
    {12: Fire(64, 512)},
  ),
  'alex': (
    {0: Convolution(64, 11, 4, 2)},
    {2: POOL, 3: Convolution(192, 5, 1, 2)},
    {5: POOL, 6: Convolution(384, 3, 1, 1)},
    {8: Convolution(256, 3, 1, 1)},
    {10: Convolution(256, 3, 1, 1)},
  ),
}


def classifier_of(names: Collection[str], source: str) -> str:
  """'squeeze' or 'alex', by the names of its tensors; InputError if it is neither."""
  if 'features.3.squeeze.weight' in names:
    return 'squeeze'
  if 'features.10.weight' in names and 'features.0.weight' in names:
    return 'alex'
  raise InputError(
    f"{source}: lacks the features of LPIPS's classifier; add torchvision's squeezenet1_1 or"
    ' alexnet (a .pth or .safetensors file with features.0.weight).'
  )


class Lpips(nnx.Module):
  def __init__(self, classifier: str, *, rngs):
    self.classifier = classifier
    features, lins, width = {}, [], 3
    for row in CLASSIFIERS[classifier]:
      for place, made in row.items():
        if made is not POOL:
          features[str(place)] = made.layer(width, rngs)
          width = made.width
      lins.append(nnx.Param(jnp.zeros((width,))))
    self.features, self.lins = nnx.Dict(features), nnx.List(lins)

  def __call__(self, images: Array, others: Array) -> Array:
    """The distance of images [B, H, W, 3] in 0..1, float32 [B]; 0 if they are equal."""
    maps = self.maps(jnp.concatenate([images, others]))
    return sum(map(_distance, maps, self.lins))

  def maps(self, images: Array) -> list[Array]:
    """Feature maps of images [B, H, W, 3] in 0..1: each [B, h, w, C], after the ReLU."""
    x, maps = (images * 2 - 1 - SHIFT) / SCALE, []
    for row in CLASSIFIERS[self.classifier]:
      for place, made in row.items():
        if made is POOL:
          x = _pool(x, is_ceiling=self.classifier == 'squeeze')
        else:
          x = nnx.relu(self.features[str(place)](x))
      maps.append(x)
    return maps


def _distance(features, weights):  # [2B, h, w, C], [C] -> [B]
  length = jnp.linalg.norm(features, axis=-1, keepdims=True)
  first, second = jnp.split(features / (length + EPS), 2)
  weights = weights[...].astype(jnp.float32)[None, None, None]
  return (jnp.square(first - second) * weights).sum(-1).mean((1, 2))


def _pool(x, is_ceiling):
  """The maximum of 3x3 pixels, every two pixels; `is_ceiling` keeps a last window that is cut."""
  padding = tuple((0, int(is_ceiling and side % 2 == 0)) for side in x.shape[1:3])
  return nnx.max_pool(x, (3, 3), (2, 2), padding)
