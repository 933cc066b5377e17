"""Pairs as they lie on disk: what `ip2p pairs` writes, any number of workers into one folder.

  OUT/pairs.json                     the settings
  OUT/0000007/prompt.json            line 7 of the prompts, from 0
  OUT/0000007/scores.jsonl           a line per sample that is done, in order
  OUT/0000007/SEED_0.jpg, SEED_1.jpg
  OUT/batch-00000-of-00001.json      what a worker is about to write; goes when it is done

A sample is done when its line is there, which is written after its images. So nothing else tells
how far a run is: not the size of its batches, nor how many workers there are.
"""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.images import image_grid
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pairs.prompts import Prompt, drawn_from
from ip2p_jax.pairs.thresholds import RELEASED
from ip2p_jax.pipeline.scores import Scores

SETTINGS, PROMPT, SCORES = 'pairs.json', 'prompt.json', 'scores.jsonl'
# May change while nobody is at work, if what was drawn is still asked for.
CHANGEABLE = ('prompts', 'samples')
UNUSED = ('batch_size',)  # of settings that older versions wrote
DIGITS = 5  # of the scores: what is judged is what is stored
SHOWN = 5  # lines named in one message

Shard = tuple[int, int]  # (i, n): worker i of n, which has every n-th prompt
Row = tuple[Prompt, int]  # a prompt, and the number of its sample


class Left(NamedTuple):
  """What a worker has still to draw."""

  todo: list[tuple[Prompt, Sequence[int]]]  # prompts in order, each with its missing samples
  torn: list[Row]  # the batch that was being written when it was killed, or none
  broken: int  # samples that are done, and not finite

  def count(self) -> int:
    return sum(len(numbers) for _, numbers in self.todo)

  def rows(self) -> Iterator[Row]:
    """All that is missing, but for what is in `torn`."""
    torn = {(prompt.index, number) for prompt, number in self.torn}
    for prompt, numbers in self.todo:
      yield from ((prompt, number) for number in numbers if (prompt.index, number) not in torn)


@contextlib.contextmanager
def working(
  folder: epath.Path, settings: Mapping[str, Any], prompts: Sequence[Prompt], shard: Shard
) -> Iterator[None]:
  """Is worker `shard` of this folder until the end; several may be at the same time.

  The first to come settles all but `batch_size` of the settings. Later, and while nobody else is at
  work, there may be more samples, another number of workers, and other prompts, if those that were
  drawn are still the same. InputError for any other change, or if this worker is at work already
  (on a disk with locks; see `storage.locked`).
  """
  settings = {name: value for name, value in settings.items() if name not in UNUSED}
  settings = json.loads(json.dumps(settings))
  if storage.is_local(folder) and folder.exists() and not folder.is_dir():
    raise InputError(f'{folder}: is a file; give a folder.')

  def settle(is_shared):
    _settle(folder, settings, prompts, is_shared)
    for file in folder.glob('batch-*.json'):
      if not file.name.endswith(f'-of-{shard[1]:05d}.json'):
        file.unlink(missing_ok=True)  # of workers that were killed

  with storage.at_work(folder, shard, 'prompts', settle):
    yield


def _settle(folder, settings, prompts, is_shared) -> None:
  """Claims the folder, or finds it claimed for the same, or changes what may change."""
  file = folder / SETTINGS
  known = storage.claim(file, settings)
  if not isinstance(known, dict):
    raise InputError(f'{file}: holds no settings; use another folder.')
  # Older versions did not write all names.
  differing = [name for name in storage.differing(known, settings) if name not in UNUSED]
  differing.sort(key=lambda name: name == 'bytes')  # a part that differs says more
  for name in differing:
    if name in known and name not in CHANGEABLE:
      raise InputError(
        f'{folder}: was drawn with {name} {known[name]!r}, not {settings.get(name)!r}; use another'
        ' folder, or the same settings.'
      )
  if not differing:
    return
  if is_shared:
    raise InputError(
      f'{folder}: other workers are drawing here with other {" and ".join(differing)}; wait until'
      ' they are done, or use another folder.'
    )
  if known.get('samples', 0) > settings.get('samples', 0):
    raise InputError(
      f'{folder}: has {known["samples"]} samples of each prompt, and --samples is'
      f' {settings["samples"]}; give as many, or more.'
    )
  _check_drawn(folder, prompts)
  storage.write_json(file, settings)


