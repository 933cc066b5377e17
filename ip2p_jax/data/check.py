"""Checks whether a data set can be trained on. Reads every row and decodes every image."""

import collections
import concurrent.futures
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ip2p_jax import images
from ip2p_jax.data.rows import SPLITS, LatentRow, Pair, Row, Source
from ip2p_jax.data.sources import check_columns, open_source
from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.progress import Progress, unwatched
from ip2p_jax.weights import clip_tokenizer

ASPECT = 0.05  # how far the shapes of a pair may differ
SMALL = 64  # pixels; a shorter side gives a warning
CHUNK = 16  # neighbouring rows that a thread takes at a time
LATENTS = ('input_mean', 'edited_mean', 'edited_log_variance')
ALMOST_ALL = 0.9  # share of the pairs; more pairs without an edit are a mistake
SHOWN = 10  # warnings of one kind that are reported one by one


class Summary(NamedTuple):
  """The result of a check.

  Attributes:
    splits: number of rows read, by split.
    rows, pairs: numbers of rows and pairs read; a broken row counts as a row.
    broken: number of rows that cannot be trained on.
    warnings: number of warnings, by kind: 'small', 'long', 'unchanged', 'colour'.
  """

  splits: dict[str, int]
  rows: int
  pairs: int
  broken: int
  warnings: dict[str, int]

  @property
  def edits_nothing(self) -> bool:
    """Whether almost all pairs hold two equal images. Then a column was probably mistaken."""
    return self.warnings.get('unchanged', 0) > ALMOST_ALL * self.pairs


class _Finding(NamedTuple):
  """The result for a row: number of pairs, error ('' if none), warnings as (kind, line)."""

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
  """Reads every row of a data set as training would, and reports problems.

  A row is broken if a file or a text is missing, an image does not decode, or the images of a
  pair differ in shape by more than 5 %. Warnings: a side under 64 pixels, an instruction that does
  not fit into CLIP's 77 tokens, an edited image with the same pixels as the input, colours that
  cannot be converted.

  Args:
    path, columns, task: as in `sources.open_source`.
    split: one split instead of all.
    report: gets one line per broken row, 'FILE: row N: what', and one per warning, but only the
      first ten warnings of each kind.
    progress: gets (rows done, all rows) from time to time.
    limit: reads only this many rows of each split, the first ones.
    workers: threads; by default one per core, at most 16.

  Raises InputError if the data set or split does not exist or cannot be opened.
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
  """The findings of all rows, in order. Few chunks run at a time, to hold few images in memory."""
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
    return _check_latents(row) if isinstance(row, LatentRow) else _check_images(row, tokenizer)
  except InputError as error:
    pairs = len(row.edited_mean if isinstance(row, LatentRow) else row.pairs)
    return _Finding(pairs, f'{row.name}: {error}')


def _check_images(row: Row, tokenizer: ClipTokenizer) -> _Finding:
  problems = []
  for number, pair in enumerate(row.pairs, 1):
    where = f' of pair {number}' if len(row.pairs) > 1 else ''
    problems += _check_pair(pair, where)
  for text in row.instructions:
    rest = tokenizer.cut_off(text).strip()
    if rest:
      problems.append(('long', f'the instruction is too long for CLIP, which ignores {rest!r}'))
  lines = tuple((kind, f'{row.name}: warning: {problem}') for kind, problem in problems)
  return _Finding(len(row.pairs), warnings=lines)


def _check_pair(pair: Pair, where: str) -> list[tuple[str, str]]:
  """Warnings of a pair, (kind, problem). Raises InputError if the pair is broken."""
  files = {'input': pair.input_image, 'edited': pair.edited_image}
  decoded = {
    name: images.decode(encoded, f'the {name} image{where}')
    for name, encoded in files.items()
    if encoded is not None
  }
  pixels = {name: image for name, (image, _) in decoded.items()}
  sizes = {name: image.size for name, image in pixels.items()}
  problems = [
    ('colour', f'the {name} image{where}: {problem}')
    for name, (_, problem) in decoded.items()
    if problem
  ]
  problems += [
    ('small', f'the {name} image{where} is only {width}x{height}')
    for name, (width, height) in sizes.items()
    if min(width, height) < SMALL
  ]
  if len(sizes) == 2:
    (width, height), (other_width, other_height) = sizes.values()
    ratio = width * other_height / (height * other_width)
    if max(ratio, 1 / ratio) > 1 + ASPECT:
      raise InputError(
        f'the images{where} differ in shape ({width}x{height} and {other_width}x{other_height});'
        ' crop both to the same shape'
      )
    if pair.input_image == pair.edited_image:
      problems.append(('unchanged', f'the images{where} are the same file, so nothing is edited'))
    elif pixels['input'] == pixels['edited']:
      problems.append(('unchanged', f'the images{where} have the same pixels: nothing is edited'))
  return problems


def _check_latents(row: LatentRow) -> _Finding:
  for name in LATENTS:
    value = getattr(row, name)
    if value is None:  # text-to-image has no input
      continue
    if value.shape != row.edited_mean.shape or not np.isfinite(value).all():
      raise InputError(f'{name} is not finite or of another shape; pack the data set again')
  pairs, lines = range(len(row.edited_mean)), ()
  if row.input_mean is not None:
    same = [k for k in pairs if np.array_equal(row.input_mean[k], row.edited_mean[k])]
    line = f'{row.name}: warning: both images have the same latents: nothing is edited'
    lines = tuple(('unchanged', line) for _ in same)
  return _Finding(len(pairs), warnings=lines)
