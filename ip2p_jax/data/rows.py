"""What every data set is read into, whatever it looks like on disk.

A source is a sequence: `len(source)` and `source[i]`, which gives a `Row` (pictures as encoded
files) or a `LatentRow` (what the frozen networks make of them), or raises an InputError that names
the place of a broken row. Sources can be pickled, since worker processes read them.
"""

from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ('train', 'validation', 'test')


class Pair(NamedTuple):
  """Two encoded picture files (JPEG, PNG, WebP ...); text-to-image has no input."""

  input_image: bytes | None
  edited_image: bytes


class Row(NamedTuple):
  """One example.

  Attributes:
    name: where it is, for people: 'photos/metadata.jsonl: line 3'.
    instructions: one is drawn each time; for text-to-image, captions.
    pairs: one is drawn each time (the original data set has up to four per prompt).
    may_flip: whether mirroring keeps the instruction true.
    caption: of the input image, '' if unknown.
    edited_caption: of the edited image, '' if unknown.
    group: rows of the same group are about one picture, and so in one split; '' if unknown.
  """

  name: str
  instructions: tuple[str, ...]
  pairs: tuple[Pair, ...]
  may_flip: bool = True
  caption: str = ''
  edited_caption: str = ''
  group: str = ''


class LatentRow(NamedTuple):
  """One example, encoded. P pairs, I instructions, 2 for (as it is, mirrored), h w latent sides.

  Attributes:
    token_ids: int32 [I, L].
    input_mean: float16 [P, 2, h, w, 4], of the unscaled posterior; None for text-to-image.
    edited_mean, edited_log_variance: float16 [P, 2, h, w, 4].
    may_flip: as in `Row`.
  """

  name: str
  token_ids: np.ndarray
  input_mean: np.ndarray | None
  edited_mean: np.ndarray
  edited_log_variance: np.ndarray
  may_flip: bool = True


class Source(Protocol):
  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Row | LatentRow: ...
