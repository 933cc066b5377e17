"""What an edit is given, as one row per picture to make."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from ip2p_jax.defaults import MAX_SEED
from ip2p_jax.errors import InputError
from ip2p_jax.images import check_mask


class EditRows(NamedTuple):
  """One entry per picture to make."""

  originals: Sequence[Image.Image]
  instructions: Sequence[str]
  text_guidance: Sequence[float]
  image_guidance: Sequence[float]
  seeds: Sequence[int]
  mask: Sequence[np.ndarray | None]
  indices: Sequence[int]

  @classmethod
  def of(cls, originals, instructions, text_guidance, image_guidance, seed, mask, indices) -> Self:
    """Repeats what is given once as often as the rest; InputError if the counts do not fit."""
    seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
    columns = [originals, instructions, text_guidance, image_guidance, seed]
    columns = [list(column) if _is_many(column) else [column] for column in columns]
    columns.append([mask] if mask is None or np.ndim(mask[0]) == 1 else list(mask))
    count = max(map(len, columns))
    columns.append(indices if indices is not None else range(len(columns[0])))
    for name, column in zip(cls._fields, columns, strict=True):
      if len(column) not in (1, count):
        raise InputError(f'{len(column)} {name} for {count} pictures; give one, or one each.')
    rows = cls(*(list(column) * (count // len(column)) for column in columns))
    if not all(text.strip() for text in rows.instructions):
      raise InputError('the instruction is empty; say what to change, as in "make it winter".')
    for original, row_mask in zip(rows.originals, rows.mask, strict=True):
      if row_mask is not None:
        check_mask(row_mask, original.size)
    if mask is not None and not any(map(np.any, rows.mask)):
      raise InputError('the mask is 0 everywhere, so nothing would be edited; 1 is edited.')
    return rows

  def take(self, rows: Sequence[int]) -> 'EditRows':
    return EditRows(*([column[row] for row in rows] for column in self))


def _is_many(value):
  return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
