"""Tables of examples: metadata files beside images, and Parquet files.

A reader gives rows as dicts. It has `names` of its columns, their `kinds()`, `len(reader)`, and
`reader.read(i, columns) -> (name for messages, folders that image paths start from, values)`.
"""

import collections
import contextlib
import csv
import functools
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from ip2p_jax import images
from ip2p_jax.data import columns
from ip2p_jax.data.rows import Row
from ip2p_jax.errors import InputError

BATCH_ROWS = 16  # decoded at a time; a row group can be a gigabyte of images
FIRST_ROWS = 100  # rows whose keys become the columns of a JSON lines file
LOOK_ROWS = 20  # rows whose values decide what a column holds


class Table:
  """A source of the rows of a reader.

  With inverse instructions it has twice as many rows: row 2n is the n-th edit and row 2n + 1 the
  way back.
  """

  def __init__(self, reader: 'JsonLines | Csv | Parquet', roles: columns.Columns):
    self._reader, self._columns = reader, roles
    self._ways = 2 if roles.inverse else 1
    self.names = reader.names

  def __len__(self) -> int:
    return len(self._reader) * self._ways

  def __getitem__(self, i: int) -> Row:
    number, inverse = divmod(int(i), self._ways)
    wanted = sorted({column for column in self._columns if column})
    name, folders, values = self._reader.read(number, wanted)
    read_image = functools.partial(encoded_image, name, folders)
    return columns.to_row(name, values, self._columns, read_image, bool(inverse))


