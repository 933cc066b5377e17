"""Data sets on disk, recognised by looking, as sequences of rows.

  packed shards                        what `ip2p pack` writes
  the original's folders               see original.py
  metadata.jsonl, metadata.csv         rows with names of picture files, relative to it
  *.parquet                            one file, or a folder of them, at most two levels deep

Splits are 'train', 'validation' and 'test'. Packed shards, the original's folders (by position),
and files or folders that are named after a split (`validation-00000-of-00002.parquet`,
`val/metadata.jsonl`) have them; the rest is 'train', and so is a file that is given by itself, and
all that `ip2p filter` wrote.
"""

import glob
import math
import os
import re
from collections.abc import Iterable

from ip2p_jax.data import original, shards, tables
from ip2p_jax.data.columns import find, may_flip
from ip2p_jax.data.rows import SPLITS, Pair, Row, Source
from ip2p_jax.errors import InputError

TASKS = ('edit', 'text_to_image')
METADATA = ('metadata.jsonl', 'metadata.csv')
LOOKED_FOR = (
  'packed shards, seeds.json or folders with prompt.json, metadata.jsonl or metadata.csv, *.parquet'
)
SPLIT_NAMES = re.compile(r'(train|validation|valid|val|dev|test)(?![a-z])', re.IGNORECASE)


def open_source(
  path: str, split: str = 'train', columns: str = '', task: str = 'edit', whole: bool = False
) -> Source:
  """A split of a data set, as a sequence of rows that can be pickled.

  Args:
    path: of the data set; see the head of this file.
    split: 'train', 'validation' or 'test'; one that the data set does not have is empty.
    columns: of metadata and Parquet files, where their names are unusual: 'input=before,
      edited=after,instruction=text' (for text-to-image 'image=...,text=...').
    task: 'edit', or 'text_to_image', whose rows have captions as instructions and no input
      picture; of an edit data set these are the edited pictures and their captions.
    whole: whether the original's folders are all 'train', because the caller makes the splits.

  Raises:
    InputError: at once for a path, a column or a file as a whole; for a row when that is asked for.
  """
  path = os.path.expanduser(path)
  for value, known, what in ((split, SPLITS, 'split'), (task, TASKS, 'task')):
    if value not in known:
      raise InputError(f'the {what} {value!r} is unknown; use {", ".join(known)}')
  kind = _kind(path)
  if kind is None:
    _refuse(path)
  source = _open(kind, path, split, columns, task, whole)
  if not len(source) and not any(
    len(_open(kind, path, other, columns, task, whole)) for other in SPLITS if other != split
  ):
    raise InputError(f'{path}: the data set is empty; check that it was copied whole')
  return source


def open_splits(
  path: str, columns: str = '', task: str = 'edit', holdout: float | None = None
) -> dict[str, Source]:
  """All splits of a data set, to be packed with this `holdout`; None leaves them as they are.

  Arguments and errors are those of `open_source`; besides, InputError for a `holdout` of a data set
  that has a validation split of its own, and for `columns` that none has.
  """
  opened = {split: open_source(path, split, columns, task, holdout is not None) for split in SPLITS}
  check_columns(columns, opened.values(), path)
  if holdout and len(opened['validation']):
    raise InputError(
      f'{path}: has {len(opened["validation"])} rows for validation already; leave --holdout out,'
      ' or give the training files alone'
    )
  return opened


def check_columns(columns: str, opened: Iterable[Source], path: str) -> None:
  """Raises InputError if `columns` names something that none of the opened sources has."""
  named = [name for item in columns.split(',') if (name := item.partition('=')[2].strip())]
  found = [source.names for source in opened if isinstance(source, tables.Table)]
  if columns.strip() and not found:
    raise InputError(
      f'{path}: has no columns to choose from (its layout says what is what); leave columns out'
    )
  for name in named:
    if not any(name in names for names in found):
      raise InputError(
        f'{path}: there is no column {name!r}; the columns are {", ".join(found[0])}'
      )


