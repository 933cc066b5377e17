"""Opens data sets on disk as sequences of rows, and recognises their layout.

  packed shards                        written by `ip2p pack`
  folders of the original code         see original.py
  metadata.jsonl, metadata.csv         rows with names of image files, relative to it
  *.parquet                            one file, or a folder of them, at most two levels deep

Splits are 'train', 'validation' and 'test'. Packed shards have splits, and so do folders of the
original code (by position), and files or folders named after a split
(`validation-00000-of-00002.parquet`, `val/metadata.jsonl`). Everything else is 'train'; so is a
single file, and everything that `ip2p filter` wrote.
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
  path: str, split: str = 'train', columns: str = '', task: str = 'edit', all_train: bool = False
) -> Source:
  """A split of a data set, as a sequence of rows that can be pickled.

  Args:
    path: the data set; see the head of this file.
    split: 'train', 'validation' or 'test'; a split that the data set lacks is empty.
    columns: unusual column names of metadata and Parquet files: 'input=before,edited=after,
      instruction=text' (for text-to-image 'image=...,text=...').
    task: 'edit' or 'text_to_image'. Rows of text-to-image have captions as instructions and no
      input image; from a data set of edits these are the edited images and their captions.
    all_train: makes all folders of the original code 'train', for a caller that makes the splits.

  Raises:
    InputError: at once for a path, a column or a file; for a broken row when it is read.
  """
  path = os.path.expanduser(path)
  for value, allowed, name in ((split, SPLITS, 'split'), (task, TASKS, 'task')):
    if value not in allowed:
      raise InputError(f'the {name} {value!r} is unknown; use {", ".join(allowed)}')
  kind = _kind(path)
  if kind is None:
    _refuse(path)
  source = _open(kind, path, split, columns, task, all_train)
  if not len(source) and not any(
    len(_open(kind, path, name, columns, task, all_train)) for name in SPLITS if name != split
  ):
    raise InputError(f'{path}: the data set is empty; check that it was copied completely')
  return source


def open_table(path: str, split: str) -> tables.JsonLines | tables.Csv | tables.Parquet | None:
  """The reader of metadata or Parquet files, whatever their columns; None without a row.

  A single file is every split. Raises InputError if there are no such files.
  """
  kind = _kind(path)
  if kind not in ('metadata', 'parquet'):
    raise InputError(f'{path}: has no {" or ".join(METADATA)} and no *.parquet; give its folder')
  return _reader(kind, path, 'train' if os.path.isfile(path) else split)


def open_splits(
  path: str, columns: str = '', task: str = 'edit', holdout: float | None = None
) -> dict[str, Source]:
  """All splits of a data set, for a pack with this `holdout`; None keeps the splits as they are.

  Arguments and errors are as in `open_source`. Also raises InputError if there is a `holdout` and
  the data set has a validation split, or if no split has one of the `columns`.
  """
  opened = {split: open_source(path, split, columns, task, holdout is not None) for split in SPLITS}
  check_columns(columns, opened.values(), path)
  if holdout and len(opened['validation']):
    raise InputError(
      f'{path}: has {len(opened["validation"])} rows for validation already; leave --holdout out,'
      ' or give only the training files'
    )
  return opened


def check_columns(columns: str, opened: Iterable[Source], path: str) -> None:
  """Raises InputError if no opened source has one of the `columns`."""
  choices = [name for item in columns.split(',') if (name := item.partition('=')[2].strip())]
  headers = [source.names for source in opened if isinstance(source, tables.Table)]
  if columns.strip() and not headers:
    raise InputError(
      f'{path}: has no columns to choose from (its layout is fixed); leave columns out'
    )
  for name in choices:
    if not any(name in names for names in headers):
      raise InputError(
        f'{path}: there is no column {name!r}; the columns are {", ".join(headers[0])}'
      )


def mixture(path: str) -> list[tuple[str, float]]:
  """Paths and weights of 'a=3,b=1', or of 'a,b' with equal weights, or of 'a'.

  The text after an item's last '=' must be a number above 0.
  """
  if os.path.exists(os.path.expanduser(path)):  # its name may hold , and =
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
    raise InputError(f'{path}: is the folder of one prompt; give the folder that holds it')
  raise InputError(f'{path}: no data set was recognised; looked for {LOOKED_FOR}')


def _open(kind, path, split, columns, task, all_train):
  if kind == 'shards':
    return _packed(path, split, task)
  if kind == 'original':
    return original.open_original(path, split, task, all_train)
  reader = _reader(kind, path, split)
  if not reader:
    return []
  return tables.Table(reader, find(reader.names, columns, task, path, reader.kinds()))


def _reader(kind, path, split):
  """The reader of the tables of a split; None if it has no row."""
  if kind == 'parquet':
    reader = tables.Parquet(_parquets(path, split), path)
  else:
    file = _metadata(path, split) or ''
    read = tables.Csv if file.lower().endswith('.csv') else tables.JsonLines
    reader = read(file) if file else ()
  return reader if len(reader) else None


def _metadata(path, split):
  """The metadata file of a split, or None."""
  if os.path.isfile(path):
    return path if split == 'train' else None
  folders = [path] if split == 'train' else []
  folders += [os.path.join(path, name) for name in sorted(os.listdir(path))
              if SPLIT_NAMES.fullmatch(name) and _split_of(name) == split]  # fmt: skip
  files = (os.path.join(folder, name) for folder in folders for name in METADATA)
  return next(filter(os.path.isfile, files), None)


def _parquets(path, split):
  """The Parquet files of a split, sorted, at most two folders deep, without hidden folders."""
  if os.path.isfile(path):
    return [path] if split == 'train' else []
  depths = ('*.parquet', '*/*.parquet', '*/*/*.parquet')
  names = sorted(name for depth in depths for name in glob.glob(depth, root_dir=path))
  return [os.path.join(path, name) for name in names if _split_of(name) == split]


def _split_of(name):
  """The split in the name of a file or its folder: 'data/dev-00000.parquet'."""
  for part in reversed(os.path.normpath(name).split(os.sep)):
    match = SPLIT_NAMES.match(part)
    if match:
      word = match[1].lower()
      return word if word in SPLITS else 'validation'
  return 'train'  # also UltraEdit's FreeForm


def _packed(path, split, task):
  source, description = shards.open_shards(path, split), shards.describe(path)
  has_input = description['settings']['has_input']
  if task == 'edit' and not has_input:
    raise InputError(f'{path}: was packed for text-to-image and has no input images; pack again')
  if task == 'edit' or not has_input:
    return source
  if description['kind'] == 'latents':
    raise InputError(f'{path}: holds latents of edits and no captions; pack for text-to-image')
  return _Captioned(source)


class _Captioned:
  """Edited images and their captions, from a source of edits."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    row = self._source[i]
    if not row.edited_caption:
      raise InputError(f'{row.name}: has no caption of the edited image; take the row out')
    return Row(
      row.name,
      (row.edited_caption,),
      tuple(Pair(None, pair.edited_image) for pair in row.pairs),
      may_flip(row.edited_caption),
      edited_caption=row.edited_caption,
    )
