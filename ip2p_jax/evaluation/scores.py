"""How alike two images are: pure functions on batches, and what a number must be published with.

B pairs, H W pixels, C channels, N tokens. Images are float32 [B, H, W, 3] in 0..1, scores float32
[B]. `where` is float32 [B, H, W, 1]: the weight of each pixel, 1 counts and 0 does not; None counts
all. A score of no pixel at all is NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ip2p_jax.errors import InputError

# Of SSIM (Wang et al. 2004), for colours in 0..1.
WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2
GREY = 0.5  # is taken off before squares, so that less is lost to rounding


class Description(NamedTuple):
  """What must be known to compare a number with another."""

  model: str
  sha256: dict[str, str]  # of its weights, by file name
  preprocessing: str
  resize_filter: str
  quirks: tuple[str, ...] = ()  # published bugs that are on


def l1(images: Array, others: Array, where: Array | None = None) -> Array:
  """The mean absolute difference."""
  return _mean(jnp.abs(images - others), where)


def mse(images: Array, others: Array, where: Array | None = None) -> Array:
  """The mean squared difference."""
  return _mean(jnp.square(images - others), where)


l2 = mse  # MagicBrush's name for it


def psnr(images: Array, others: Array, where: Array | None = None) -> Array:
  """The peak signal-to-noise ratio in dB, for a peak of 1; infinite for equal images."""
  return -10 * jnp.log10(mse(images, others, where))


def ssim(images: Array, others: Array, where: Array | None = None) -> Array:
  """Structural similarity (Wang et al. 2004, equation 13), the mean over colours and windows.

  Windows are Gaussian, 11x11 pixels, and lie inside the image. With `where`, a window is weighted
  by it, so that other pixels do not matter, and windows count by the weight of their centre.

  Raises InputError if a side is shorter than a window.
  """
  if min(images.shape[1:3]) < WINDOW:
    height, width = images.shape[1:3]
    raise InputError(f'images are {width}x{height}; SSIM needs {WINDOW}x{WINDOW} pixels or more.')
  x, y = images - GREY, others - GREY
  moments = jnp.concatenate([x, y, x * x + y * y, x * y], -1)
  if where is None:
    local = _blur(moments)
  else:
    total = _blur(where)
    local = _blur(moments * where) / jnp.where(total > 0, total, 1)
  mean_x, mean_y, squares, product = jnp.split(local, 4, -1)
  variances = squares - mean_x**2 - mean_y**2
  covariance = product - mean_x * mean_y
  mean_x, mean_y = mean_x + GREY, mean_y + GREY
  brightness = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
  similarity = brightness * (2 * covariance + C2) / (variances + C2)
  edge = WINDOW // 2
  return _mean(similarity, None if where is None else where[:, edge:-edge, edge:-edge])


def zeroed(images: Array, where: Array) -> Array:
  """Black where nothing counts. PIE-Bench scores such images, over all pixels."""
  return images * where


def cosine(a: Array, b: Array) -> Array:
  """Of embeddings [B, C]; 0 if one of them is 0."""
  lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / jnp.maximum(lengths, 1e-8)


def structure_distance(keys: Array, others: Array) -> Array:
  """The mean squared difference of the self-similarities of DINO's keys [B, N, C].

  (Tumanyan et al. 2022.) The self-similarity is the cosine of each two tokens.
  """
  return jnp.square(_self_similarity(keys) - _self_similarity(others)).mean((1, 2))


def _self_similarity(keys):  # -> [B, N, N]
  length = jnp.linalg.norm(keys, axis=-1)
  lengths = jnp.maximum(length[:, :, None] * length[:, None], 1e-8)
  return jnp.einsum('bnc,bmc->bnm', keys, keys, precision='highest') / lengths


def _mean(values, where):  # [B, H, W, C] -> [B]
  if where is None:
    return values.mean((1, 2, 3))
  weight = where.sum((1, 2, 3)) * values.shape[-1]
  return (values * where).sum((1, 2, 3)) / weight


def _blur(x):
  """Gaussian means of the windows inside: [B, H, W, C] -> [B, H - 10, W - 10, C]."""
  taps = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
  taps = (taps / taps.sum()).astype(np.float32)
  for axis in (1, 2):
    length = x.shape[axis] - WINDOW + 1
    parts = (jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i in range(WINDOW))
    x = sum(tap * part for tap, part in zip(taps, parts, strict=True))
  return x
