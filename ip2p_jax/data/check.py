"""Whether a data set can be trained on: every row read, every picture decoded, one line each."""

import collections
import concurrent.futures
import io
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ip2p_jax import images
from ip2p_jax.data.rows import SPLITS, LatentRow, Pair, Row, Source
from ip2p_jax.data.sources import check_columns, open_source
from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.progress import Progress, unwatched
from ip2p_jax.weights import clip_tokenizer

ASPECT = 0.05  # how far the shapes of a pair may differ
SMALL = 64  # pixels; a shorter side is worth a warning
CHUNK = 16  # neighbouring rows that a thread takes at a time
LATENTS = ('input_mean', 'edited_mean', 'edited_log_variance')
ALMOST_ALL = 0.9  # of the pairs; so many without an edit are a mistake
SHOWN = 10  # warnings of a kind that are reported one by one


class Summary(NamedTuple):
  """What was found.

  Attributes:
    splits: rows read, by split.
    rows, pairs: how many were read; a broken row counts as a row.
    broken: rows that cannot be trained on.
    warnings: how many, by kind: 'small', 'long', 'unchanged', 'colour'.
  """

  splits: dict[str, int]
  rows: int
  pairs: int
  broken: int
  warnings: dict[str, int]

  @property
  def edits_nothing(self) -> bool:
    """Whether in almost all pairs both pictures are the same, as where a column was mistaken."""
    return self.warnings.get('unchanged', 0) > ALMOST_ALL * self.pairs


class _Finding(NamedTuple):
  """Of a row: its pairs, what breaks it ('' if nothing does), and (kind, line) of warnings."""

  pairs: int
  broken: str = ''
  warnings: tuple[tuple[str, str], ...] = ()


def check(
  path: str,
  columns: str = '',
  task: str = 'edit',
  split: str | None = None,
  report: Callable[[str], None] = print,
  progress: Progress = unwatched,
  limit: int | None = None,
  workers: int | None = None,
) -> Summary:
  """Reads every row of a data set as training would, and says what is wrong with which.

  A row is broken if a file or a text is missing, a picture does not decode, or the pictures of a
  pair differ in shape by more than 5 %. Warnings: a side under 64 pixels, an instruction that does
  not fit into CLIP's 77 tokens, an edited picture that is the same as the input, to the pixel,
  colours that cannot be honoured.

  Args:
    path, columns, task: as of `sources.open_source`.
    split: one split instead of all.
    report: gets a line per broken row, 'FILE: row N: what', and per warning; of each kind of
      warning the first ten.
    progress: gets (rows done, rows in all) now and then.
    limit: the first rows of each split only.
    workers: threads; by default one per core, at most 16.

  Raises InputError if there is no such data set or split, or it cannot be opened at all.
  """
  wanted = [split] if split else SPLITS
  opened = {name: open_source(path, name, columns, task) for name in wanted}
  if split and not len(opened[split]):
    raise InputError(f'{path}: has no rows in the split {split}; leave --split out')
  check_columns(columns, opened.values(), path)
  lengths = {name: len(source) for name, source in opened.items()}
  if limit is not None:
    lengths = {name: min(length, limit) for name, length in lengths.items()}
  total, pairs, broken, kinds = sum(lengths.values()), 0, 0, collections.Counter()
  with warnings.catch_warnings(action='ignore'):  # Pillow's, on odd metadata
    for done, finding in enumerate(_findings(opened, lengths, workers), 1):
      pairs += finding.pairs
      if finding.broken:
        broken += 1
        report(finding.broken)
      for kind, line in finding.warnings:
        kinds[kind] += 1
        if kinds[kind] <= SHOWN:
          report(line)
      if done % CHUNK == 0 or done == total:
        progress(done, total)
  for kind, number in kinds.items():
    if number > SHOWN:
      report(f'{path}: {number - SHOWN} more warnings like these ({kind})')
  return Summary(lengths, total, pairs, broken, dict(kinds))


def _findings(
  opened: dict[str, Source], lengths: dict[str, int], workers: int | None
) -> Iterator[_Finding]:
  """Of all rows, in order. Few chunks are under way at a time: their pictures are in memory."""
  workers = workers or min(os.cpu_count() or 1, 16)
  tokenizer = ClipTokenizer(clip_tokenizer())
  waiting = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for name, source in opened.items():
      for start in range(0, lengths[name], CHUNK):
        rows = range(start, min(start + CHUNK, lengths[name]))
        waiting.append(pool.submit(_chunk, source, rows, tokenizer))
        if len(waiting) > 2 * workers:
          yield from waiting.popleft().result()
    while waiting:
      yield from waiting.popleft().result()