def mixture(path: str) -> list[tuple[str, float]]:
  """Paths and weights of 'a=3,b=1', or of 'a,b' with equal weights, or of 'a'.

  What follows an item's last '=' must be a number above 0.
  """
  if os.path.exists(os.path.expanduser(path)):  # whatever characters are in its name
    return [(os.path.expanduser(path), 1.0)]
  parts = []
  for item in (item.strip() for item in path.split(',')):
    name, equals, number = item.rpartition('=')
    name, number = (name.strip(), number) if equals else (item, '1')
    try:
      weight = float(number)
    except ValueError:
      raise InputError(
        f'data.path: {number!r} in {item!r} is not a weight; write PATH=NUMBER, and {item}=1 if '
        'the path itself holds a ='
      ) from None
    if not name or not 0 < weight < math.inf:
      problem = 'has no path' if not name else 'needs a weight above 0'
      raise InputError(f'data.path: {item!r} in {path!r} {problem}; write PATH=NUMBER,PATH=NUMBER')
    parts.append((os.path.expanduser(name), weight))
  return parts


def _kind(path):
  if shards.is_shards(path):
    return 'shards'
  if os.path.isfile(path):
    extension = os.path.splitext(path)[1].lower()
    return {'.parquet': 'parquet', '.jsonl': 'metadata', '.csv': 'metadata'}.get(extension)
  if not os.path.isdir(path) or os.path.isfile(os.path.join(path, 'prompt.json')):
    return None
  if original.looks_original(path):
    return 'original'
  if any(_metadata(path, split) for split in SPLITS):
    return 'metadata'
  return 'parquet' if any(_parquets(path, split) for split in SPLITS) else None


def _refuse(path):
  if not os.path.exists(path):
    raise InputError(f'{path}: no such data set; give a folder or file on this machine')
  if os.path.isfile(os.path.join(path, 'prompt.json')):
    raise InputError(f'{path}: is the folder of one prompt; give the folder it lies in')
  raise InputError(f'{path}: no data set was recognised; looked for {LOOKED_FOR}')


def _open(kind, path, split, columns, task, whole):
  if kind == 'shards':
    return _packed(path, split, task)
  if kind == 'original':
    return original.open_original(path, split, task, whole)
  if kind == 'metadata':
    file = _metadata(path, split)
    if not file:
      return []
    reader = tables.Csv(file) if file.lower().endswith('.csv') else tables.JsonLines(file)
  else:
    reader = tables.Parquet(_parquets(path, split), path)
  if not len(reader):
    return []
  return tables.Table(reader, find(reader.names, columns, task, path, reader.kinds()))


def _metadata(path, split):
  """The metadata file of a split, None if there is none."""
  if os.path.isfile(path):
    return path if split == 'train' else None
  folders = [path] if split == 'train' else []
  folders += [os.path.join(path, name) for name in sorted(os.listdir(path))
              if SPLIT_NAMES.fullmatch(name) and _split_of(name) == split]  # fmt: skip
  files = (os.path.join(folder, name) for folder in folders for name in METADATA)
  return next(filter(os.path.isfile, files), None)


def _parquets(path, split):
  """The Parquet files of a split, sorted, at most two folders deep; hidden folders are left out."""
  if os.path.isfile(path):
    return [path] if split == 'train' else []
  depths = ('*.parquet', '*/*.parquet', '*/*/*.parquet')
  names = sorted(name for depth in depths for name in glob.glob(depth, root_dir=path))
  return [os.path.join(path, name) for name in names if _split_of(name) == split]


def _split_of(name):
  """The split that a file is named after, or else its folder: 'data/dev-00000.parquet'."""
  for part in reversed(os.path.normpath(name).split(os.sep)):
    found = SPLIT_NAMES.match(part)
    if found:
      word = found[1].lower()
      return word if word in SPLITS else 'validation'
  return 'train'  # and UltraEdit's FreeForm


def _packed(path, split, task):
  source, about = shards.open_shards(path, split), shards.describe(path)
  has_input = about['settings']['has_input']
  if task == 'edit' and not has_input:
    raise InputError(f'{path}: was packed for text-to-image and has no input pictures; pack again')
  if task == 'edit' or not has_input:
    return source
  if about['kind'] == 'latents':
    raise InputError(f'{path}: holds latents of edits and no captions; pack for text-to-image')
  return _Captioned(source)


class _Captioned:
  """Edited pictures and their captions, from a source of edits."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    row = self._source[i]
    if not row.edited_caption:
      raise InputError(f'{row.name}: has no caption of the edited picture; take the row out')
    return Row(
      row.name,
      (row.edited_caption,),
      tuple(Pair(None, pair.edited_image) for pair in row.pairs),
      may_flip(row.edited_caption),
      edited_caption=row.edited_caption,
    )
