"""Keeps good pairs: by thresholds on CLIP's scores, and the best few of each prompt.

Reads folders that `pairs` wrote, and does not change them, so that other thresholds can be tried at
no cost. Writes the layout of the original code, ready to pack and to train on:

  OUT/0000007/prompt.json, metadata.jsonl     one line per kept pair, the best first
  OUT/0000007/SEED_0.jpg, SEED_1.jpg
  OUT/seeds.json
  OUT/filter.json                             the thresholds; with it, all rows are for training

Thresholds apply to the stored scores, which are rounded.
"""

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.pairs.pair_files import (
  DIGITS,
  PROMPT,
  SCORES,
  passes,
  read_scores,
  scores_of,
)
from ip2p_jax.pairs.prompts import instruction_fault, listed
from ip2p_jax.pairs.thresholds import MOST, PAPER, RELEASED
from ip2p_jax.pipeline.scores import Scores
from ip2p_jax.progress import Progress, unwatched
from ip2p_jax.storage import FILTERED

LABELS = Scores('image and caption', 'edited image and caption', 'direction', 'both images')
SAME = 4  # of 64 bits; two images that look the same differ in at most so many
DROPPED = ('sample',)  # keys of a line of scores that are not in the original's metadata


class Yield(NamedTuple):
  """The result of a filter. Counts are of pairs, except `prompts`."""

  drawn: int
  passed: dict[str, int]  # per threshold, by name
  passed_all: int
  broken: int  # overflowed when they were drawn
  duplicates: int
  kept: int
  prompts: int  # with a kept pair
  scores: np.ndarray  # float64 [drawn, 4], of all pairs; NaN if it overflowed


def filter_pairs(
  folders: Sequence[Path],
  out: Path,
  thresholds: Scores = PAPER,
  most: int = MOST,
  drop_duplicates: bool = False,
  progress: Progress = unwatched,
) -> Yield:
  """Writes `out` completely or not at all. Does not write it if no pair is kept.

  Images are hard links if the disk allows it, else copies. `drop_duplicates` keeps only the best of
  a prompt's pairs that look the same (by a hash of both images).

  Raises InputError if `out` exists or is being written, a prompt has no instruction, or an image
  is missing.
  """
  with storage.new_folder(out) as place:
    places = _places(folders)
    _check_instructions(places)
    result = _filter(places, place, thresholds, most, drop_duplicates, progress)
    if result.kept:
      place.rename(out)
  return result


def _filter(places, folder, thresholds, most, drop_duplicates, progress) -> Yield:
  seeds, rows, counts = [], [], {'passed_all': 0, 'duplicates': 0}
  for done, place in enumerate(places):
    lines = read_scores(place / SCORES)
    rows += [[np.nan if x is None else x for x in scores_of(line)] for line in lines]
    good = [line for line in lines if passes(scores_of(line), thresholds)]
    good = [line for line in good if not (_is_on_border(line) and _lacks(place, line))]
    counts['passed_all'] += len(good)
    good.sort(key=lambda line: (line['clip_sim_dir'], line['seed']), reverse=True)
    for line in good if drop_duplicates else good[:most]:
      if file := _lacks(place, line):
        raise InputError(
          f'{file} was not kept when it was drawn; use thresholds at or above the released ones,'
          ' or draw again with --keep all.'
        )
    if drop_duplicates:
      different = _different(place, good)
      counts['duplicates'] += len(good) - len(different)
      good = different
    if good := good[:most]:
      _copy(place, folder / place.name, good)
      seeds.append((place.name, sorted(str(line['seed']) for line in good)))
    progress(done + 1, len(places))
  settings = thresholds._asdict() | {'most': most, 'drop_duplicates': drop_duplicates}
  (folder / FILTERED).write_text(json.dumps(settings) + '\n')
  (folder / 'seeds.json').write_text(json.dumps(seeds))
  scores = np.array(rows, np.float64).reshape(-1, len(Scores._fields))
  passed = {
    name: int((scores[:, i] >= least).sum())
    for i, (name, least) in enumerate(thresholds._asdict().items())
  }
  counts['broken'] = int(np.isnan(scores).any(1).sum())
  kept = sum(len(prompt_seeds) for _, prompt_seeds in seeds)
  return Yield(len(scores), passed, **counts, kept=kept, prompts=len(seeds), scores=scores)


