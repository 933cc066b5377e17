"""A method of editing: a function from images and their texts to edited images, for comparison.

N images, H W pixels, L text tokens (77), S steps. A method's module has `Settings`, a NamedTuple of
numbers with its authors' values, and a function `(model, settings) -> Method`. The network's part
of a method is one jitted program. Its numbers are traced, so that a curve over scales or strengths
compiles once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from ip2p_jax import sharding
from ip2p_jax.diffusion import samplers
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline import rows
from ip2p_jax.pipeline.program import Images
from ip2p_jax.pipeline.text_to_image import TextToImage
from ip2p_jax.sharding import ROWS, WHOLE
from ip2p_jax.xla_alarms import quietly


class Texts(NamedTuple):
  """The texts and seeds of N images.

  Attributes:
    captions: of the images.
    edited_captions: of the edited images.
    instructions: from the one to the other.
    seeds: 0 to 2**32 - 1; an image's noise depends on its seed alone.
    words: the changed words of caption and edited caption, where they are known.
  """

  captions: Sequence[str]
  edited_captions: Sequence[str]
  instructions: Sequence[str]
  seeds: Sequence[int]
  words: Sequence[tuple[str, str] | None] | None = None


# (images uint8 [N, H, W, 3], texts) -> edited images, of the same shape and type.
Method = Callable[[np.ndarray, Texts], np.ndarray]


class Request(NamedTuple):
  """The traced inputs of a method's program."""

  images: Array  # uint8 [N, H, W, 3]
  source_ids: Array  # int32 [N, L]
  target_ids: Array  # int32 [N, L]
  seeds: Array  # uint32 [N]
  null_ids: Array  # int32 [1, L], the empty text
  grid: samplers.Grid
  settings: Any = None  # the method's numbers
  control: Any = None  # arrays with a row for each image


SPLIT = Request(ROWS, ROWS, ROWS, ROWS, WHOLE, WHOLE, WHOLE, ROWS)


def request(
  model: TextToImage,
  images: np.ndarray,
  texts: Texts,
  grid: samplers.Grid,
  settings: Any = None,
  control: Any = None,
) -> Request:
  """A checked request; InputError if images or texts do not fit."""
  images = rows.pixels(images, model.networks.vae_config.factor)
  check_texts(texts, len(images))
  return Request(
    images,
    model.tokenizer(texts.captions),
    model.tokenizer(texts.edited_captions),
    rows.counts('seed', texts.seeds, len(images)),
    model.tokenizer(['']),
    grid,
    settings,
    control,
  )


def check_texts(texts: Texts, count: int) -> None:
  """Raises InputError unless there are two captions for each image."""
  for name in ('captions', 'edited_captions'):
    if len(column := getattr(texts, name)) != count:
      raise InputError(f'{len(column)} {name} for {count} images; give one each.')


def program(model: TextToImage, name: str, edited: Callable) -> Callable[[Request], np.ndarray]:
  """`edited(networks, params, request) -> Images`, compiled; all devices share the images.

  The result returns uint8 [N, H, W, 3]. InputError if latents overflowed. `name` is shown in
  profiles.
  """
  mesh = model.mesh

  def run(params, request):
    split = functools.partial(edited, model.networks)
    return sharding.each_its_rows(split, mesh, (WHOLE, SPLIT), ROWS)(params, request)

  run.__name__ = name
  run = jax.jit(run)

  @functools.cache
  def params():
    return sharding.copied(mesh, model.params) if mesh.size > 1 else model.params

  def images(request: Request) -> np.ndarray:
    count = len(request.images)
    edits: Images = quietly(run, params(), sharding.padded_rows(mesh, SPLIT, request, count))
    rows.check_finite('edit', edits.latents)
    return np.asarray(edits.images)[:count]

  return images
