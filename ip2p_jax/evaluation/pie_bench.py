"""What PIE-Bench's mapping_file.json says in its own way: kinds, masks and changed words."""

from collections.abc import Sequence

import numpy as np

from ip2p_jax.errors import InputError

SIDE = 512
KINDS = (  # by editing_type_id
  'random', 'change object', 'add object', 'delete object', 'change content', 'change pose',
  'change color', 'change material', 'change background', 'change style',
)  # fmt: skip


def words(text: str | None) -> tuple[str, str] | None:
  """The changed words of 'cat dog'. Of more words the benchmark's script takes the first two."""
  pair = str(text or '').split()
  return (pair[0], pair[1]) if len(pair) > 1 else None


def mask(runs: Sequence[int], place: str = 'the mask') -> np.ndarray:
  """A mask of PIE-Bench as float32 [512, 512], 1 = edit.

  `runs` are (start, length, start, length, ...) over the pixels, row by row. A run ends with the
  image. The border of one pixel is always 1, since some annotations are wrong there.
  """
  try:
    pairs = np.asarray(runs, np.int64).reshape(-1, 2)
  except (TypeError, ValueError):
    raise InputError(f'{place}: its mask is not a list of starts and lengths; get the file'
                     ' again') from None  # fmt: skip
  pixels = np.zeros(SIDE * SIDE, np.float32)
  for start, length in pairs.tolist():
    pixels[start : start + length] = 1
  pixels = pixels.reshape(SIDE, SIDE)
  pixels[[0, -1]] = pixels[:, [0, -1]] = 1
  return pixels
