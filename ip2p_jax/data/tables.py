"""Tables of examples: metadata files beside pictures, and Parquet files.

A reader gives rows as dicts: `names` of the columns, `len(reader)`, and
`reader.read(i, columns) -> (name for people, folders that pictures are relative to, values)`.
"""

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

from ip2p_jax.data import columns
from ip2p_jax.data.rows import Row
from ip2p_jax.errors import InputError

BATCH_ROWS = 16  # decoded at a time; a row group can be a gigabyte of pictures
FIRST_ROWS = 100  # that say which keys a JSON lines file has


class Table:
  """A source of the rows of a reader; twice as many where there are inverse instructions.

  Then row 2n is the n-th edit and row 2n + 1 the way back.
  """

  def __init__(self, reader: 'JsonLines | Csv | Parquet', found: columns.Columns):
    self._reader, self._columns = reader, found
    self._ways = 2 if found.inverse else 1

  def __len__(self) -> int:
    return len(self._reader) * self._ways

  def __getitem__(self, i: int) -> Row:
    number, inverse = divmod(int(i), self._ways)
    wanted = sorted({column for column in self._columns if column})
    name, folders, values = self._reader.read(number, wanted)
    picture = functools.partial(_picture, name, folders)
    return columns.to_row(name, values, self._columns, picture, bool(inverse))


class JsonLines:
  """A file of one JSON object per line, read line by line when asked."""

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

  def read(self, i: int, wanted: Sequence[str]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    del wanted  # a line is read whole
    name = f'{self._path}: line {self._numbers[i]}'
    with _reading(name), open(self._path, 'rb') as file:
      file.seek(self._starts[i])
      values = json.loads(file.readline())
    if not isinstance(values, dict):
      raise InputError(f'{name}: is not an object, {{"key": "value", ...}}; mend it or take it out')
    return name, (os.path.dirname(self._path),), values

  def _keys(self):
    keys, first_error = {}, None
    for i in range(min(len(self), FIRST_ROWS)):
      try:
        keys |= self.read(i, ())[2]
      except InputError as error:  # for whoever reads this row
        first_error = first_error or error
    if first_error and not keys:
      raise first_error
    return list(keys)


class Csv:
  """A CSV file with a header, read into memory: cells may hold line breaks."""

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

  def read(self, i: int, wanted: Sequence[str]) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    del wanted
    line, row = self._rows[i]
    name = f'{self._path}: line {line}'
    if len(row) != len(self.names):
      raise InputError(f'{name}: has {len(row)} cells for {len(self.names)} columns; quote commas')
    return name, (os.path.dirname(self._path),), dict(zip(self.names, row, strict=True))


class Parquet:
  """Parquet files as one table, memory-mapped, a few rows in memory at a time.

  Rows in order cost little. A row by random access costs half its row group on average, since
  Parquet cannot be entered in the middle of one: pack a data set that is trained on for long.
  Each thread has its own open file and place in it.
  """

  def __init__(self, files: Sequence[str], root: str):
    self._root = root
    self._groups, starts, self.names = [], [0], []  # (file, row group, rows of the file before)
    for path in files:
      with _reading(path), parquet.ParquetFile(path, memory_map=True) as file:
        metadata, names = file.metadata, file.schema_arrow.names
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
  """An open row group, and the batch of it that was decoded last."""

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
  """What fails in here becomes an InputError that names the place."""
  try:
    yield
  except InputError:
    raise
  except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(f'{name}: cannot be read ({reason}); it may be damaged') from error


def _picture(name, folders, value, column):
  """The encoded picture of a cell: bytes, a path, or Hugging Face's {'bytes', 'path'}."""
  if isinstance(value, dict):
    value = value.get('bytes') or value.get('path')
  if isinstance(value, bytes) and value:
    return value
  if not isinstance(value, str) or not value.strip():
    raise InputError(f'{name}: {column!r} holds no picture; take the row out')
  paths = [Path(folder, value) for folder in folders]
  try:
    return next((path for path in paths if path.is_file()), paths[0]).read_bytes()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(f'{name}: cannot read the picture {paths[0]} ({reason})') from error
