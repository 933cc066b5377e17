"""From a row to the arrays of one training example: pure functions of the row and a generator.

R resolution, h w latent sides, L tokens of a text, P pairs, I instructions. An example is a dict

  edited_image, input_image                         uint8 [R, R, 3], from a `Row`; or
  edited_mean, edited_log_variance, input_mean      float16 [h, w, 4], from a `LatentRow`;
  token_ids                                         int32 [L]
  weight                                            float32 [], 1; 0 for a row that is broken
  error                                             str, '' but for a row that is broken

Text-to-image has no `input_*`. The generator is asked in this order: pair, instruction, mirroring;
then, for pictures alone, size, top and left of the crop. So a row and its latents, given the same
generator, agree in everything that latents leave open. Without a generator nothing is random: first
pair, first instruction, not mirrored, cut from the centre.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ip2p_jax import images
from ip2p_jax.config_check import check_framing
from ip2p_jax.data.rows import LatentRow, Row
from ip2p_jax.errors import InputError

Example = dict[str, Any]
Tokenizer = Callable[[Sequence[str]], np.ndarray]
SAME_SHAPE = 1.05  # how far the aspects of a pair may lie apart


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
  """What is cut from a picture, in pixels of the picture after it was resized.

  Attributes:
    size: (width, height) that the whole picture is resized to.
    corner: (left, top) of the square that is kept.
    side: of that square.
  """

  size: tuple[int, int]
  corner: tuple[int, int]
  side: int


def picture(encoded: bytes, resolution: int, resize: str = 'crop', name: str = '') -> np.ndarray:
  """A picture file as uint8 [R, R, 3], upright, RGB, transparency on white; nothing is random.

  Args:
    encoded: the bytes of a JPEG, PNG, WebP, BMP, GIF or TIFF file.
    resolution: R.
    resize: 'crop' brings the short side to R and keeps the centre; 'squash' ignores the aspect.
    name: for messages.

  Raises InputError if the bytes are no picture, or a damaged one.
  """
  array = _decode(encoded, name or 'a picture')
  return _cut(array, _crop(_size(array), Framing(resolution, resize=resize), None))


def example(
  row: Row, rng: np.random.Generator | None, framing: Framing, tokenizer: Tokenizer
) -> Example:
  """One example of encoded pictures. Both are cut and mirrored alike.

  An edited picture of another size than its input is first brought to the input's. Raises
  InputError if a picture is broken, missing, or of another shape than its partner.
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
  """One example of latents; pair, instruction and mirroring are drawn as `example` does.

  Raises InputError if the task needs an input that the row does not have.
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
  """What stands for a broken row: zeros of the usual shapes, weight 0, and what is wrong."""
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
  wants_flip = rng.random() < framing.flip_rate  # drawn in any case, so that what follows stays
  return pair, instruction, bool(wants_flip and (may_flip or framing.flip_directions))


def _decode(encoded, name) -> np.ndarray:
  """uint8 [H, W, 3]."""
  if not encoded:
    raise InputError(f'{name} is missing.')
  array = images.decode_jpeg(encoded)
  if array is not None:
    return array
  try:
    with Image.open(io.BytesIO(encoded), 'r', images.READ_FORMATS) as image:
      width, height = image.size
      if width * height > images.MAX_PIXELS or min(width, height) < images.MIN_SIDE:
        raise InputError(f'{name} is {width}x{height} pixels, which is out of range.')
      image = images.plain(image)
  except (InputError, MemoryError):  # want of memory is no fault of the picture
    raise
  except UnidentifiedImageError as error:
    raise InputError(f'{name} cannot be read (it is no picture of a known kind).') from error
  except Exception as error:  # decoders raise many kinds: EOFError, SyntaxError, struct.error ...
    raise InputError(f'{name} cannot be read ({error}); it may be damaged.') from error
  return images.to_array(image, image.size)  # transparency on white


def _size(array):
  return array.shape[1], array.shape[0]


def _check_shapes(sizes, name):
  (width, height), (other_width, other_height) = sizes[0], sizes[-1]
  one, other = width * other_height, other_width * height
  if max(one, other) > SAME_SHAPE * min(one, other):
    raise InputError(
      f'{name}: the input image is {width}x{height} and the edited image'
      f' {other_width}x{other_height}; both must have the same shape.'
    )


def _crop(size, framing, rng) -> Crop:
  """Where to cut. By default the centre; with `largest_resize` and a generator, anywhere."""
  resolution = framing.resolution
  is_random = rng is not None and framing.largest_resize > 0
  short = int(rng.integers(resolution, framing.largest_resize + 1)) if is_random else resolution
  if framing.resize == 'squash':
    width = height = short
  else:  # the long side to the nearest pixel, in integers, so that no platform rounds another way
    least = min(size)
    width, height = ((2 * side * short + least) // (2 * least) for side in size)
  if is_random:
    top = int(rng.integers(height - resolution + 1))
    left = int(rng.integers(width - resolution + 1))
  else:
    top, left = (height - resolution) // 2, (width - resolution) // 2
  return Crop((width, height), (left, top), resolution)


def _cut(array, crop, is_mirrored=False) -> np.ndarray:
  """Resizes and cuts in one go: what is cut off is never computed, however long the picture."""
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
  """Left for right; by channels, which numpy copies ten times as fast as pixels of three bytes."""
  result = np.empty_like(array)
  for channel in range(array.shape[-1]):
    result[..., channel] = array[:, ::-1, channel]
  return result
