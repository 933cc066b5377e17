"""Plans which rows go into which file. The plan depends only on the arguments and the source.

So a run after a kill, and all machines that share the work, make the same plan.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ip2p_jax.data import holdout, shards
from ip2p_jax.data.holdout import HeldOut
from ip2p_jax.data.rows import SPLITS, LatentRow, Row, Source
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress

SHARD_BYTES = 64 << 20  # small: one shard is the work of one task, and a killed run loses it
MAX_SHARDS = 512  # per split; each is a file that stays open during training
SAMPLE = 16  # rows per split that the plan reads

Sources = Mapping[str, Source]
Samples = dict[str, list[Row | None]]


class Shard(NamedTuple):
  """One file: rows [start, stop) of a split."""

  split: str
  file: str
  start: int
  stop: int


def hold_out(
  sources: Sources,
  share: float,
  folder: str | os.PathLike,
  say: Callable[[str], None],
  progress: Progress,
) -> tuple[dict[str, Source], HeldOut | None]:
  """The sources that have rows. If there is no 'validation', takes it from 'train'.

  The second result is the rows taken, or None. A pack that was begun in `folder` has chosen them
  already, so that another machine or a second try need not read all rows.
  """
  unknown = set(sources) - set(SPLITS)
  if unknown:
    raise InputError(f'splits {sorted(unknown)} are unknown; use {", ".join(SPLITS)}.')
  if not 0 <= share < 1:
    raise InputError(f'holdout is {share}; use a share from 0 up to, but not including, 1.')
  sources = {split: sources[split] for split in SPLITS if len(sources.get(split, ()))}
  if not sources:
    raise InputError('there is nothing to pack: the source has no rows.')
  if not share or 'train' not in sources or 'validation' in sources:
    return sources, None
  train = sources['train']
  held = _planned(folder, share, len(train))
  if held is None:
    say(f'reading {len(train):,} rows once, since rows that share an image stay in one split')
    held = holdout.hold_out(train, share, progress)
  train, validation = holdout.split(train, held)
  rest = {split: source for split, source in sources.items() if split != 'train'}
  return {'train': train, 'validation': validation} | rest, held


def _planned(folder, share, rows) -> HeldOut | None:
  """The held out rows of the folder's plan, if it has the same number of rows and share."""
  if not shards.is_shards(folder):
    return None
  plan = shards.read_plan(folder)
  sizes = [plan['splits'].get(split, {}).get('rows', 0) for split in ('train', 'validation')]
  if 'holdout' not in plan or plan['holdout']['share'] != share or sum(sizes) != rows:
    return None
  return HeldOut(**plan['holdout'])