def _chunk(source, rows, tokenizer):
  return [_look(source, i, tokenizer) for i in rows]


def _look(source, i, tokenizer):
  try:
    row = source[i]
  except InputError as error:
    return _Finding(0, str(error))
  try:
    return _latents(row) if isinstance(row, LatentRow) else _pictures(row, tokenizer)
  except InputError as error:
    pairs = len(row.edited_mean if isinstance(row, LatentRow) else row.pairs)
    return _Finding(pairs, f'{row.name}: {error}')


def _pictures(row: Row, tokenizer: ClipTokenizer) -> _Finding:
  found = []
  for number, pair in enumerate(row.pairs, 1):
    where = f' of pair {number}' if len(row.pairs) > 1 else ''
    found += _pair(pair, where)
  for text in row.instructions:
    rest = tokenizer.cut_off(text).strip()
    if rest:
      found.append(('long', f'the instruction is too long for CLIP, which ignores {rest!r}'))
  lines = tuple((kind, f'{row.name}: warning: {what}') for kind, what in found)
  return _Finding(len(row.pairs), warnings=lines)


def _pair(pair: Pair, where: str) -> list[tuple[str, str]]:
  """Warnings of a pair, (kind, what); raises InputError if it is broken."""
  named = {'input': pair.input_image, 'edited': pair.edited_image}
  decoded = {
    name: _decode(encoded, f'the {name} picture{where}')
    for name, encoded in named.items()
    if encoded is not None
  }
  pictures = {name: picture for name, (picture, _) in decoded.items()}
  sizes = {name: picture.size for name, picture in pictures.items()}
  found = [
    ('colour', f'the {name} picture{where}: {problem}')
    for name, (_, problem) in decoded.items()
    if problem
  ]
  found += [
    ('small', f'the {name} picture{where} is only {width}x{height}')
    for name, (width, height) in sizes.items()
    if min(width, height) < SMALL
  ]
  if len(sizes) == 2:
    (width, height), (other_width, other_height) = sizes.values()
    ratio = width * other_height / (height * other_width)
    if max(ratio, 1 / ratio) > 1 + ASPECT:
      raise InputError(
        f'the pictures{where} differ in shape ({width}x{height} and {other_width}x{other_height});'
        ' crop one like the other'
      )
    if pair.input_image == pair.edited_image:
      found.append(('unchanged', f'the pictures{where} are the same file, so nothing is edited'))
    elif pictures['input'] == pictures['edited']:
      found.append(('unchanged', f'the pictures{where} have the same pixels: nothing is edited'))
  return found


def _decode(encoded, what) -> tuple[Image.Image, str]:
  """The picture, upright, RGB or RGBA, decoded to its end; and what is odd of its colours."""
  try:
    with Image.open(io.BytesIO(encoded), 'r', images.READ_FORMATS) as image:
      width, height = image.size
      if width * height > images.MAX_PIXELS:
        raise Image.DecompressionBombError
      if min(width, height) < images.MIN_SIDE:
        raise InputError(f'{what} is {width}x{height}; give at least {images.MIN_SIDE} pixels')
      return images.plain_and_problem(image)
  except InputError:
    raise
  except Image.DecompressionBombError as error:
    raise InputError(f'{what} has over {images.MAX_PIXELS:,} pixels; make it smaller') from error
  except UnidentifiedImageError as error:
    raise InputError(f'{what} is not a picture; give PNG, JPEG, WebP, BMP, GIF or TIFF') from error
  except Exception as error:  # decoders raise many kinds: EOFError, SyntaxError, struct.error ...
    raise InputError(f'{what} cannot be decoded ({error}); it may be cut short') from error


def _latents(row: LatentRow) -> _Finding:
  for name in LATENTS:
    value = getattr(row, name)
    if value is None:  # text-to-image has no input
      continue
    if value.shape != row.edited_mean.shape or not np.isfinite(value).all():
      raise InputError(f'{name} is not finite or of another shape; pack the data set again')
  pairs, found = range(len(row.edited_mean)), ()
  if row.input_mean is not None:
    same = [k for k in pairs if np.array_equal(row.input_mean[k], row.edited_mean[k])]
    what = f'{row.name}: warning: both pictures have the same latents: nothing is edited'
    found = tuple(('unchanged', what) for _ in same)
  return _Finding(len(pairs), warnings=found)
