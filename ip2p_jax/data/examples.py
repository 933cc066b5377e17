"""Makes the arrays of one training example: pure functions of a row and a random generator.

R resolution, h w latent sides, L tokens of a text, P pairs, I instructions. An example is a dict

  edited_image, input_image                         uint8 [R, R, 3], from a `Row`; or
  edited_mean, edited_log_variance, input_mean      float16 [h, w, 4], from a `LatentRow`;
  token_ids                                         int32 [L]
  weight                                            float32 [], 1; 0 for a broken row
  error                                             str, '' except for a broken row

Text-to-image has no `input_*`. The generator draws in this order: pair, instruction, mirroring;
then, for images only, size, top and left of the crop. So a row and its latents get the same pair,
instruction and mirroring from the same generator. Without a generator nothing is random: first
pair, first instruction, not mirrored, cut from the centre.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ip2p_jax import images
from ip2p_jax.config_check import check_framing
from ip2p_jax.data.rows import LatentRow, Row
from ip2p_jax.errors import InputError

Example = dict[str, Any]
Tokenizer = Callable[[Sequence[str]], np.ndarray]
SAME_SHAPE = 1.05  # largest ratio of the aspects of a pair


class Framing(NamedTuple):
  """How an image becomes a training example; see `config.TrainConfig` and its `data`."""

  resolution: int
  task: str = 'edit'
  resize: str = 'crop'
  largest_resize: int = 0
  flip_rate: float = 0.5
  flip_directions: bool = False

  def check(self) -> None:
    """Raises an InputError that names a knob whose value makes no sense."""
    check_framing(self.resolution, self.task, self.resize, self.largest_resize, self.flip_rate)


class Crop(NamedTuple):
  """The square that is cut from an image, in pixels of the resized image.

  Attributes:
    size: (width, height) of the whole resized image.
    corner: (left, top) of the square.
    side: side of the square.
  """

  size: tuple[int, int]
  corner: tuple[int, int]
  side: int


def example(
  row: Row, rng: np.random.Generator | None, framing: Framing, tokenizer: Tokenizer
) -> Example:
  """One example of encoded images. Both images are cut and mirrored alike.

  The edited image is first resized to the size of the input image. Raises InputError if an image
  is broken or missing, or if the two images differ in shape.
  """
  choice, instruction, is_mirrored = _choose(
    len(row.pairs), len(row.instructions), row.may_flip, rng, framing
  )
  pair = row.pairs[choice]
  files = {'input_image': pair.input_image, 'edited_image': pair.edited_image}
  if framing.task == 'text_to_image':
    del files['input_image']
  decoded = {
    key: _decode(file, f'{row.name}: the {key.replace("_", " ")}') for key, file in files.items()
  }
  sizes = [_size(array) for array in decoded.values()]
  _check_shapes(sizes, row.name)
  crop = _crop(sizes[0], framing, rng)
  arrays = {key: _cut(array, crop, is_mirrored) for key, array in decoded.items()}
  return _complete(arrays, tokenizer([row.instructions[instruction]])[0])


def latent_example(row: LatentRow, rng: np.random.Generator | None, framing: Framing) -> Example:
  """One example of latents. Draws pair, instruction and mirroring as `example` does.

  Raises InputError if the task needs an input and the row has none.
  """
  pair, instruction, is_mirrored = _choose(
    len(row.edited_mean), len(row.token_ids), row.may_flip, rng, framing
  )
  arrays = {'edited_mean': row.edited_mean, 'edited_log_variance': row.edited_log_variance}
  if framing.task == 'edit':
    if row.input_mean is None:
      raise InputError(f"{row.name} has no input; set task to 'text_to_image'.")
    arrays['input_mean'] = row.input_mean
  arrays = {key: array[pair, int(is_mirrored)] for key, array in arrays.items()}
  return _complete(arrays, row.token_ids[instruction])


def blank(like: Example, error: str) -> Example:
  """Stands for a broken row: zeros of the usual shapes, weight 0, and the error."""
  zeros = {key: np.zeros_like(value) for key, value in like.items() if key != 'error'}
  return zeros | {'error': error}


def _complete(arrays, token_ids):
  token_ids = np.asarray(token_ids, np.int32)
  return arrays | {'token_ids': token_ids, 'weight': np.ones((), np.float32), 'error': ''}


def _choose(pairs, instructions, may_flip, rng, framing) -> tuple[int, int, bool]:
  """Numbers of a pair and of an instruction, and whether to mirror."""
  if rng is None:
    return 0, 0, False
  pair, instruction = int(rng.integers(pairs)), int(rng.integers(instructions))
  wants_flip = rng.random() < framing.flip_rate  # always drawn, so that later draws stay the same
  return pair, instruction, bool(wants_flip and (may_flip or framing.flip_directions))


def _decode(encoded, name) -> np.ndarray:
  """uint8 [H, W, 3], upright, transparency on white. Raises InputError if it is broken."""
  array = images.decode_jpeg(encoded) if encoded else None
  if array is None:
    image, _ = images.decode(encoded, name)
    array = images.to_array(image, image.size)
  return array


def _size(array):
  return array.shape[1], array.shape[0]


def _check_shapes(sizes, name):
  (width, height), (other_width, other_height) = sizes[0], sizes[-1]
  products = width * other_height, other_width * height
  if max(products) > SAME_SHAPE * min(products):
    raise InputError(
      f'{name}: the input image is {width}x{height} and the edited image'
      f' {other_width}x{other_height}; both must have the same shape.'
    )


def _crop(size, framing, rng) -> Crop:
  """Where to cut: the centre, or a random place with `largest_resize` and a generator."""
  resolution = framing.resolution
  is_random = rng is not None and framing.largest_resize > 0
  short = int(rng.integers(resolution, framing.largest_resize + 1)) if is_random else resolution
  if framing.resize == 'squash':
    width = height = short
  else:  # the long side to the nearest pixel, in integers, so that all platforms round alike
    least = min(size)
    width, height = ((2 * side * short + least) // (2 * least) for side in size)
  if is_random:
    top = int(rng.integers(height - resolution + 1))
    left = int(rng.integers(width - resolution + 1))
  else:
    top, left = (height - resolution) // 2, (width - resolution) // 2
  return Crop((width, height), (left, top), resolution)


def _cut(array, crop, is_mirrored=False) -> np.ndarray:
  """Resizes and cuts in one step, so that pixels outside the square are never computed."""
  box, size = [], _size(array)
  for corner in (crop.corner, [start + crop.side for start in crop.corner]):
    box += [
      min(place * side / resized, side)
      for place, side, resized in zip(corner, size, crop.size, strict=True)
    ]
  if box != [0, 0, *size] or size != (crop.side, crop.side):
    image = Image.fromarray(array)
    side = (crop.side, crop.side)
    array = np.asarray(image.resize(side, Image.Resampling.LANCZOS, tuple(box)))
  return _mirrored(array) if is_mirrored else array


def _mirrored(array):
  """Mirrors by channels, which numpy copies ten times as fast as pixels of three bytes."""
  result = np.empty_like(array)
  for channel in range(array.shape[-1]):
    result[..., channel] = array[:, ::-1, channel]
  return result