class JsonLines:
  """A file of one JSON object per line. A line is read when its row is asked for."""

  def __init__(self, path: str):
    self._path = path
    numbers, starts, position = [], [], 0
    with _reading(path), open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          numbers.append(number)
          starts.append(position)
        position += len(line)
    self._numbers, self._starts = np.array(numbers, np.int64), np.array(starts, np.int64)
    self.names = self._keys()

  def __len__(self) -> int:
    return len(self._starts)

  def kinds(self) -> dict[str, str]:
    return _kinds(self, self.names)

  def read(self, i: int, wanted: Sequence[str]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    del wanted  # a line is read whole
    name = f'{self._path}: line {self._numbers[i]}'
    with _reading(name), open(self._path, 'rb') as file:
      file.seek(self._starts[i])
      values = json.loads(file.readline())
    if not isinstance(values, dict):
      raise InputError(f'{name}: is not an object, {{"key": "value", ...}}; fix it or remove it')
    return name, (os.path.dirname(self._path),), values

  def _keys(self):
    keys, first_error = {}, None
    for i in range(min(len(self), FIRST_ROWS)):
      try:
        keys |= self.read(i, ())[2]
      except InputError as error:  # reading this row raises it again
        first_error = first_error or error
    if first_error and not keys:
      raise first_error
    return list(keys)


class Csv:
  """A CSV file with a header, read into memory, since cells may hold line breaks."""

  def __init__(self, path: str):
    self._path = path
    with _reading(path), open(path, encoding='utf-8-sig', newline='') as file:
      reader = csv.reader(file, strict=True)
      self.names = next(reader, [])
      self._rows = [(reader.line_num, row) for row in reader if row]
    for name in self.names:
      if self.names.count(name) > 1:
        raise InputError(f'{path}: has two columns {name!r}; rename one')

  def __len__(self) -> int:
    return len(self._rows)

  def kinds(self) -> dict[str, str]:
    return _kinds(self, self.names)

  def read(self, i: int, wanted: Sequence[str]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    del wanted
    line, row = self._rows[i]
    name = f'{self._path}: line {line}'
    if len(row) != len(self.names):
      raise InputError(f'{name}: has {len(row)} cells for {len(self.names)} columns; quote commas')
    return name, (os.path.dirname(self._path),), dict(zip(self.names, row, strict=True))


class Parquet:
  """Parquet files as one table, memory-mapped, with a few rows in memory at a time.

  Reading rows in order costs little. Random access reads half a row group on average, since
  Parquet cannot start in the middle of one. So pack a data set for long training.
  Each thread has its own open file and place in it.
  """

  def __init__(self, files: Sequence[str], root: str):
    self._root = root
    self._groups, starts, self.names = [], [0], []  # (file, row group, rows before it in the file)
    self._types = {}
    for path in files:
      with _reading(path), parquet.ParquetFile(path, memory_map=True) as file:
        metadata, names = file.metadata, file.schema_arrow.names
        self._types = self._types or {field.name: field.type for field in file.schema_arrow}
      if self._groups and set(names) != set(self.names):
        raise InputError(
          f'{path}: has columns {", ".join(names)}, and {self._groups[0][0]} has '
          f'{", ".join(self.names)}; open them as two data sets'
        )
      self.names, before = names, 0
      for group in range(metadata.num_row_groups):
        self._groups.append((path, group, before))
        before += metadata.row_group(group).num_rows
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    self._starts = np.array(starts, np.int64)
    self._local = threading.local()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def kinds(self) -> dict[str, str]:
    """Kinds by type. The first values decide whether strings are text or names of files."""
    kinds = {name: _kind_of_type(kind) for name, kind in self._types.items()}
    strings = [name for name in self.names if kinds[name] == 'string']
    return kinds | dict.fromkeys(strings, '') | _kinds(self, strings)

  def __getstate__(self):
    return {name: value for name, value in vars(self).items() if name != '_local'}

  def __setstate__(self, state):
    vars(self).update(state, _local=threading.local())

  def read(self, i: int, wanted: Sequence[str]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    group = int(np.searchsorted(self._starts, i, 'right')) - 1
    path, number, before = self._groups[group]
    offset = i - int(self._starts[group])
    name = f'{path}: row {before + offset}'
    with _reading(name):
      place = getattr(self._local, 'place', None)
      if place is None or place.key != (path, number, wanted) or offset < place.first:
        place = self._local.place = _Place(path, number, wanted)
      values = place.row(offset)
    return name, (os.path.dirname(path), self._root), values


class _Place:
  """An open row group, and its batch that was decoded last."""

  def __init__(self, path, group, wanted):
    self.key = path, group, wanted
    self._file = parquet.ParquetFile(path, memory_map=True)
    self._batches = self._file.iter_batches(
      BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False
    )
    self.first, self._batch = 0, next(self._batches)

  def row(self, offset):
    while offset >= self.first + self._batch.num_rows:
      self.first += self._batch.num_rows
      self._batch = next(self._batches)
    return self._batch.slice(offset - self.first, 1).to_pylist()[0]


@contextlib.contextmanager
def _reading(name):
  """Turns an error of reading into an InputError that names the place."""
  try:
    yield
  except InputError:
    raise
  except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(f'{name}: cannot be read ({reason}); it may be damaged') from error


def _kind_of_type(kind) -> str:
  """What a Parquet column holds; 'string' if only its values can decide; '' for nothing."""
  types = pyarrow.types
  if types.is_dictionary(kind):
    return _kind_of_type(kind.value_type)
  if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
    inner = _kind_of_type(kind.value_type)
    return inner if inner in ('', 'string') else f'lists ({inner})'
  if types.is_struct(kind):
    is_image = {'bytes', 'path'} & {field.name for field in kind}
    return 'image' if is_image else 'structures'
  if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
    return 'string'
  if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
    return 'image'
  return '' if types.is_null(kind) else 'numbers'


def _kinds(reader, names) -> dict[str, str]:
  """What columns hold, by the majority of their first values. Leaves out empty columns."""
  votes = {name: collections.Counter() for name in names}
  for i in range(min(len(reader), LOOK_ROWS) if names else 0):
    with contextlib.suppress(InputError):  # reading a broken row raises it again
      _, folders, values = reader.read(i, names)
      for name in names:
        votes[name].update(filter(None, [_kind_of_value(values.get(name), folders)]))
  return {name: count.most_common(1)[0][0] for name, count in votes.items() if count}


def _kind_of_value(value, folders) -> str:
  if isinstance(value, dict):
    return 'image' if {'bytes', 'path'} & set(value) else 'structures'
  if isinstance(value, list | tuple):
    inner = next(filter(None, (_kind_of_value(item, folders) for item in value)), '')
    return inner if inner in ('', 'text') else f'lists ({inner})'
  if isinstance(value, bytes):
    return 'image'
  if not isinstance(value, str):
    return '' if value is None else 'numbers'
  if not value.strip():
    return ''
  if value.startswith(('http://', 'https://')):
    return 'web addresses'
  is_named = Path(value).suffix.lower() in images.READ_EXTENSIONS
  return 'image' if is_named or _file(folders, value) else 'text'


def _file(folders, name) -> Path | None:
  """The file of that name in the first folder that has it."""
  with contextlib.suppress(OSError, ValueError):  # a name that is too long, or has a NUL
    return next((path for folder in folders if (path := Path(folder, name)).is_file()), None)


def encoded_image(name: str, folders: Sequence[str], value: Any, column: str) -> bytes:
  """The encoded image of a cell: bytes, a path, or Hugging Face's {'bytes', 'path'}.

  `name` and `folders` are as a reader gives them. Raises InputError if there is no image.
  """
  if isinstance(value, dict):
    value = value.get('bytes') or value.get('path')
  if isinstance(value, bytes) and value:
    return value
  if not isinstance(value, str) or not value.strip():
    raise InputError(f'{name}: {column!r} holds no image; take the row out')
  path = _file(folders, value) or Path(folders[0], value)
  try:
    return path.read_bytes()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(f'{name}: cannot read the image {path} ({reason})') from error
