"""Reads the captions to write edits for from tables and text files."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import fits, plain
from ip2p_jax.data.columns import ALIASES
from ip2p_jax.errors import InputError

COLUMNS = (*ALIASES['caption'], *ALIASES['text'])  # groups; LAION's 'TEXT' is among them
LINES = ('', '.txt')  # suffixes of files with a caption per line


class Caption(NamedTuple):
  row: int  # of its file, from 0
  text: str
  url: str = ''


class Captions(NamedTuple):
  """The captions to write edits for, and the numbers of those left out."""

  kept: list[Caption]
  left_out: dict[str, int]  # by reason: 'empty', 'duplicate', 'long', 'garbled', ...


def read_captions(path: Path, column: str = '') -> Captions:
  """Captions of a .jsonl, .csv or .parquet file, a folder of .parquet, or a text, one per line.

  Only the first of the captions with one URL is kept, and of those that differ only in case, white
  space and punctuation at the end. InputError for a file or row that cannot be read.
  """
  left_out, kept, seen = collections.Counter(), [], set()
  for row, (text, url) in enumerate(_texts(path, column)):
    text = ' '.join(text.split())
    keys = {plain(text)} | ({f'url {url}'} if url else set())
    if not text:
      left_out['empty'] += 1
    elif keys & seen:
      left_out['duplicate'] += 1
    elif triplets.mark_in(text):
      left_out['like a mark of the formats'] += 1
    elif triplets.is_garbled(text):
      left_out['garbled'] += 1
    elif not fits(text):
      left_out['long'] += 1
    else:
      kept.append(Caption(row, text, url))
      seen |= keys
  if not kept:
    raise InputError(f'{path}: has no usable caption.')
  return Captions(kept, dict(left_out))


def _texts(path: Path, column: str) -> Iterator[tuple[str, str]]:
  """(caption, URL or '') of every row."""
  if path.suffix.lower() in LINES and not path.is_dir():
    if column:
      raise InputError(f'{path}: is a text file without columns; leave out --column {column}.')
    try:
      if path.exists() and not path.is_file():
        raise InputError(f'{path}: is no file.')
      content = path.read_bytes().decode('utf-8-sig')
      lines = content.removesuffix('\n').split('\n')  # no other character ends a line
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, 'strerror', None) or 'is not UTF-8'
      raise InputError(f'{path}: cannot be read as text ({reason}).') from None
    yield from ((line, '') for line in lines)
    return
  reader = triplets.open_table(path)
  name = column if column in reader.names else None if column else triplets.pick(
    reader.names, COLUMNS
  )  # fmt: skip
  if name is None:
    raise InputError(
      f'{path}: has no column {column or "caption"}; the columns are {", ".join(reader.names)};'
      ' give one with --column.'
    )
  url = triplets.pick(reader.names, (('url', 'image_url'),))
  wanted = tuple(filter(None, (name, url)))
  for i in range(len(reader)):
    values = reader.read(i, wanted)[2]
    yield triplets.text(values.get(name)), triplets.text(values.get(url))
