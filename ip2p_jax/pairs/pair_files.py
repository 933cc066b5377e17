"""The files of `ip2p pairs`. Any number of workers write into one folder.

  OUT/pairs.json                     the settings
  OUT/0000007/prompt.json            line 7 of the prompts, from 0
  OUT/0000007/scores.jsonl           one line per finished sample, in order
  OUT/0000007/SEED_0.jpg, SEED_1.jpg
  OUT/batch-00000-of-00001.json      the batch that a worker is writing; removed at the end

A sample is finished when its line exists, which is written after its images. So the lines alone
show the progress of a run, for any batch size and any number of workers.
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
# May change while no worker runs, if all finished samples are still wanted.
CHANGEABLE = ('prompts', 'samples')
UNUSED = ('batch_size',)  # settings of older versions
DIGITS = 5  # of stored scores; thresholds apply to the rounded scores
SHOWN = 5  # lines named in one message

Shard = tuple[int, int]  # (i, n): worker i of n draws every n-th prompt
Row = tuple[Prompt, int]  # a prompt, and the number of its sample


class Remaining(NamedTuple):
  """The samples that a worker must still draw."""

  todo: list[tuple[Prompt, Sequence[int]]]  # prompts in order, each with its missing samples
  torn: list[Row]  # the batch that a killed worker was writing, or none
  broken: int  # finished samples with scores that are not finite

  def count(self) -> int:
    return sum(len(numbers) for _, numbers in self.todo)

  def rows(self) -> Iterator[Row]:
    """All missing samples, except those in `torn`."""
    torn = {(prompt.index, number) for prompt, number in self.torn}
    for prompt, numbers in self.todo:
      yield from ((prompt, number) for number in numbers if (prompt.index, number) not in torn)


@contextlib.contextmanager
def working(
  folder: epath.Path, settings: Mapping[str, Any], prompts: Sequence[Prompt], shard: Shard
) -> Iterator[None]:
  """Runs as worker `shard` of this folder until the end. Several workers may run at a time.

  The first worker fixes the settings, except `batch_size`. A later worker that runs alone may use
  more samples, another number of workers, and other prompts, if the drawn ones stay the same.
  Raises InputError for any other change, or if this worker runs already (on a disk with locks; see
  `storage.locked`).
  """
  settings = {name: value for name, value in settings.items() if name not in UNUSED}
  settings = json.loads(json.dumps(settings))
  if storage.is_local(folder) and folder.exists() and not folder.is_dir():
    raise InputError(f'{folder}: is a file; give a folder.')

  def settle(is_shared):
    _settle(folder, settings, prompts, is_shared)
    for file in folder.glob('batch-*.json'):
      if not file.name.endswith(f'-of-{shard[1]:05d}.json'):
        file.unlink(missing_ok=True)  # from killed workers

  with storage.at_work(folder, shard, 'prompts', settle):
    yield


def _settle(folder, settings, prompts, is_shared) -> None:
  """Claims the folder for the settings, or updates those that may change."""
  file = folder / SETTINGS
  existing = storage.claim(file, settings)
  if not isinstance(existing, dict):
    raise InputError(f'{file}: holds no settings; use another folder.')
  # Older versions did not write all names.
  differing = [name for name in storage.differing(existing, settings) if name not in UNUSED]
  differing.sort(key=lambda name: name == 'bytes')  # any other name is a better message
  for name in differing:
    if name in existing and name not in CHANGEABLE:
      raise InputError(
        f'{folder}: was drawn with {name} {existing[name]!r}, not {settings.get(name)!r}; use'
        ' another folder, or the same settings.'
      )
  if not differing:
    return
  if is_shared:
    raise InputError(
      f'{folder}: other workers are drawing here with other {" and ".join(differing)}; wait until'
      ' they are done, or use another folder.'
    )
  if existing.get('samples', 0) > settings.get('samples', 0):
    raise InputError(
      f'{folder}: has {existing["samples"]} samples of each prompt, and --samples is'
      f' {settings["samples"]}; give at least as many.'
    )
  _check_drawn(folder, prompts)
  storage.write_json(file, settings)


def _check_drawn(folder, prompts) -> None:
  """Refuses prompts whose drawn keys changed. Stores the other changes."""
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
      f'{folder}: these lines of the prompts differ from those drawn: {lines}; use another folder,'
      ' or restore these lines (lines that were not drawn yet may change).'
    )
  for file, prompt in rewritten.items():
    storage.write_bytes(file, _content(prompt))


def remaining(
  folder: epath.Path, prompts: Sequence[Prompt], samples: int, batch_size: int, shard: Shard
) -> Remaining:
  """The missing ones of the first `samples` of each prompt. Removes their unfinished files."""
  names = {place.name for place in folder.iterdir()}
  todo, broken = [], 0
  for prompt in prompts:
    place, numbers = folder / _name(prompt), range(samples)
    if place.name in names:
      lines = read_scores(place / SCORES) if (place / SCORES).exists() else []
      broken += sum(not _is_finite(line) for line in lines)
      done = {line['sample'] for line in lines}
      numbers = [number for number in numbers if number not in done]
      if numbers and storage.is_local(folder):
        _clear(place, {str(line['seed']) for line in lines})
    if numbers:
      todo.append((prompt, numbers))
  return Remaining(todo, _torn(folder, todo, prompts, samples, batch_size, shard), broken)


def _clear(place, seeds) -> None:
  """Removes files without a line: they may have other captions, or be incomplete."""
  for file in place.iterdir():
    if file.name.endswith('.tmp') or (
      file.name.endswith('.jpg') and file.name.partition('_')[0] not in seeds
    ):
      file.unlink(missing_ok=True)


def _torn(folder, todo, prompts, samples, batch_size, shard) -> list[Row]:
  """The unfinished batch, to draw it again unchanged, since rounding may depend on neighbours."""
  file = _batch_file(folder, shard)
  if storage.is_local(folder):
    for leftover in folder.glob(f'.{file.name}.*.tmp'):
      leftover.unlink(missing_ok=True)
  if not file.exists():
    return []
  batch, by_index = storage.read_json(file), {prompt.index: prompt for prompt in prompts}
  missing = {prompt.index: set(numbers) for prompt, numbers in todo}
  rows = [(by_index.get(index), number) for index, number in batch['rows']]
  fits = batch['batch_size'] == batch_size and all(p and number < samples for p, number in rows)
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

  Returns the number of new lines, and the number of these that are not finite. Those have no images
  and null instead of such a score.
  """
  places = [[prompt.index, number] for prompt, number in rows]
  storage.write_json(_batch_file(folder, shard), {'batch_size': batch_size, 'rows': places})
  files, lines, prompts = [], {}, {}
  for i, ((prompt, number), sample) in enumerate(zip(rows, samples, strict=True)):
    rounded = round_scores(Scores(*(float(values[i]) for values in scores)))
    place = folder / _name(prompt)
    if None not in rounded and (keep == 'all' or passes(rounded, RELEASED)):
      files += [(place / f'{sample.seed}_{side}.jpg', images[side, i]) for side in (0, 1)]
    line = {'sample': number, 'seed': sample.seed, 'p2p_threshold': sample.threshold}
    lines.setdefault(place, []).append(line | {'cfg_scale': sample.guidance} | rounded._asdict())
    prompts[place] = prompt
  for place, prompt in prompts.items():
    storage.write_bytes(place / PROMPT, _content(prompt))
  list(pool.map(lambda file: storage.write_bytes(file[0], jpeg(file[1])), files))
  written = [line for place, new in lines.items() for line in _add_lines(place / SCORES, new)]
  return len(written), sum(not _is_finite(line) for line in written)