def sample(sources: Sources) -> Samples:
  """A few rows of each split, evenly spaced, None for broken rows.

  Raises InputError if the rows are latents, or all sampled rows are broken.
  """
  samples, broken = {}, []
  for split, source in sources.items():
    samples[split] = []
    for i in sorted({k * len(source) // SAMPLE for k in range(SAMPLE)}):
      try:
        row = source[i]
      except InputError as error:
        row = None
        broken.append(str(error))
      if isinstance(row, LatentRow):
        raise InputError(f'{row.name}: is packed as latents already; pack from the images.')
      samples[split].append(row)
  if not any(row for rows in samples.values() for row in rows):
    raise InputError(f'all sampled rows are broken, such as: {broken[0]}')
  return samples


def has_input(samples: Samples) -> bool:
  """Whether these are edits, not captioned images."""
  rows = [row for rows in samples.values() for row in rows if row]
  return any(pair.input_image is not None for row in rows for pair in row.pairs)


def check_row(row: Row, has_input: bool) -> None:
  """Raises InputError if the row lacks something that all rows of its data set have."""
  if not row.instructions or not row.pairs:
    raise InputError(f'{row.name}: has no {"image" if row.instructions else "instruction"}.')
  if any((pair.input_image is not None) != has_input for pair in row.pairs):
    problem = 'lacks its input image' if has_input else 'has an input image, but others have none'
    raise InputError(f'{row.name}: {problem}.')
  try:
    ''.join((row.name, row.caption, row.edited_caption, row.group, *row.instructions)).encode()
  except UnicodeEncodeError as error:
    raise InputError(f'{row.name}: holds text that is not Unicode ({error.reason}).') from None


def make_plan(
  kind: str,
  settings: dict[str, Any],
  sources: Sources,
  samples: Samples,
  size_of: Callable[[Row], int],
  shard_bytes: int,
  held: HeldOut | None = None,
) -> dict:
  """The plan, as in `pack.json`.

  Args:
    kind: 'images' or 'latents'.
    settings: JSON values; everything that the bytes of a record depend on.
    sources, samples: from `hold_out` and `sample`.
    size_of: bytes of a row in the file; raises InputError if the row is broken.
    shard_bytes: approximate size of a file.
    held: the rows that `hold_out` took from 'train'.
  """
  if shard_bytes < 1:
    raise InputError(f'shard_bytes is {shard_bytes}; use at least 1.')
  splits = {}
  for split, source in sources.items():
    sizes, hashes = [], []
    for row in samples[split]:
      size = None
      if row:
        with contextlib.suppress(InputError):  # packing reports and counts it later
          size = size_of(row)
      hashes.append(None if size is None else _hash(row))
      sizes += [] if size is None else [size]
    count = math.ceil(sum(sizes) / max(len(sizes), 1) * len(source) / shard_bytes)
    count = max(1, min(count, MAX_SHARDS, len(source)))
    splits[split] = {'rows': len(source), 'shards': count, 'sample': hashes}
  plan = {'format': shards.FORMAT, 'kind': kind, 'settings': settings, 'splits': splits}
  return plan | ({'holdout': held._asdict()} if held else {})


def differences(old: dict, new: dict) -> list[str]:
  """Why a pack begun with the old plan cannot continue with the new one; [] if it can.

  The numbers of shards may differ, and rows that were broken may be mended.
  """

  def settings(plan):
    share = plan.get('holdout', {}).get('share', 0)
    return {'kind': plan['kind'], 'holdout': share} | plan['settings']

  def rows(plan):
    return {split: sizes['rows'] for split, sizes in plan['splits'].items()}

  before, after = settings(old), settings(new)
  lines = [
    f'{key} was {_shown(before.get(key))} and is {_shown(after.get(key))} now'
    for key in sorted({*before, *after})
    if before.get(key) != after.get(key)
  ]
  before, after = rows(old), rows(new)
  lines += [
    f'{split} had {before.get(split, 0):,} rows and has {after.get(split, 0):,} now'
    for split in SPLITS
    if before.get(split, 0) != after.get(split, 0)
  ]
  if lines:
    return lines
  pairs = [
    zip(sizes['sample'], new['splits'][split]['sample'], strict=True)
    for split, sizes in old['splits'].items()
  ]
  if any(a != b for hashes in pairs for a, b in hashes if a and b):
    lines = ['some rows are not the same now']
  return lines


def _shown(value) -> str:
  return 'none' if value is None else str(value)


def shards_of(plan: dict) -> list[Shard]:
  """All files of the data set, split by split."""
  result = []
  for split, sizes in plan['splits'].items():
    rows, count = sizes['rows'], sizes['shards']
    for k in range(count):
      file = shards.file_name(split, k, count)
      result.append(Shard(split, file, rows * k // count, rows * (k + 1) // count))
  return result


def _hash(row):
  digest = hashlib.sha256(json.dumps([*row.instructions, row.caption, row.edited_caption]).encode())
  for image in (image for pair in row.pairs for image in pair if image is not None):
    digest.update(image)
  return digest.hexdigest()[:16]


def pack_size(src: str, size: int | None, is_latents: bool) -> int:
  """The side to pack at, in pixels; 0 keeps files as they are.

  Args:
    src: the data set to pack. Packed images can be packed again, but not larger.
    size: the user's choice; None for the size of packed shards, else 256.
    is_latents: whether to make latents, which have exactly this side.
  """
  packed = _packed_size(src)
  if packed is None:
    return 256 if size is None else size
  most = largest(packed) if is_latents else packed
  if size is not None and size > most:
    raise InputError(
      f'{src}: its images were packed for {packed} px, and --size {size} would scale them up; give'
      f' --size {packed}, or pack the first data set again.'
    )
  return size or packed


def largest(size: int) -> int:
  """The largest short side, in pixels, of an image packed with `size`."""
  return size * 9 // 8


def _packed_size(src) -> int | None:
  """The size that images were packed at; None for other data and for unchanged files."""
  if not shards.is_shards(src):
    return None
  return shards.describe(src)['settings'].get('size')