def _check_drawn(folder, prompts) -> None:
  """Refuses prompts that differ in what was drawn; takes over what else has changed of them."""
  by_name = {_name(prompt): prompt for prompt in prompts}
  changed, rewritten = [], {}
  for place in sorted(folder.iterdir()):
    if not place.name.isdecimal() or not (place / SCORES).exists():
      continue
    stored, prompt = (place / PROMPT).read_bytes().decode(), by_name.get(place.name)
    try:
      is_same = prompt is not None and drawn_from(stored) == drawn_from(prompt.line)
    except (ValueError, AttributeError) as error:
      raise InputError(f'{place / PROMPT}: is damaged ({error}); delete its folder.') from None
    if not is_same:
      changed.append(int(place.name) + 1)
    elif stored != prompt.line + '\n':
      rewritten[place / PROMPT] = prompt
  if changed:
    lines = ', '.join(map(str, changed[:SHOWN])) + (' ...' if len(changed) > SHOWN else '')
    raise InputError(
      f'{folder}: these lines of the prompts are not as they were drawn: {lines}; use another'
      ' folder, or these lines as they were (what was not drawn yet may change).'
    )
  for file, prompt in rewritten.items():
    storage.write_bytes(file, _content(prompt))


def left(
  folder: epath.Path, prompts: Sequence[Prompt], samples: int, batch_size: int, shard: Shard
) -> Left:
  """What is missing of the first `samples` of these prompts; clears what a kill left of it."""
  there = {place.name for place in folder.iterdir()}
  todo, broken = [], 0
  for prompt in prompts:
    place, numbers = folder / _name(prompt), range(samples)
    if place.name in there:
      lines = read_scores(place / SCORES) if (place / SCORES).exists() else []
      broken += sum(not _is_finite(line) for line in lines)
      done = {line['sample'] for line in lines}
      numbers = [number for number in numbers if number not in done]
      if numbers and storage.is_local(folder):
        _clear(place, {str(line['seed']) for line in lines})
    if numbers:
      todo.append((prompt, numbers))
  return Left(todo, _torn(folder, todo, prompts, samples, batch_size, shard), broken)


def _clear(place, seeds) -> None:
  """Takes away files without a line: they may be of other captions, or cut short."""
  for file in place.iterdir():
    if file.name.endswith('.tmp') or (
      file.name.endswith('.jpg') and file.name.partition('_')[0] not in seeds
    ):
      file.unlink(missing_ok=True)


def _torn(folder, todo, prompts, samples, batch_size, shard) -> list[Row]:
  """So that a batch is drawn again as it was: rounding may depend on what is drawn together."""
  file = _batch_file(folder, shard)
  if storage.is_local(folder):
    for leftover in folder.glob(f'.{file.name}.*.tmp'):
      leftover.unlink(missing_ok=True)
  if not file.exists():
    return []
  found, by_index = storage.read_json(file), {prompt.index: prompt for prompt in prompts}
  missing = {prompt.index: set(numbers) for prompt, numbers in todo}
  rows = [(by_index.get(index), number) for index, number in found['rows']]
  fits = found['batch_size'] == batch_size and all(p and number < samples for p, number in rows)
  if fits and any(number in missing.get(prompt.index, ()) for prompt, number in rows):
    return rows
  return []


