"""The form that every data set is read into, whatever its layout on disk.

A source is a sequence: `len(source)` and `source[i]`. An item is a `Row` (images as encoded files)
or a `LatentRow` (outputs of the frozen networks). A broken row raises an InputError that names its
place. Sources can be pickled, since worker processes read them.
"""

from typing import NamedTuple, Protocol

import numpy as np

SPLITS = ('train', 'validation', 'test')


class Pair(NamedTuple):
  """Two encoded image files (JPEG, PNG, WebP ...); text-to-image has no input."""

  input_image: bytes | None
  edited_image: bytes


class Row(NamedTuple):
  """One example.

  Attributes:
    name: its place, for messages: 'photos/metadata.jsonl: line 3'.
    instructions: training draws one; for text-to-image, captions.
    pairs: training draws one (the original data set has up to four per prompt).
    may_flip: whether the instruction stays true after mirroring.
    caption: of the input image, '' if unknown.
    edited_caption: of the edited image, '' if unknown.
    group: rows of the same group show one image, so they stay in one split; '' if unknown.
  """

  name: str
  instructions: tuple[str, ...]
  pairs: tuple[Pair, ...]
  may_flip: bool = True
  caption: str = ''
  edited_caption: str = ''
  group: str = ''


class LatentRow(NamedTuple):
  """One encoded example. P pairs, I instructions, 2 for (as it is, mirrored), h w latent sides.

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
