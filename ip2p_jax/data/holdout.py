"""Chooses rows to hold out for validation. Rows that show the same image stay in one split.

Several rows can show one image: a pair and its way back, turns of an edit, several instructions.
If training saw one of them, the others would be no fair test. So rows form a group if they share
an image (the same bytes, as input or edited) or a `Row.group`, directly or through other rows.
Whole groups are held out, the last ones that fit into the share. The choice depends only on the
rows and their order.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ip2p_jax.data.rows import LatentRow, Source
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress, unwatched

CHUNK = 64  # neighbouring rows that a thread reads at a time


class HeldOut(NamedTuple):
  """Rows of 'train' that become 'validation'.

  Attributes:
    share: requested share of the rows.
    ranges: the rows as [start, stop), ascending, so that a plan of millions of rows stays short.
  """

  share: float
  ranges: list[list[int]]

  def rows(self) -> np.ndarray:
    """int64 [H], ascending."""
    parts = [np.arange(start, stop) for start, stop in self.ranges]
    return np.concatenate(parts).astype(np.int64)


class Picked:
  """Some rows of a source, in the order given."""

  def __init__(self, source: Source, rows: np.ndarray):
    self._source, self._rows = source, rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int):
    return self._source[int(self._rows[i])]


def hold_out(source: Source, share: float, progress: Progress = unwatched) -> HeldOut:
  """Chooses about `share` of the rows, in whole groups. Reads every row once.

  Never more than the share, unless the smallest group is larger. Then it chooses that group.

  Raises InputError if all rows belong to one group.
  """
  group = groups(_keys(source, progress))
  first, sizes = np.unique(group, return_counts=True)
  if len(first) < 2:
    raise InputError(
      f'holdout is {share}, and all {len(source)} rows belong together, since they share images'
      ' with one another; leave it out.'
    )
  room = max(int(round(len(source) * share, 6)), 1)  # 100 * 0.29 is 28.999999999999996
  chosen = []
  for number in range(len(first) - 1, -1, -1):
    if sizes[number] <= room:
      chosen.append(first[number])
      room -= sizes[number]
  if not chosen:
    chosen = [first[len(sizes) - 1 - np.argmin(sizes[::-1])]]
  return HeldOut(share, _ranges(np.flatnonzero(np.isin(group, chosen))))


def split(source: Source, held: HeldOut) -> tuple[Picked, Picked]:
  """(rows for training, rows held out), each in the source's order."""
  rows = held.rows()
  return Picked(source, np.delete(np.arange(len(source)), rows)), Picked(source, rows)


def groups(keys: Iterable[Sequence[Hashable]]) -> np.ndarray:
  """The first row of each row's group, int64 [N]. Rows with a common key are in one group."""
  parent, seen = [], {}

  def root(i):
    while parent[i] != i:
      parent[i] = i = parent[parent[i]]
    return i

  for i, row_keys in enumerate(keys):
    parent.append(i)
    for key in row_keys:
      roots = root(seen.setdefault(key, i)), root(i)
      parent[max(roots)] = min(roots)
  return np.array([root(i) for i in range(len(parent))], np.int64)


def _keys(source, progress) -> list[list[int]]:
  """The keys of each row; none for a broken row, which is in no split."""
  chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
  keys = []
  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
    for chunk in pool.map(lambda rows: [_keys_of(source, i) for i in rows], chunks):
      keys += chunk
      progress(len(keys), len(source))
  return keys


def _keys_of(source, i) -> list[int]:
  try:
    row = source[i]
  except InputError:
    return []
  if isinstance(row, LatentRow):  # latents cannot be packed again; `pack_plan.sample` refuses them
    return []
  images = {image for pair in row.pairs for image in pair if image is not None}
  return [_digest(b'picture', image) for image in images] + (
    [_digest(b'group', row.group.encode('utf-8', 'surrogatepass'))] if row.group else []
  )


def _digest(kind, content) -> int:
  return int.from_bytes(hashlib.blake2b(content, digest_size=8, person=kind).digest())


def _ranges(rows) -> list[list[int]]:
  """Runs of ascending numbers as [start, stop)."""
  runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
  return [[int(run[0]), int(run[-1]) + 1] for run in runs]
