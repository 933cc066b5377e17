"""How images become a network's input: by which filter, and to which size.

Images are float32 [B, H, W, 3] in 0..1, of any size, before and after.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ip2p_jax.errors import check_choice
from ip2p_jax.pipeline import clip_scores

TORCH_CUBIC = "bicubic, a = -0.75, no antialias (torch's interpolate)"
TORCH_LINEAR = "bilinear, no antialias (torch's interpolate)"
PILLOW_CUBIC = 'bicubic, a = -0.5, antialias, 8 bits after each axis (Pillow)'


class Preprocessing(NamedTuple):
  """A function of images, what it does, and its filter."""

  prepare: Callable[[Array], Array]
  text: str
  resize_filter: str


def squash(side: int) -> Preprocessing:
  """Both sides to `side` pixels; the original's, for CLIP."""
  prepare = lambda images: clip_scores.resize(images, side)
  return Preprocessing(prepare, f'squashed to {side}x{side}', TORCH_CUBIC)


def crop(side: int, cut: int | None = None) -> Preprocessing:
  """The short side to `side` pixels, and a square of `cut` from the centre; MagicBrush's."""
  cut = cut or side

  def prepare(images):
    small = pillow_resize(images, shorter(*images.shape[1:3], side))
    # Python's round, as in torchvision: halves go to the even number.
    top, left = (round((length - cut) / 2) for length in small.shape[1:3])
    return small[:, top : top + cut, left : left + cut]

  return Preprocessing(prepare, f'short side to {side}, centre {cut}x{cut}', PILLOW_CUBIC)


def fit(side: int, longest: int) -> Preprocessing:
  """The short side to `side` pixels, but the long one to `longest` at most; PIE-Bench's."""

  def prepare(images):
    size = shorter(*images.shape[1:3], side, longest)
    if size == images.shape[1:3]:
      return images
    resized = (len(images), *size, images.shape[-1])
    return jax.image.resize(images, resized, 'linear', antialias=False, precision='highest')

  return Preprocessing(prepare, f'short side to {side}, long to {longest} at most', TORCH_LINEAR)


def named(name: str, side: int) -> Preprocessing:
  """'squash' or 'crop' to `side`; InputError for another name."""
  check_choice('preprocessing', name, ('squash', 'crop'))
  return squash(side) if name == 'squash' else crop(side)


def shorter(height: int, width: int, side: int, longest: int | None = None) -> tuple[int, int]:
  """(height, width), the short one `side`, the long one rounded down, as in torchvision."""
  short, long = min(height, width), max(height, width)
  size = side, side * long // short
  if longest is not None and size[1] > longest:
    size = longest * size[0] // size[1], longest
  return size if height <= width else size[::-1]


def pillow_resize(images: Array, size: tuple[int, int]) -> Array:
  """To (height, width) as Pillow resizes 8-bit images: across first, rounded after each axis."""
  batch, height, _, channels = images.shape
  levels = jnp.round(images * 255)
  for shape in ((batch, height, size[1], channels), (batch, *size, channels)):
    if shape != levels.shape:
      levels = jax.image.resize(levels, shape, 'cubic', antialias=True, precision='highest')
      levels = jnp.clip(jnp.floor(levels + 0.5), 0, 255)
  return levels / 255