def draw_histograms(scores: np.ndarray, thresholds: Scores, file: Path) -> None:
  """Writes a plot of all scores [N, 4] with the thresholds. Needs matplotlib."""
  from matplotlib.figure import Figure  # optional

  figure = Figure(figsize=(12, 3), layout='constrained')
  for i, (axes, title) in enumerate(zip(figure.subplots(1, 4), LABELS, strict=True)):
    axes.hist(scores[np.isfinite(scores[:, i]), i], bins=40, color='tab:blue')
    axes.axvline(thresholds[i], color='tab:red')
    share = (scores[:, i] >= thresholds[i]).mean()
    axes.set(title=title, xlabel=f'cosine; {share:.1%} at or above {thresholds[i]:g}')
  png = io.BytesIO()
  figure.savefig(png, dpi=100, format='png')
  storage.write_bytes(storage.folder(file), png.getvalue())


def _places(folders) -> list[Path]:
  """The prompts' folders, sorted by name. Raises InputError if a prompt is in two folders."""
  places: dict[str, Path] = {}
  for folder in folders:
    prompts = sorted(file.parent for file in folder.glob(f'*/{SCORES}'))
    if (folder / FILTERED).exists():
      raise InputError(f'{folder}: was filtered already; give the folder that it came from.')
    if not prompts:
      raise InputError(f'{folder}: has no pairs; give a folder that `ip2p pairs` wrote.')
    for place in prompts:
      if place.name in places:
        raise InputError(f'{place} and {places[place.name]} are pairs of the same prompt.')
      places[place.name] = place
  return [places[name] for name in sorted(places)]


def _check_instructions(places) -> None:
  """Raises InputError if a prompt has no instruction: an editor learns nothing from its pairs."""
  faults = []
  for place in places:
    try:
      prompt = json.loads((place / PROMPT).read_bytes())
      fault = instruction_fault(prompt) if isinstance(prompt, dict) else 'is not a JSON object'
    except FileNotFoundError:
      fault = 'is missing'
    except ValueError as error:
      fault = f'is damaged ({error})'
    if fault:
      faults.append(f'{place / PROMPT} {fault}')
  if faults:
    raise InputError(
      f'{listed(faults)}; add it to the file of prompts, and run `ip2p pairs` again, which draws'
      ' nothing twice.'
    )


def _image_files(place, line):
  return [place / f'{line["seed"]}_{side}.jpg' for side in (0, 1)]


def _lacks(place, line) -> Path | None:
  """A missing image file of the pair, or None."""
  return next((file for file in _image_files(place, line) if not file.exists()), None)


def _is_on_border(line) -> bool:
  """Whether a pair passes the released thresholds, perhaps only because its scores were rounded.

  Older versions applied the thresholds before rounding, and wrote no images of such a pair.
  """
  scores, half = scores_of(line), 10**-DIGITS / 2
  is_near = any(value - least < half for value, least in zip(scores, RELEASED, strict=True))
  return passes(scores, RELEASED) and is_near


def _different(place, lines):
  """The lines of pairs that look like no earlier pair."""
  different, hashes = [], []
  for line in lines:
    bits = np.concatenate([_hash(file) for file in _image_files(place, line)])
    if all((bits != earlier).sum() > 2 * SAME for earlier in hashes):
      different.append(line)
      hashes.append(bits)
  return different


def _hash(file) -> np.ndarray:
  """bool [64]: where brightness rises from left to right, in 8 rows of 9 cells."""
  with Image.open(file) as image:
    cells = np.asarray(image.convert('L').resize((9, 8), Image.Resampling.BOX), np.int16)
  return (cells[:, 1:] > cells[:, :-1]).ravel()


def _copy(place, target, lines):
  target.mkdir()
  shutil.copyfile(place / PROMPT, target / PROMPT)
  with (target / 'metadata.jsonl').open('w') as file:
    for line in lines:
      metadata = {key: value for key, value in line.items() if key not in DROPPED}
      file.write(json.dumps(metadata) + '\n')
  for line in lines:
    for file in _image_files(place, line):
      try:
        os.link(file, target / file.name)
      except OSError:  # another disk
        shutil.copyfile(file, target / file.name)
