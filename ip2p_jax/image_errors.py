"""One sentence about an image file that cannot be used."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from ip2p_jax.defaults import MIN_SIDE
from ip2p_jax.errors import InputError

MAX_PIXELS = 178_956_970  # half a gigabyte as RGB; the limit of Pillow


@contextlib.contextmanager
def named(name: str | os.PathLike, opened: Callable[[], BinaryIO]) -> Iterator[None]:
  """Turns errors of Pillow into InputError, which begins with the image's name.

  `opened` opens the file. Lack of memory is not the image's fault, and stays a MemoryError.
  """
  try:
    yield
  except (InputError, MemoryError):
    raise
  except Image.DecompressionBombError as error:
    raise InputError(_too_large(name)) from error
  except UnidentifiedImageError as error:
    with opened() as file:
      if file.read(12)[4:8] == b'ftyp':
        raise InputError(f'{name} is HEIC or AVIF; convert it to JPEG or PNG first') from error
    raise InputError(f'{name} is not an image; give PNG, JPEG, WebP, BMP, GIF or TIFF') from error
  except Exception as error:  # decoders raise many kinds: EOFError, SyntaxError, struct.error ...
    raise InputError(f'{name} cannot be read ({error}); it may be damaged or cut short') from error


def check_size(name: str | os.PathLike, width: int, height: int) -> None:
  """Raises InputError for an image of too many or too few pixels."""
  if width * height > MAX_PIXELS:
    raise InputError(_too_large(name))
  if min(width, height) < MIN_SIDE:
    raise InputError(f'{name} is {width}x{height}; give at least {MIN_SIDE}x{MIN_SIDE} pixels')


def _too_large(name):
  return f'{name} has over {MAX_PIXELS:,} pixels; make it smaller first'
