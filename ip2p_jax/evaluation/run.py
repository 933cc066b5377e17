"""Edits the rows of a protocol by a method, and scores the edits: one line of results for each row.

  OUT/evaluation.json                settings, and what each number was computed with
  OUT/edits/                         edits, where the protocol's own script looks for them
  OUT/results-00000-of-00001.jsonl   one line for each scored row of worker 0 of 1

Both steps continue after a kill. An edit is finished when its file is there, a score when its line
is there. Any number of workers may share the rows.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ip2p_jax import images, storage
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import layouts
from ip2p_jax.evaluation.protocols import EditRow
from ip2p_jax.evaluation.scorers import Batch, Scorer
from ip2p_jax.evaluation.scores import Description
from ip2p_jax.pipeline.rows import padded
from ip2p_jax.progress import Progress, unwatched

SETTINGS, EDITS, RESULTS = 'evaluation.json', 'edits', 'results-{:05d}-of-{:05d}.jsonl'
BEST_PSNR = 100.0  # dB, of equal images; infinity has no mean
DIGITS = 6  # of stored scores
SEEN = 8  # sources in the digest of rows
TARGET = 'target_'  # before the names of scores against the true edited image
BOUNDED = ('psnr', 'psnr_kept', TARGET + 'psnr', TARGET + 'psnr_kept')  # by BEST_PSNR
ABOUT = ('id', 'group', 'turn', 'source')  # a line's row, beside its scores

Shard = tuple[int, int]  # (i, n): worker i of n
# (images uint8 [B, H, W, 3], their rows, their numbers in the protocol) -> edits, the same shape.
Edit = Callable[[np.ndarray, Sequence[EditRow], Sequence[int]], np.ndarray]


def start(out: str | Path, settings: dict[str, Any]) -> None:
  """Makes the folder of an evaluation, or continues it; InputError if it has other settings."""
  file = storage.folder(out) / SETTINGS
  file.parent.mkdir(parents=True, exist_ok=True)
  settings = json.loads(json.dumps(settings))
  old = storage.claim(file, settings)
  if names := storage.differing(old, settings):
    raise InputError(
      f'{out}: has results of other settings ({", ".join(names)}); give a new folder, or the same'
      ' settings.'
    )


def digest_of(rows: Sequence[EditRow]) -> str:
  """A digest of the rows' texts, and of the pixels of a few sources."""
  digest = hashlib.blake2b(digest_size=8)
  for row in rows:
    texts = row.id, row.file, row.instruction, row.source_caption, row.target_caption
    digest.update(json.dumps(texts).encode())
  for row in rows[:: -(-len(rows) // SEEN)]:
    digest.update(row.source().tobytes())
  return digest.hexdigest()


def share_of(rows: Sequence[EditRow], shard: Shard) -> list[tuple[int, EditRow]]:
  """This worker's (number, row); a session of edits goes to one worker."""
  by_id = {row.id: row for row in rows}

  def first(row):
    while row.previous:
      row = by_id[row.previous]
    return row.id

  sessions = {name: i for i, name in enumerate(dict.fromkeys(map(first, rows)))}
  return [(i, row) for i, row in enumerate(rows) if sessions[first(row)] % shard[1] == shard[0]]


def make_edits(
  rows: Sequence[EditRow],
  edit: Edit,
  folder: str | Path,
  size_of: Callable[[int, int], tuple[int, int]],
  *,
  batch_size: int = 8,
  shard: Shard = (0, 1),
  settings: dict[str, Any] | None = None,
  progress: Progress = unwatched,
) -> None:
  """Makes the edits that are missing in the folder.

  Args:
    edit: the method; batches are filled up to `batch_size` with copies of their rows.
    size_of: (width, height) of a source -> the size that the method works at. An edit gets its
      source's size back.
    settings: written into each file.
  """
  mine = share_of(rows, shard)
  files = {row.id: Path(folder, row.file) for row in rows}
  todo = [(number, row) for number, row in mine if not files[row.id].is_file()]
  done = len(mine) - len(todo)
  if done:  # the first report ends the note that the compiler is at work
    progress(done, len(mine))

  def source(row):
    if row.previous:
      return images.shown(images.read(files[row.previous]))
    return row.source()

  # All rows of a turn before the next turn, which may start from their edits.
  for turn in sorted({row.turn for _, row in todo}):
    opened = ((i, row, source(row)) for i, row in todo if row.turn == turn)
    for batch in _batches(opened, lambda item: size_of(*item[2].size), batch_size):
      size = size_of(*batch[0][2].size)
      full = padded(batch, batch_size)
      arrays = np.stack([images.to_array(image, size) for _, _, image in full])
      edits = edit(arrays, [row for _, row, _ in full], [i for i, _, _ in full])
      for (_, row, image), array in zip(batch, edits, strict=False):
        result = Image.fromarray(array).resize(image.size, Image.Resampling.LANCZOS)
        layouts.write_edit(folder, row, result, settings)
      done += len(batch)
      progress(done, len(mine))


def score_edits(
  rows: Sequence[EditRow],
  folder: str | Path,
  protocol: str,
  scorers: Sequence[Scorer],
  out: str | Path,
  *,
  batch_size: int = 8,
  shard: Shard = (0, 1),
  progress: Progress = unwatched,
) -> list[dict[str, Any]]:
  """Scores all edits of a folder that have no line in `out` yet; returns all of this worker's.

  An edit is compared with its source, and with the true edited image (`target_`) if there is one.
  It is resized to that image first, by Pillow's bicubic filter as in MagicBrush's script. A line
  has 'id', 'group', 'turn', 'source' (the digest of the source's pixels) and the scores, null where
  a score is not finite; PSNR is 100 dB at most.

  Raises InputError if an edit is missing, or a scorer fails or does not give one number per row.
  """
  scored = [row for _, row in share_of(rows, shard) if row.is_last]
  edits = layouts.find_edits(folder, scored)
  file = Path(out) / RESULTS.format(*shard)
  results = _read(file)
  storage.write_bytes(file, _text(results).encode())  # without a line that a kill left unfinished
  finished = {line['id'] for line in results}
  opened = (
    (row, _Images(row, layouts.open_edit(edits[row.id], protocol)))
    for row in scored
    if row.id not in finished
  )
  if finished:
    progress(len(finished), len(scored))
  with file.open('a', encoding='utf-8') as lines:
    for batch in _batches(opened, lambda item: item[1].kind, batch_size):
      new = _lines(batch, scorers, batch_size)
      lines.write(_text(new))
      lines.flush()
      results += new
      progress(len(results), len(scored))
  return results


def read_results(out: str | Path) -> list[dict[str, Any]]:
  """The lines of all workers; InputError if there are none, or one is damaged."""
  results = _by_id(out)
  if not results:
    raise InputError(f'{out}: has no results; run ip2p evaluate with this folder first.')
  return list(results.values())


def number_of_results(out: str | Path) -> int:
  """How many rows the workers have scored."""
  return len(_by_id(out))


def _by_id(out):
  """{id: line} of all workers."""
  files = sorted(Path(out).glob('results-*-of-*.jsonl'))
  return {line['id']: line for file in files for line in _read(file)}


def read_descriptions(folders: Sequence[str | Path]) -> list[Description]:
  """What the scores of evaluations were computed with.

  InputError if two evaluations have scores of different models, weights or settings. One may have
  fewer scores than another.
  """
  fullest, descriptions = None, []
  for folder in folders:
    stored = storage.read_json(Path(folder) / SETTINGS, dict).get('scorers', [])
    own = [Description(**x)._replace(quirks=tuple(x['quirks'])) for x in stored]
    rest = [x for x in own if x not in descriptions]
    if rest and [x for x in descriptions if x not in own]:
      raise InputError(
        f'{fullest} and {folder}: their scores were computed in different ways (see {SETTINGS}:'
        f' {rest[0].model}); score both with the same options.'
      )
    if rest:
      fullest, descriptions = folder, own
  return descriptions


class _Images:
  """The images of a row, as arrays; rows of one `kind` make a batch."""

  def __init__(self, row: EditRow, edit: Image.Image):
    source = row.source()
    target = row.target and row.target()
    mask = row.mask and row.mask()
    self.source, self.edit = np.asarray(source), _resized(edit, source.size)
    self.target = None if target is None else np.asarray(target)
    self.target_edit = None if target is None else _resized(edit, target.size)
    self.kept = None if mask is None else 1 - np.asarray(mask, np.float32)[..., None]
    has_captions = bool(row.source_caption), bool(row.target_caption)
    shapes = (None if x is None else x.shape for x in (self.source, self.target, self.kept))
    self.kind = (*shapes, has_captions)


def _resized(image, size):
  return np.asarray(image.resize(size, Image.Resampling.BICUBIC) if image.size != size else image)


def _lines(batch, scorers, batch_size):
  """The lines of a batch of rows of one kind; filled up, so that every batch has one size."""
  rows, every = zip(*padded(batch, batch_size), strict=True)
  stack = lambda name: (
    None if getattr(every[0], name) is None else np.stack([getattr(x, name) for x in every])
  )
  texts = lambda name: [getattr(row, name) for row in rows] if getattr(rows[0], name) else None
  source = Batch(
    stack('edit'), stack('source'), texts('target_caption'), texts('source_caption'), stack('kept'),
    [row.id for row in rows],
  )  # fmt: skip
  against = [('', source)]
  if every[0].target is not None:
    against.append((TARGET, Batch(stack('target_edit'), stack('target'))))
  try:
    scores = _every_score(scorers, against)
  except InputError as error:
    raise InputError(f'row {rows[0].id!r}: {error}') from error
  digest = lambda array: hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()
  return [
    dict(zip(ABOUT, (row.id, row.group, row.turn, digest(loaded.source)), strict=True))
    | {name: _stored(name, values[i]) for name, values in scores.items()}
    for i, (row, loaded) in enumerate(batch)
  ]


def _every_score(scorers, against):
  """{name: float [B]} of all scorers; `against` has (prefix of names, batch)."""
  scores = {}
  for scorer in scorers:
    for prefix, batch in against:
      new = {prefix + name: values for name, values in _scores(scorer, batch).items()}
      if twice := sorted(scores.keys() & new.keys()):
        raise InputError(
          f'scorer {scorer.description.model!r}: the score {twice[0]!r} is there already; give it'
          ' another name.'
        )
      scores |= new
  return scores


def _scores(scorer, batch):
  """{name: float [B]} of one scorer, which may be the user's; InputError if it is anything else."""
  by, count = f'scorer {scorer.description.model!r}', len(batch.edits)
  try:
    result = scorer.score(batch)
    if isinstance(result, dict):
      result = {name: np.asarray(values) for name, values in result.items()}
  except (InputError, MemoryError):
    raise
  except Exception as error:
    if 'RESOURCE_EXHAUSTED' in str(error):  # the device's memory
      raise
    text = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise InputError(f'{by} failed ({text}); correct it, or leave it out.') from error
  if not isinstance(result, dict):
    raise InputError(f'{by} gave {type(result).__name__}; return a dict of names to arrays.')
  for name, values in result.items():
    if not isinstance(name, str) or name in ('', *ABOUT):
      raise InputError(f'{by}: {name!r} is no name for a score; give it another name.')
    kind = values.dtype
    if values.shape != (count,) or not (kind.kind in 'biuf' or kind.name == 'bfloat16'):
      raise InputError(
        f'{by}: {name!r} is {kind.name} {list(values.shape)}; give one number for each of'
        f' the {count} rows of the batch, NaN where there is none.'
      )
  return result


def _stored(name, value):
  value = float(value)
  if name in BOUNDED:
    value = min(value, BEST_PSNR)
  return round(value, DIGITS) if math.isfinite(value) else None


def _batches(
  items: Iterable[Any], kind_of: Callable[[Any], Any], batch_size: int
) -> Iterator[list[Any]]:
  """Batches of items of one kind, at most `batch_size` in each."""
  waiting = defaultdict(list)
  for item in items:
    batch = waiting[kind_of(item)]
    batch.append(item)
    if len(batch) == batch_size:
      yield batch
      del waiting[kind_of(item)]
  yield from filter(None, waiting.values())


def _read(file):
  """The finished lines of a file; InputError for a damaged one."""
  if not file.exists():
    return []
  content = file.read_bytes()
  results = []
  for number, text in enumerate(content[: content.rfind(b'\n') + 1].split(b'\n'), 1):
    if not text.strip():
      continue
    try:
      line = json.loads(text)
    except ValueError:
      line = None
    if not _is_result(line):
      raise InputError(
        f'{file}: line {number} is damaged; remove this line, and its row is scored again.'
      )
    results.append(line)
  return results


def _is_result(line):
  """Whether a line of a file has an id, texts and numbers as `score_edits` writes them."""
  if not isinstance(line, dict) or not line.get('id'):
    return False
  if not all(isinstance(line.get(name, ''), str) for name in ('id', 'group', 'source')):
    return False
  others = [value for name, value in line.items() if name not in ('id', 'group', 'source')]
  return all(x is None or (type(x) in (int, float) and abs(x) < math.inf) for x in others)


def _text(lines):
  return ''.join(json.dumps(line) + '\n' for line in lines)
