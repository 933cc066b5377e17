"""The random views of Text2LIVE: crops, turns, perspectives and colours, all differentiable.

V views, H W pixels of the image, S pixels of a view's side. Places are (x, y) in -1..1 from edge to
edge of an image. A view is one bilinear look-up of all its geometry, so shapes are static.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CORNERS = np.float32([(-1, -1), (1, -1), (1, 1), (-1, 1)])
LUMA = np.float32((0.2989, 0.587, 0.114))
JITTER = 0.1  # of brightness, contrast and saturation, and of hue in turns
LEAST_CHROMA = 1e-5  # less is grey, which has no hue
WHITE = 1.0  # outside of what a view shows


class Views(NamedTuple):
  """How each view looks at an image.

  Attributes:
    crops: [V, 4], half width and half height of what is seen, and x and y of its centre; a negative
      half width mirrors.
    turns: [V, 3, 3], from a place of the view, before its perspective, to a place of the crop.
    perspectives: [V, 3, 3], from a place of the view to the place before its perspective.
    colours: [V, 4], factors of brightness, contrast and saturation, and turns of hue.
    is_grey: bool [V].
  """

  crops: Array
  turns: Array
  perspectives: Array
  colours: Array
  is_grey: Array


def draw(key: Array, count: int) -> Views:
  """Views for CLIP. The first is of the whole image, others of 0.6 to 1 of its sides."""
  keys = iter(jax.random.split(key, 11))
  chance = lambda p: jax.random.bernoulli(next(keys), p, (count,))
  crops = _crops(next(keys), jax.random.uniform(next(keys), (count, 1), minval=0.6).repeat(2, 1))
  crops = crops.at[0].set(jnp.float32([1, 1, 0, 0]))
  angles = jax.random.uniform(next(keys), (count,), minval=-1, maxval=1) * (np.pi / 12)
  shifts = jax.random.uniform(next(keys), (count, 2), minval=-0.2, maxval=0.2)  # of half a side
  turns = _or_none(chance(0.8), turned(angles, shifts))
  ends = CORNERS[None] * (1 - 0.4 * jax.random.uniform(next(keys), (count, 4, 2)))
  perspectives = _or_none(chance(0.5), homographies(ends, CORNERS))
  colours = _jitter(*jax.random.split(next(keys)), count, 0.7)
  return Views(_mirrored(chance(0.5), crops), turns, perspectives, colours, chance(0.15))


def draw_example(key: Array) -> Views:
  """One view for the generator: 0.85 to 1 of each side, may be mirrored, seldom recoloured."""
  size_key, place_key, mirror_key, *colour_keys = jax.random.split(key, 5)
  crops = _crops(place_key, jax.random.uniform(size_key, (1, 2), minval=0.85))
  still = jnp.eye(3)[None]
  return Views(
    _mirrored(jax.random.bernoulli(mirror_key, 0.5, (1,)), crops), still, still,
    _jitter(*colour_keys, 1, 0.1), jnp.zeros(1, bool),
  )  # fmt: skip


def look(image: Array, views: Views, size: tuple[int, int]) -> Array:
  """[H, W, 3] in 0..1 -> the views [V, *size, 3] in 0..1; white outside of each crop."""
  axis = lambda count: (jnp.arange(count) + 0.5) * 2 / count - 1
  places = jnp.stack(jnp.meshgrid(axis(size[1]), axis(size[0])), -1)
  before = _moved(views.perspectives, jnp.broadcast_to(places, (len(views.crops), *places.shape)))
  inside = _moved(views.turns, before)
  is_seen = (jnp.abs(before) <= 1).all(-1) & (jnp.abs(inside) <= 1).all(-1)
  half, centre = jnp.split(views.crops[:, None, None], 2, -1)
  seen = jnp.where(is_seen[..., None], sample(image, centre + half * inside), WHITE)
  seen = recoloured(seen, views.colours)
  return jnp.where(views.is_grey[:, None, None, None], _grey(seen), seen)


def sample(image: Array, places: Array) -> Array:
  """[H, W, C] at places [..., 2] -> [..., C], bilinear; beyond the edge, the pixel at the edge."""
  height, width = image.shape[:2]
  scale = jnp.float32([width / 2, height / 2])[(None,) * (places.ndim - 1)]
  pixels = (places + 1) * scale - 0.5
  first = jnp.floor(pixels)
  x1, y1 = jnp.split(pixels - first, 2, -1)
  x, y = first[..., 0].astype(int), first[..., 1].astype(int)
  at = lambda dx, dy: image[jnp.clip(y + dy, 0, height - 1), jnp.clip(x + dx, 0, width - 1)]
  upper = (1 - x1) * at(0, 0) + x1 * at(1, 0)
  return (1 - y1) * upper + y1 * ((1 - x1) * at(0, 1) + x1 * at(1, 1))


def turned(angles: Array, shifts: Array) -> Array:
  """[V] radians and [V, 2] -> [V, 3, 3], the inverse of a turn with a shift after it."""
  c, s = jnp.cos(angles), jnp.sin(angles)
  back = jnp.stack([jnp.stack([c, s], -1), jnp.stack([-s, c], -1)], 1)
  places = jnp.concatenate([back, -jnp.einsum('vij,vj->vi', back, shifts)[..., None]], -1)
  last = jnp.broadcast_to(jnp.float32([0, 0, 1]), (len(angles), 1, 3))
  return jnp.concatenate([places, last], 1)


def homographies(places: Array, targets: Array) -> Array:
  """[V, 3, 3] that move four places [V, 4, 2] to the targets [4, 2]."""
  x, y = places[..., 0], places[..., 1]  # [V, 4]
  u, v = (jnp.broadcast_to(target, x.shape) for target in targets.T)
  one, none = jnp.ones_like(x), jnp.zeros_like(x)
  rows = [
    [x, y, one, none, none, none, -x * u, -y * u],
    [none, none, none, x, y, one, -x * v, -y * v],
  ]
  system = jnp.concatenate([jnp.stack(row, -1) for row in rows], 1)  # [V, 8, 8]
  solved = jnp.linalg.solve(system, jnp.concatenate([u, v], 1)[..., None])[..., 0]
  return jnp.concatenate([solved, one[:, :1]], 1).reshape(-1, 3, 3)


def recoloured(images: Array, colours: Array) -> Array:
  """[V, H, W, 3] by `Views.colours` [V, 4], in this order, each clipped to 0..1."""
  brightness, contrast, saturation, hue = colours.T[..., None, None, None]
  images = jnp.clip(images * brightness, 0, 1)
  mean = _grey(images).mean((1, 2, 3), keepdims=True)
  images = jnp.clip(mean + contrast * (images - mean), 0, 1)
  grey = _grey(images)
  return with_hue(jnp.clip(grey + saturation * (images - grey), 0, 1), hue[..., 0])


def with_hue(images: Array, turns: Array) -> Array:
  """Moves the hue (of HSV) of [V, H, W, 3] by turns [V, 1, 1]; greys stay as they are."""
  r, g, b = images[..., 0], images[..., 1], images[..., 2]
  # XLA may compute a colour twice, with another rounding. So nothing here depends on equality, as
  # the gradient of `max` over an axis does, which was nan.
  most, least = jnp.maximum(jnp.maximum(r, g), b), jnp.minimum(jnp.minimum(r, g), b)
  chroma = most - least
  is_grey, safe = chroma < LEAST_CHROMA, jnp.maximum(chroma, LEAST_CHROMA)
  is_red, is_green = (r >= g) & (r >= b), g >= b
  sixths = jnp.where(
    is_red, (g - b) / safe, jnp.where(is_green, (b - r) / safe + 2, (r - g) / safe + 4)
  )
  sixths = (sixths + 6 * turns)[..., None] + jnp.float32([5, 3, 1])[None, None, None]
  sixths = sixths % 6
  moved = most[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(sixths, 4 - sixths), 0, 1)
  return jnp.where(is_grey[..., None], images, moved)


def _crops(key, shares):
  """Crops [V, 4] of shares [V, 2] of the sides, somewhere in the image."""
  centres = jax.random.uniform(key, shares.shape, minval=-1, maxval=1) * (1 - shares)
  return jnp.concatenate([shares, centres], -1)


def _mirrored(is_mirrored, crops):
  return crops.at[:, 0].multiply(jnp.where(is_mirrored, -1, 1))


def _or_none(is_used, matrices):
  return jnp.where(is_used[:, None, None], matrices, jnp.eye(3)[None])


def _jitter(key, chance_key, count, chance):
  amounts = jax.random.uniform(key, (count, 4), minval=-JITTER, maxval=JITTER)
  is_used = jax.random.bernoulli(chance_key, chance, (count, 1))
  return jnp.where(is_used, amounts, 0) + jnp.float32([[1, 1, 1, 0]])


def _moved(matrices, places):  # [V, 3, 3], [V, H, W, 2]
  whole = jnp.concatenate([places, jnp.ones_like(places[..., :1])], -1)
  whole = jnp.einsum('vij,vhwj->vhwi', matrices, whole, precision='highest')
  return whole[..., :2] / whole[..., 2:]


def _grey(images):
  return (images @ LUMA)[..., None]
