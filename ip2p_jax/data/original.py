"""The folders of the original code: one per prompt, with up to four pairs of images.

DIR/seeds.json                        [["0000000", ["123", "456"]], ...], by name; may be absent
DIR/0000000/prompt.json               {"caption" or "input": ..., "edit": ..., "output": ...}
DIR/0000000/123_0.jpg, 123_1.jpg      before, after
DIR/shard-00/0000000/...              the same one level down
DIR/filter.json                       if `ip2p filter` wrote the folder; then there are no splits
"""

import concurrent.futures
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ip2p_jax.data import columns
from ip2p_jax.data.rows import Pair, Row
from ip2p_jax.errors import InputError
from ip2p_jax.storage import FILTERED

THREADS = 16  # list folders; they mostly wait for a network disk


class Original:
  """A source of one row per prompt, with all of its pairs. Reads files when a row is asked for."""

  def __init__(self, folder: str, entries: Iterable[tuple[str, list[str]]], task: str):
    """`entries` are (name of the prompt's folder, seeds), one per row."""
    self._folder, self._task = folder, task
    # One array of bytes: half a million small lists take long to copy to worker processes.
    self._entries = np.array([json.dumps(entry).encode() for entry in entries], np.bytes_)

  def __len__(self) -> int:
    return len(self._entries)

  def entry(self, i: int) -> tuple[str, list[str]]:
    """The name of a prompt's folder, and the seeds of its pairs."""
    name, seeds = json.loads(self._entries[i])
    if not seeds:
      folder = os.path.join(self._folder, name)
      raise InputError(f'{folder}: seeds.json lists no pair of it; delete seeds.json to list anew')
    return name, seeds

  def __getitem__(self, i: int) -> Row:
    name, seeds = self.entry(i)
    folder = os.path.join(self._folder, name)
    texts = read_texts(folder)
    is_edit = self._task == 'edit'
    key = 'edit' if is_edit else 'output'
    if not texts[key]:
      raise InputError(f'{folder}/prompt.json: has no text {key!r}; fill it in or take it out')
    pairs = [
      Pair(
        _read_image(folder, f'{seed}_0.jpg') if is_edit else None,
        _read_image(folder, f'{seed}_1.jpg'),
      )
      for seed in seeds
    ]
    return Row(
      folder,
      (texts[key],),
      tuple(pairs),
      columns.may_flip(texts[key]),
      texts['caption'] if is_edit else '',
      texts['output'],
      texts['image'],
    )


def read_texts(folder: str) -> dict[str, str]:
  """The texts of a prompt's folder: 'caption', 'edit', 'output', and 'image'; '' if absent.

  'image' names the photo that all its pairs start from.
  """
  prompt = _read_prompt(os.path.join(folder, 'prompt.json'))
  texts = {
    key: ' '.join(columns.texts(prompt.get(key)))
    for key in ('input', 'caption', 'edit', 'output', 'image')
  }
  return texts | {'caption': texts.pop('input') or texts['caption']}


def looks_original(folder: str) -> bool:
  """Whether there is a seeds.json, or a prompt.json in one of the first folders or subfolders."""
  if os.path.isfile(os.path.join(folder, 'seeds.json')):
    return True
  outer = list(itertools.islice(_folders(folder), 20))
  inner = [
    os.path.join(name, subfolder)
    for name in outer
    for subfolder in itertools.islice(_folders(os.path.join(folder, name)), 20)
  ]
  return any(os.path.isfile(os.path.join(folder, name, 'prompt.json')) for name in outer + inner)


def open_original(folder: str, split: str, task: str = 'edit', all_train: bool = False) -> Original:
  """The rows of a split, as in the original: 90 % train, then 5 % validation, then 5 % test.

  With `all_train`, and in a folder of `ip2p filter`, all rows are 'train', and `--holdout` decides.

  Raises InputError if seeds.json is damaged.
  """
  entries = _read_seeds(folder) or _list(folder)
  if all_train or os.path.isfile(os.path.join(folder, FILTERED)):
    return Original(folder, entries if split == 'train' else [], task)
  return Original(folder, entries[split_of(len(entries), split)], task)


def split_of(count: int, split: str) -> slice:
  """The positions of a split among `count` rows, in order and rounded down, as in the original."""
  first, second = count * 9 // 10, count * 19 // 20
  return {
    'train': slice(first),
    'validation': slice(first, second),
    'test': slice(second, count),
  }[split]


def _read_seeds(folder):
  path = os.path.join(folder, 'seeds.json')
  if not os.path.isfile(path):
    return None
  try:
    entries = json.loads(Path(path).read_bytes())
    for name, seeds in entries:
      if not (isinstance(name, str) and isinstance(seeds, list)):
        raise ValueError(f'the entry {[name, seeds]} is not a name and a list of seeds')
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise InputError(f'{path}: cannot be read ({error}); delete it to list anew') from error
  return entries


def _list(folder):
  """The content of an absent seeds.json: (name, seeds) of all folders with a `*_0.jpg`, sorted."""
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    scan = lambda name: (name, *_scan(os.path.join(folder, name)))
    scanned = list(pool.map(scan, _folders(folder)))
    deeper = [f'{name}/{inner}' for name, seeds, inners in scanned if not seeds for inner in inners]
    scanned += pool.map(scan, deeper)
  entries = [(name, seeds) for name, seeds, _ in scanned if seeds]
  return sorted(entries, key=lambda entry: entry[0].split('/'))


def _scan(folder):
  """The seeds of a folder, in order of the file names, and its subfolders."""
  with os.scandir(folder) as entries:
    names = [(entry.name, entry.is_dir()) for entry in entries]
  inputs = sorted(name for name, is_folder in names if name.endswith('_0.jpg') and not is_folder)
  folders = [name for name, is_folder in names if is_folder and not name.startswith('.')]
  return [name.split('_')[0] for name in inputs], folders


def _folders(folder):
  with os.scandir(folder) as entries:
    yield from (entry.name for entry in entries if entry.is_dir() and entry.name[0] != '.')


def _read_prompt(path):
  try:
    prompt = json.loads(Path(path).read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(f'{path}: cannot be read ({reason}); fix it or remove it') from error
  if not isinstance(prompt, dict):
    raise InputError(f'{path}: does not hold keys and texts; fix it or remove it')
  return prompt


def _read_image(folder, name):
  try:
    return Path(folder, name).read_bytes()
  except OSError as error:
    reason = error.strerror
    raise InputError(f'{folder}: cannot read {name} ({reason}); mend or take it out') from error
