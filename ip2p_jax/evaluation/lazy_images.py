"""Images that are read when they are asked for: functions without arguments that give a PIL image.

They can be pickled. `file` and `cell` give an image in its own colours, as `images.read` does.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ip2p_jax import images
from ip2p_jax.data import tables

Opener = Callable[[], Image.Image]
Reader = tables.JsonLines | tables.Csv | tables.Parquet


def file(path: str | Path) -> Opener:
  """The image in a file."""
  return functools.partial(images.read, path)


def cell(reader: Reader, i: int, column: str) -> Opener:
  """The image in row `i` of a table.

  To read the rows of one column in order costs little. A Parquet reader that changes columns
  starts its row group again, so give each column its own reader.
  """
  return functools.partial(_read_cell, reader, i, column)


def shown(read: Opener) -> Opener:
  """The image of `read` as RGB of sRGB, on white where it is transparent."""
  return functools.partial(_read_shown, read)


def resized(read: Opener, size_of: Callable[[int, int], tuple[int, int]]) -> Opener:
  """The image of `read` at `size_of(width, height)`, by Pillow's bicubic filter."""
  return functools.partial(_read_resized, read, size_of)


def mask(read: Opener, source: Opener, place: str, has_hole: bool = False) -> Callable:
  """A mask image as float32 [H, W] of the source's size, 1 = edit; white is edited.

  With `has_hole`, what is not opaque is edited, unless the whole mask is opaque. `place` is for
  messages: it raises InputError for a mask that is all black or of another shape.
  """
  return functools.partial(_read_mask, read, source, place, has_hole)


def _read_cell(reader, i, column):
  place, folders, values = reader.read(i, [column])
  encoded = tables.encoded_image(place, folders, values.get(column), column)
  return images.decode(encoded, f'{place}: {column!r}')[0]


def _read_shown(read):
  return images.shown(read())


def _read_resized(read, size_of):
  image = read()
  return image.resize(size_of(*image.size), Image.Resampling.BICUBIC)


def _read_mask(read, source, place, has_hole) -> np.ndarray:
  image = read()
  if has_hole and image.mode == 'RGBA' and image.getextrema()[3][0] < 255:
    image = image.getchannel('A').point([255] * 255 + [0]).convert('RGB')
  return images.as_mask(image, source().size, place)
