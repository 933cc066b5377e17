"""Triplets of texts that teach the caption writer: a caption, an instruction, the edited caption.

The training texts and the prompts have the formats of the original:

  prompt      a cat on a mat⏎##⏎
  completion  make it a lion⏎%%⏎a lion on a mat⏎END
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ip2p_jax import bundled
from ip2p_jax.data import tables
from ip2p_jax.data.columns import ALIASES, texts
from ip2p_jax.errors import InputError

AFTER_CAPTION, AFTER_INSTRUCTION, STOP = '\n##\n', '\n%%\n', '\nEND'
# Groups of column names by field. A group counts only if no column has a name of an earlier group.
NAMES = {
  'caption': (*ALIASES['caption'], ('original_caption', 'text')),
  'instruction': ALIASES['instruction'],
  'edited': (*ALIASES['edited_caption'], ('edited',)),
}


class Triplet(NamedTuple):
  caption: str
  instruction: str
  edited: str  # caption


def prompt(caption: str) -> str:
  return caption + AFTER_CAPTION


def completion(triplet: Triplet) -> str:
  return triplet.instruction + AFTER_INSTRUCTION + triplet.edited + STOP


def parse(completion: str) -> tuple[str, str] | None:
  """(instruction, edited caption) of a model's answer; None if it does not have these two parts."""
  completion = completion.replace('\r\n', '\n').partition(STOP)[0]
  parts = [part.strip() for part in completion.split(AFTER_INSTRUCTION)]
  return (parts[0], parts[1]) if len(parts) == 2 and all(parts) else None


def fault(triplet: Triplet) -> str | None:
  """Why the formats cannot hold a triplet, as the end of a sentence that begins with its place."""
  for name, text in by_name(triplet).items():
    if not text:
      return f'has no {name}'
    if line := mark_in(text):
      return f'has a line {line} in its {name}, which the formats reserve'
  return None


def by_name(triplet: Triplet) -> dict[str, str]:
  """{name: text}, with the names that messages use."""
  return dict(zip(('caption', 'instruction', 'edited caption'), triplet, strict=True))


def mark_in(text: str) -> str | None:
  """The line of a text that the formats would take for a mark, in words; None if there is none."""
  marks = (mark for mark in (AFTER_CAPTION, AFTER_INSTRUCTION, STOP) if mark in f'\n{text}\n')
  return next(
    (f'that begins with {mark.strip()}' if mark == STOP else repr(mark.strip()) for mark in marks),
    None,
  )


def is_garbled(text: str) -> bool:
  """Whether a text has control characters, or characters that stand for broken bytes.

  Line breaks and tabs are allowed.
  """
  characters = set(text) - {'\t', '\n', '\r'}
  return '\ufffd' in characters or any(unicodedata.category(c) == 'Cc' for c in characters)


def read(path: str | Path) -> list[Triplet]:
  """Reads every row of a .jsonl, .csv or .parquet file, or of a folder of .parquet files.

  Columns are called as in the original ('input', 'edit', 'output'), as in the files that `ip2p
  captions write` makes ('caption', 'edit', 'output'), or as in any data set that `ip2p pack` knows.
  InputError names the first row that is wrong.
  """
  table = TripletRows(path)
  rows = []
  for i in range(len(table)):
    place, triplet = table.read(i)
    if problem := fault(triplet):
      raise InputError(f'{place} {problem}; fix it or remove it.')
    rows.append(triplet)
  return rows


class TripletRows:
  """A file of triplets, which is read row by row."""

  def __init__(self, path: str | Path):
    self._reader = open_table(path)
    self._columns = []
    for field in Triplet._fields:
      column = pick(self._reader.names, NAMES[field])
      if column is None:
        what = 'edited caption' if field == 'edited' else field
        raise InputError(
          f'{path}: no column has a known name for the {what}; the columns are '
          f'{", ".join(self._reader.names)}; call them input, edit and output.'
        )
      self._columns.append(column)

  def __len__(self) -> int:
    return len(self._reader)

  def read(self, i: int) -> tuple[str, Triplet]:
    """(place like 'FILE: line 7', triplet), a missing text as ''; InputError if damaged."""
    return self._read(i, tuple(self._columns))[:2]

  def read_whole(self, i: int) -> tuple[str, Triplet, dict[str, Any]]:
    """The same as `read`, and the values of all other columns."""
    place, triplet, values = self._read(i, tuple(self._reader.names))
    others = {name: value for name, value in values.items() if name not in self._columns}
    return place, triplet, others

  def _read(self, i, wanted):
    place, _, values = self._reader.read(i, wanted)
    return place, Triplet(*(text(values.get(column)) for column in self._columns)), values


def bundled_file() -> Path:
  """The triplets that come with the package; InputError if they are missing."""
  files = [folder.parent / 'triplets.jsonl' for folder in bundled.FOLDERS]
  file = next((path for path in files if path.is_file()), None)
  if file is None:
    raise InputError('the triplets of this project are not installed; give your own (--triplets).')
  return file


def open_table(path: str | Path) -> tables.JsonLines | tables.Csv | tables.Parquet:
  """Opens a table of texts; InputError if it is no table, or has no rows."""
  path = Path(path).expanduser()
  kind = path.suffix.lower()
  if path.is_dir():
    files = sorted(map(str, path.rglob('*.parquet')))
    if not files:
      raise InputError(f'{path}: a folder without .parquet files; give a file.')
    reader = tables.Parquet(files, str(path))
  elif not path.is_file():
    raise InputError(f'{path}: no such file.')
  elif kind == '.parquet':
    reader = tables.Parquet([str(path)], str(path.parent))
  elif kind in ('.jsonl', '.csv'):
    reader = (tables.JsonLines if kind == '.jsonl' else tables.Csv)(str(path))
  else:
    raise InputError(
      f'{path}: is of unknown kind; give .jsonl, .csv or .parquet (for captions also .txt, one per'
      ' line).'
    )
  if not len(reader):
    raise InputError(f'{path}: is empty.')
  return reader


def pick(names: Sequence[str], groups: Sequence[Sequence[str]]) -> str | None:
  """The first name that is in a group; earlier groups are tried first."""
  return next((name for group in groups for name in names if name.lower() in group), None)


def text(cell: Any) -> str:
  """The first text of a cell that holds one or a list; '' if it holds none."""
  return clean(next(iter(texts(cell)), ''))


def clean(text: str) -> str:
  """Replaces lone halves of UTF-16 pairs, which JSON can hold and UTF-8 cannot."""
  return text.encode(errors='replace').decode()