def write_batch(
  folder: epath.Path,
  shard: Shard,
  batch_size: int,
  rows: Sequence[Row],
  samples: Sequence[Any],
  images: np.ndarray,
  scores: Scores,
  keep: str,
  pool: Executor,
) -> tuple[int, int]:
  """Writes uint8 images [2, B, H, W, 3] and scores [B] of rows that were drawn as `samples`.

  Returns how many lines were new, and how many of those are not finite: these have no images, and
  null for the numbers that are no numbers.
  """
  named = [[prompt.index, number] for prompt, number in rows]
  storage.write_json(_batch_file(folder, shard), {'batch_size': batch_size, 'rows': named})
  files, lines, prompts = [], {}, {}
  for i, ((prompt, number), sample) in enumerate(zip(rows, samples, strict=True)):
    found = stored(Scores(*(float(values[i]) for values in scores)))
    place = folder / _name(prompt)
    is_kept = None not in found and (keep == 'all' or passes(found, RELEASED))
    if is_kept:
      files += [(place / f'{sample.seed}_{side}.jpg', images[side, i]) for side in (0, 1)]
    line = {'sample': number, 'seed': sample.seed, 'p2p_threshold': sample.threshold}
    lines.setdefault(place, []).append(line | {'cfg_scale': sample.guidance} | found._asdict())
    prompts[place] = prompt
  for place, prompt in prompts.items():
    storage.write_bytes(place / PROMPT, _content(prompt))
  list(pool.map(lambda file: storage.write_bytes(file[0], jpeg(file[1])), files))
  written = [line for place, new in lines.items() for line in _add_lines(place / SCORES, new)]
  return len(written), sum(not _is_finite(line) for line in written)


def end(folder: epath.Path, shard: Shard) -> None:
  """Forgets the last batch, when nothing is left to draw."""
  _batch_file(folder, shard).unlink(missing_ok=True)


def _add_lines(file, new) -> list[dict]:
  """Adds those that are not there, and returns them."""
  known = read_scores(file) if file.exists() else []
  there = {line['sample'] for line in known}
  added = [line for line in new if line['sample'] not in there]
  lines = sorted(known + added, key=lambda line: line['sample'])
  storage.write_bytes(file, ''.join(json.dumps(line) + '\n' for line in lines).encode())
  return added


def read_scores(file: epath.Path) -> list[dict]:
  """The lines of a scores.jsonl; InputError if it is damaged."""
  try:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
      for value in (line['sample'], line['seed'], *scores_of(line)):
        if not isinstance(value, int | float | None) or isinstance(value, bool):
          raise TypeError(f'{value!r} is no number')
    return lines
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f'{file}: is damaged ({error}); delete its folder and draw again.') from None


def scores_of(line: Mapping[str, Any]) -> Scores:
  """The scores in a line, as they are stored."""
  return Scores(*(line[name] for name in Scores._fields))


def stored(scores: Scores) -> Scores:
  """Floats as they are stored and judged: rounded, and None for what is not finite."""
  return Scores(*(round(x, DIGITS) if math.isfinite(x) else None for x in scores))


def passes(scores: Scores, thresholds: Scores) -> bool:
  """Whether stored scores reach all thresholds; None reaches none."""
  pairs = zip(scores, thresholds, strict=True)
  return all(value is not None and value >= least for value, least in pairs)


def _is_finite(line) -> bool:
  return None not in scores_of(line)


def _name(prompt) -> str:
  return f'{prompt.index:07d}'


def _content(prompt) -> bytes:
  return (prompt.line + '\n').encode()


def _batch_file(folder, shard):
  return folder / f'batch-{shard[0]:05d}-of-{shard[1]:05d}.json'


def jpeg(image: np.ndarray) -> bytes:
  """Of best quality, and colours at full resolution (the original halves it)."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=100, subsampling=0)
  return file.getvalue()


def attention_sheet(
  tokenizer: ClipTokenizer, prompt: Prompt, images: np.ndarray, maps: np.ndarray
) -> Image.Image:
  """Where each word of both captions looked: uint8 [2, H, W, 3] and [2, a, b, L]."""
  sheets = []
  captions = (prompt.caption, prompt.edited_caption)
  for caption, image, looks in zip(captions, images, maps, strict=True):
    shown, labels = [Image.fromarray(image)], ['']
    for word, places in tokenizer.words(caption):
      seen = looks[..., list(places)].sum(-1)
      grey = np.uint8(255 * seen / max(seen.max(), 1e-12))
      size = shown[0].size
      shown.append(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert('RGB'))
      labels.append(word)
    sheets.append(image_grid([shown], [''], labels, caption))
  width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
  both = Image.new('RGB', (width, height), 'white')
  both.paste(sheets[0], (0, 0))
  both.paste(sheets[1], (0, sheets[0].height))
  return both