def end(folder: epath.Path, shard: Shard) -> None:
  """Removes the file of the last batch, when everything is drawn."""
  _batch_file(folder, shard).unlink(missing_ok=True)


def _add_lines(file, new) -> list[dict]:
  """Adds the lines of samples that the file lacks, and returns them."""
  existing = read_scores(file) if file.exists() else []
  numbers = {line['sample'] for line in existing}
  added = [line for line in new if line['sample'] not in numbers]
  lines = sorted(existing + added, key=lambda line: line['sample'])
  storage.write_bytes(file, ''.join(json.dumps(line) + '\n' for line in lines).encode())
  return added


def read_scores(file: epath.Path) -> list[dict]:
  """The lines of a scores.jsonl. Raises InputError if it is damaged."""
  try:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
      for value in (line['sample'], line['seed'], *scores_of(line)):
        if not isinstance(value, int | float | None) or isinstance(value, bool):
          raise TypeError(f'{value!r} is not a number')
    return lines
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f'{file}: is damaged ({error}); delete its folder and draw again.') from None


def scores_of(line: Mapping[str, Any]) -> Scores:
  """The stored scores of a line."""
  return Scores(*(line[name] for name in Scores._fields))


def round_scores(scores: Scores) -> Scores:
  """The scores as they are stored: rounded, and None if not finite."""
  return Scores(*(round(x, DIGITS) if math.isfinite(x) else None for x in scores))


def passes(scores: Scores, thresholds: Scores) -> bool:
  """Whether stored scores reach all thresholds. None reaches no threshold."""
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
  """An image as JPEG of best quality, with colours at full resolution (the original halves it)."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'JPEG', quality=100, subsampling=0)
  return file.getvalue()


def attention_sheet(
  tokenizer: ClipTokenizer, prompt: Prompt, images: np.ndarray, maps: np.ndarray
) -> Image.Image:
  """Draws the attention to each word of both captions.

  Args:
    images: uint8 [2, H, W, 3].
    maps: attention [2, a, b, L].
  """
  sheets = []
  captions = (prompt.caption, prompt.edited_caption)
  for caption, image, attention in zip(captions, images, maps, strict=True):
    tiles, labels = [Image.fromarray(image)], ['']
    for word, places in tokenizer.words(caption):
      word_map = attention[..., list(places)].sum(-1)
      grey = np.uint8(255 * word_map / max(word_map.max(), 1e-12))
      size = tiles[0].size
      tiles.append(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert('RGB'))
      labels.append(word)
    sheets.append(image_grid([tiles], [''], labels, caption))
  width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
  result = Image.new('RGB', (width, height), 'white')
  result.paste(sheets[0], (0, 0))
  result.paste(sheets[1], (0, sheets[0].height))
  return result
