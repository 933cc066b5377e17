"""Keeps the good pairs: thresholds on CLIP's numbers, and the best few of each prompt.

Reads folders that `pairs` wrote, whose pictures and numbers stay as they are, so that other
thresholds can be tried at no cost; writes the original's layout, ready to pack and to train on:

  OUT/0000007/prompt.json, metadata.jsonl     one line per pair that stays, the best first
  OUT/0000007/SEED_0.jpg, SEED_1.jpg
  OUT/seeds.json
  OUT/filter.json                             the thresholds; with it, all rows are for training
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ip2p_jax.data.original import FILTERED
from ip2p_jax.errors import InputError
from ip2p_jax.pairs import PROMPT, SCORES, passes, read_scores
from ip2p_jax.similarity import Scores

PAPER = Scores(0.2, 0.2, 0.2, 0.75)
MOST = 4  # pairs of a prompt
LABELS = Scores('picture and caption', 'edited picture and caption', 'direction', 'both pictures')
SAME = 4  # bits of 64 in which two pictures differ that look the same
UNKEPT = ('sample',)  # of a line of scores, not in the original's metadata

Progress = Callable[[int, int], None]


class Yield(NamedTuple):
  """What a filter did. Counts are of pairs, but for `prompts`."""

  drawn: int
  passed: dict[str, int]  # each threshold alone, by name
  passed_all: int
  duplicates: int
  kept: int
  prompts: int  # with a pair that stays
  scores: np.ndarray  # float32 [drawn, 4], of all


def filter_pairs(
  folders: Sequence[Path],
  out: Path,
  thresholds: Scores = PAPER,
  most: int = MOST,
  drop_duplicates: bool = False,
  progress: Progress = lambda done, total: None,
) -> Yield:
  """Writes `out`, whole or not at all. InputError if it exists, or a picture is missing.

  Pictures are hard links where the disk allows, else copies. With `drop_duplicates`, of a prompt's
  pairs that look the same (a hash of both pictures) only the best stays.
  """
  if out.exists():
    raise InputError(f'{out} exists; give a new folder, or delete it.')
  places = _places(folders)
  unfinished = out.with_name(f'.{out.name}.tmp')
  if unfinished.exists():
    shutil.rmtree(unfinished)
  unfinished.mkdir(parents=True)
  seeds, rows, counts = [], [], {'passed_all': 0, 'duplicates': 0}
  for done, place in enumerate(places):
    lines = read_scores(place / SCORES)
    rows += [[line[name] for name in Scores._fields] for line in lines]
    good = [line for line in lines if passes(_scores(line), thresholds)]
    counts['passed_all'] += len(good)
    good.sort(key=lambda line: (line['clip_sim_dir'], line['seed']), reverse=True)
    for line in good if drop_duplicates else good[:most]:
      _check_pictures(place, line)
    if drop_duplicates:
      different = _different(place, good)
      counts['duplicates'] += len(good) - len(different)
      good = different
    if good := good[:most]:
      _copy(place, unfinished / place.name, good)
      seeds.append((place.name, sorted(str(line['seed']) for line in good)))
    progress(done + 1, len(places))
  about = thresholds._asdict() | {'most': most, 'drop_duplicates': drop_duplicates}
  (unfinished / FILTERED).write_text(json.dumps(about) + '\n')
  (unfinished / 'seeds.json').write_text(json.dumps(seeds))
  unfinished.rename(out)
  scores = np.array(rows, np.float32).reshape(-1, len(Scores._fields))
  alone = {
    name: int((scores[:, i] >= least).sum())
    for i, (name, least) in enumerate(thresholds._asdict().items())
  }
  kept = sum(len(of_prompt) for _, of_prompt in seeds)
  return Yield(len(scores), alone, **counts, kept=kept, prompts=len(seeds), scores=scores)


def draw_histograms(scores: np.ndarray, thresholds: Scores, file: Path) -> None:
  """Writes a plot of all scores [N, 4] with the thresholds; needs matplotlib."""
  from matplotlib.figure import Figure  # only plots need it

  figure = Figure(figsize=(12, 3), layout='constrained')
  for i, (axes, title) in enumerate(zip(figure.subplots(1, 4), LABELS, strict=True)):
    axes.hist(scores[:, i], bins=40, color='tab:blue')
    axes.axvline(thresholds[i], color='tab:red')
    share = (scores[:, i] >= thresholds[i]).mean()
    axes.set(title=title, xlabel=f'cosine; {share:.0%} at or above {thresholds[i]:g}')
  figure.savefig(file, dpi=100)


def _places(folders) -> list[Path]:
  """The prompts' folders by name; two workers' folders may share none."""
  found: dict[str, Path] = {}
  for folder in folders:
    here = sorted(file.parent for file in folder.glob(f'*/{SCORES}'))
    if not here:
      raise InputError(f'{folder}: has no pairs; give a folder that `ip2p pairs` wrote.')
    for place in here:
      if place.name in found:
        raise InputError(f'{place} and {found[place.name]} are pairs of the same prompt.')
      found[place.name] = place
  return [found[name] for name in sorted(found)]


def _scores(line) -> Scores:
  return Scores(*(line[name] for name in Scores._fields))


def _pictures(place, line):
  return [place / f'{line["seed"]}_{side}.jpg' for side in (0, 1)]


def _check_pictures(place, line):
  for file in _pictures(place, line):
    if not file.exists():
      raise InputError(
        f'{file} was not kept when it was drawn; use thresholds of at least the released ones, or'
        ' draw again with --keep all.'
      )


def _different(place, lines):
  """Without those that look like a better one."""
  kept, hashes = [], []
  for line in lines:
    one = np.concatenate([_hash(file) for file in _pictures(place, line)])
    if all((one != other).sum() > 2 * SAME for other in hashes):
      kept.append(line)
      hashes.append(one)
  return kept


def _hash(file) -> np.ndarray:
  """bool [64]: where brightness rises from left to right, in 8 x 9 cells."""
  with Image.open(file) as picture:
    cells = np.asarray(picture.convert('L').resize((9, 8), Image.Resampling.BOX), np.int16)
  return (cells[:, 1:] > cells[:, :-1]).ravel()


def _copy(place, target, lines):
  target.mkdir()
  shutil.copyfile(place / PROMPT, target / PROMPT)
  with (target / 'metadata.jsonl').open('w') as file:
    for line in lines:
      kept = {key: value for key, value in line.items() if key not in UNKEPT}
      file.write(json.dumps(kept) + '\n')
  for line in lines:
    for picture in _pictures(place, line):
      try:
        os.link(picture, target / picture.name)
      except OSError:  # another disk
        shutil.copyfile(picture, target / picture.name)
