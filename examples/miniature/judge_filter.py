"""What CLIP's filter knows of drawn pairs, where the truth is known: does it keep the better ones?

  python examples/miniature/judge_filter.py

Draws four pairs for each of 200 pairs of captions as `make reproduce` does (20 steps, guidance 2
to 5, share+auto), has CLIP score them, and measures each against the scenes that the captions tell:

- right: pairs whose second picture the oracle takes for the edited scene, with Wilson's interval;
- kept: PSNR between both pictures outside of what the edit changes, in dB;
- AUC: how often a right pair has more of a score than a wrong one; 50% knows nothing.

Prints tables in Markdown; writes OUT/filter.json, from which it goes on if it is there, and
OUT/filter.png.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import plots
import world
from compare_controls import ASSETS, examples, full_caption, measure
from matplotlib.figure import Figure

from ip2p_jax.pairs import filter
from ip2p_jax.pairs.generate import PairGenerator, PairSettings
from ip2p_jax.pairs.prompts import Prompt
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.clip_scores import Clip
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of
from ip2p_jax.pipeline.scores import Scores
from ip2p_jax.storage import write_bytes

FACTORY = Scores(0.2, 0.2, 0.2, 0.4)  # of `make reproduce`
STRICTER = (0.7, 0.8, 0.85, 0.9)  # of direction


def auc(scores: np.ndarray, is_right: np.ndarray) -> float:
  """How often one of the right has a higher score than one of the others; a tie is half."""
  right, wrong = scores[is_right][:, None], scores[~is_right][None]
  return float(((right > wrong) + 0.5 * (right == wrong)).mean())


def row(name: str, chosen: np.ndarray, is_right: np.ndarray, kept: np.ndarray) -> list:
  count = int(chosen.sum())
  if not count:
    return [name, 0, '-', '-']
  share = is_right[chosen].mean()
  right = plots.text('done', plots.Estimate(share, *oracle.wilson(share, count)))
  known = kept[chosen & ~np.isnan(kept)]
  if len(known) < 2:
    return [name, count, right, '-']
  half = 1.96 * known.std(ddof=1) / len(known) ** 0.5
  mean = plots.Estimate(known.mean(), known.mean() - half, known.mean() + half)
  return [name, count, right, plots.text('kept', mean)]


def report(
  kinds: np.ndarray, scores: dict[str, np.ndarray], is_right: np.ndarray, kept: np.ndarray
) -> str:
  def passing(least: Scores):
    return np.all([scores[name] >= value for name, value in least._asdict().items()], 0)

  factory = passing(FACTORY)
  rows = [
    row('all', np.full(len(is_right), True), is_right, kept),
    row('kept by thresholds of the factory', factory, is_right, kept),
    row('removed by them', ~factory, is_right, kept),
    row("kept by the paper's thresholds", passing(filter.PAPER), is_right, kept),
  ]
  rows += [
    row(f'direction of {least} or more', scores['clip_sim_dir'] >= least, is_right, kept)
    for least in STRICTER
  ]
  text = plots.table(['pairs', 'number', 'right', 'kept'], rows)
  strict = scores['clip_sim_dir'] >= STRICTER[2]
  rows = []
  for kind in dict.fromkeys(kinds):
    of = kinds == kind
    passed = [f'{passes[of].mean():.0%}' for passes in (factory, strict)]
    rows.append([kind, int(of.sum()), f'{is_right[of].mean():.0%}', *passed])
  header = ['edit', 'pairs', 'right', 'kept by the factory', f'direction of {STRICTER[2]} or more']
  text += '\n' + plots.table(header, rows)
  known = ~np.isnan(kept)
  text += '\n' + plots.table(
    ['score', 'AUC of right', 'correlation with kept'],
    [
      [label, f'{100 * auc(scores[name], is_right):.0f}%',
       f'{np.corrcoef(scores[name][known], kept[known])[0, 1]:+.2f}']
      for name, label in zip(Scores._fields, filter.LABELS, strict=True)
    ],
  )  # fmt: skip
  return text


def draw(file: Path, scores: dict[str, np.ndarray], is_right: np.ndarray) -> None:
  """Histograms of the scores, of right and of wrong pairs."""
  figure = Figure(figsize=(14, 3.2), layout='tight')
  all_axes = figure.subplots(1, 4)
  for axes, name, label, least in zip(
    all_axes, Scores._fields, filter.LABELS, FACTORY, strict=True
  ):
    values = scores[name]
    edges = np.linspace(values.min(), values.max(), 25)
    for kind, colour, chosen in (('right', 'C2', is_right), ('wrong', 'C3', ~is_right)):
      axes.hist(values[chosen], edges, density=True, alpha=0.6, color=colour, label=kind)
    axes.axvline(least, color='black', linestyle='--', linewidth=1)
    axes.set_xlabel(label)
    axes.set_yticks([])
  all_axes[0].legend()
  figure.savefig(file, dpi=80)


def measured(
  base: Path, clip: Path, some: list[world.Example], samples: int
) -> dict[str, list[float | None]]:
  """Draws and measures; lists of the examples in order, once for each sample."""
  prompts = [
    Prompt(i, '', full_caption(one.scene), full_caption(one.edited_scene))
    for i, one in enumerate(some)
  ]
  checkpoint = workdir.load(base)
  networks = networks_of(checkpoint)
  drawing = PairSettings(
    samples=samples, steps=20, control='share+auto', guidance=(2.0, 5.0), size=world.SIDE,
    batch_size=25 * jax.local_device_count(),
  )  # fmt: skip
  parts = networks, params_of(checkpoint, networks, 'float32'), tokenizer_of(checkpoint, networks)
  generator = PairGenerator(*parts, Clip.load(clip), drawing)
  found = {name: [] for name in ('drawn', 'kept', *Scores._fields)}
  for sample in range(samples):
    _, values = measure(generator, some, prompts, sample)
    for name in found:
      found[name] += values[name]
    print(f'drew {sample + 1} of {samples} for each of {len(some)}', flush=True)
  return found


def main(base: Path, clip: Path, out: Path, count: int, samples: int) -> None:
  file, some = out / 'filter.json', examples(count)
  if not file.exists():
    found = measured(base, clip, some, samples)
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(file, json.dumps(found).encode())
  found = json.loads(file.read_text())
  if len(found['drawn']) != count * samples:
    sys.exit(f'judge_filter.py: error: {file} is of another number of pairs; give another folder.')
  scores = {name: np.array(found[name]) for name in Scores._fields}
  is_right, kept = np.array(found['drawn'], bool), np.array(found['kept'], float)
  kinds = np.array([one.edits[0].kind for one in some] * samples)
  draw(out / 'filter.png', scores, is_right)
  print(report(kinds, scores, is_right, kept))
  print(f'wrote {file} and {out / "filter.png"}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--base', type=Path, default=ASSETS / 'miniature-base')
  parser.add_argument('--clip', type=Path, default=ASSETS / 'miniature-clip')
  parser.add_argument('--out', type=Path, default=Path('out/miniature/filter'))
  parser.add_argument('--count', type=int, default=200)
  parser.add_argument('--samples', type=int, default=4)
  arguments = parser.parse_args()
  main(**vars(arguments))
