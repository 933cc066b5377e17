"""Measures the miniature on held-out examples: every table and figure of its README.

  python examples/miniature/evaluate.py                     (about two hours on 2 CPU cores)
  python examples/miniature/evaluate.py --size quick        (minutes, to see that it runs)
  python examples/miniature/evaluate.py --only figure8

Everything is a command of `ip2p`, printed as it is run. Killed and called again, it continues. The
tables are OUT/*/report.md.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plots
import typer
import world
from PIL import Image

from ip2p_jax import bundled
from ip2p_jax.cli import console, main
from ip2p_jax.evaluation import figures, report, run
from ip2p_jax.images import image_grid
from ip2p_jax.storage import write_bytes

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / 'assets'
CLIP, BASE = ASSETS / 'miniature-clip', ASSETS / 'miniature-base'
ORACLE = ('--x', 'done', '--y', 'kept')
SHOWN = ('--scores', 'done,kept,clip_sim_dir,clip_sim_image')
GALLERY, SHEET = 16, 6  # examples
SDEDIT = {
  'steps': bundled.STEPS,
  'text_guidance': 2,
}  # of 2, 4 and 7.5, the one with most edits done
# The authors' numbers, but for guidance: at 7.5 this base draws badly, with any method.
METHODS = {
  'identity': {},
  'vae': {},
  'sdedit-caption': SDEDIT,
  'sdedit-instruction': SDEDIT,
  'ddim': {'guidance': 2},
  'direct': {'guidance': 2},
  'null-text': {'guidance': 2},
  'edit-friendly': {'target_guidance': 4, 'source_guidance': 1},
  'plug-and-play': {'guidance': 2, 'negative': ''},
  'text2live': {  # as in text2live.py
    'levels': 4,
    'width': 64,
    'views': 8,
    'steps': 300,
    'sparsity': 40,
    'templates': '{}|{}.',
    'screen_templates': '{} on a green background|{} on green',
  },
}
FEWER = ('--sampler', 'dpmpp_2m', '--steps', 10)  # as good here, see the part `fast`
SLOW = ('text2live',)  # minutes for each image


class Size(NamedTuple):
  """How many held-out examples each part takes, and which settings."""

  defaults: int = 500
  figure: int = 200  # of figures 8 and 10
  sweep: int = 100
  samplers: int = 50
  methods: int = 32
  slow: int = 8  # of SLOW methods
  seeds: int = 5
  text_scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 7.5)
  steps: Sequence[int] = (5, 10, 20, 30)
  batch: int = 50


SIZES = {'full': Size(), 'quick': Size(4, 2, 2, 2, 2, 0, 2, (1.0, 2.0), (1, 2), 4)}


class Bench(NamedTuple):
  """Where the evaluation is, and of what."""

  out: Path
  figures: Path
  size: Size
  ckpt: Path
  editors: Sequence[str]

  def ip2p(self, *words) -> None:
    """Runs a command in this process, so that compiled programs are used again."""
    words = [str(word) for word in words]
    print(f'$ ip2p {shlex.join(words)}', flush=True)
    typer.main.get_command(main.app())(words, standalone_mode=False)

  def evaluate(self, folder: str, samples: int, *words) -> Path:
    """One evaluation, in OUT/folder."""
    self.ip2p(
      *('evaluate', self.out / 'held-out', self.out / folder, *words, '--samples', samples),
      *('--clip', CLIP, '--scorer', f'{HERE / "oracle.py"}:scorer'),
      *('--batch-size', min(self.size.batch, samples)),
    )
    return self.out / folder

  def editor(self, folder: str, samples: int, *words) -> Path:
    return self.evaluate(folder, samples, '--ckpt', self.ckpt, *words)

  def compare(self, folders: Sequence[Path], name: str) -> None:
    """Tables and two plots, by CLIP and by the oracle, for the README."""
    for kind, axes in (('clip', ()), ('oracle', ORACLE)):
      folder = self.out / f'{name}-{kind}'
      self.ip2p('compare', *folders, '-o', folder, *axes, *SHOWN)
      plots.save_small(Image.open(folder / 'report.png'), self.figures / f'{name}-{kind}.png')


def part_defaults(bench: Bench) -> None:
  """The defaults by kind of edit and by phrasing, and a gallery."""
  folder = bench.editor('editor/defaults', bench.size.defaults)
  bench.ip2p('compare', folder, '-o', bench.out / 'defaults', *SHOWN)
  results = {row['id']: row for row in run.read_results(folder)}
  examples = {id: world.example(int(id), 'test') for id in results}
  phrasings = {'trained phrasings': [], 'new phrasings': []}
  for id, row in results.items():
    phrasings['new phrasings' if examples[id].is_new_phrasing else 'trained phrasings'].append(row)
  scores = SHOWN[1].split(',')
  table = report.markdown(report.summarize(phrasings, scores), scores, name='phrasing')
  write_bytes(bench.out / 'defaults' / 'phrasings.md', table.encode())
  print(table)
  shown = list(examples)[:GALLERY]
  plots.gallery(
    bench.figures / 'gallery.png',
    [examples[id] for id in shown],
    [np.asarray(Image.open(folder / run.EDITS / f'{id}.png')) for id in shown],
    [bool(results[id]['done']) for id in shown],
  )


def part_figure8(bench: Bench) -> None:
  settings = [word for name, value in SDEDIT.items() for word in ('--set', f'{name}={value}')]
  folder = bench.evaluate(
    'figure8', bench.size.figure, '--figure', 8, '--ckpt', bench.ckpt, '--base', BASE, *settings
  )
  bench.compare(_points(folder), 'figure8')


def part_figure10(bench: Bench) -> None:
  """Editors that learned from training sets of different size (--editors)."""
  if not bench.editors:
    print('no --editors: leaving out figure 10')
    return
  ckpts = [word for path in bench.editors for word in ('--ckpt', path)]
  folder = bench.evaluate('figure10', bench.size.figure, '--figure', 10, *ckpts, *FEWER)
  names = figures.named(bench.editors)
  bench.compare([point for name in names for point in _points(folder, name)], 'figure10')


def part_scales(bench: Bench) -> None:
  """By text scale, beside the image scales of figure 8; and one example at pairs of scales."""
  for scale in bench.size.text_scales:
    bench.editor(f'text scale/{scale:g}', bench.size.sweep, '--cfg-text', scale)
  for scale in (1, 1.2, 1.5, 2, 2.5, 3):
    bench.editor(f'image scale/{scale:g}', bench.size.sweep, '--cfg-image', scale)
  folders = [*_points(bench.out, 'text scale'), *_points(bench.out, 'image scale')]
  bench.compare(folders, 'scales')
  one = world.example(0, 'test')
  scene = bench.out / 'scene.png'
  Image.fromarray(world.picture(one.scene)).save(scene)
  texts = ','.join(f'{scale:g}' for scale in bench.size.text_scales)
  bench.ip2p(
    *('edit', '--ckpt', bench.ckpt, '-i', scene, '-e', one.instruction, '--seed', 0, '--grid'),
    *('-o', bench.out / 'grid.png', '--grid-text', texts, '--grid-image', '1,1.2,1.5,2,2.5,3'),
  )
  plots.save_small(Image.open(bench.out / 'grid.png'), bench.figures / 'scale_grid.png')


def part_samplers(bench: Bench) -> None:
  for sampler in ('euler_ancestral', 'euler', 'heun', 'ddim', 'dpmpp_2m'):
    for steps in bench.size.steps:
      bench.editor(
        f'{sampler}/{steps}', bench.size.samplers, '--sampler', sampler, '--steps', steps
      )
  names = ('euler_ancestral', 'euler', 'heun', 'ddim', 'dpmpp_2m')
  bench.compare([point for name in names for point in _points(bench.out, name)], 'samplers')


def part_fast(bench: Bench) -> None:
  """Settings that take less, and what they lose."""
  tried = {
    'default': (),
    'guided in 0.1 to 0.7': ('--interval', 0.1, 0.7),
    'guided in 0.2 to 0.8': ('--interval', 0.2, 0.8),
    'guided in 0 to 0.5': ('--interval', 0, 0.5),
    'dpmpp_2m, 10 steps': FEWER,
    'dpmpp_2m, 10 steps, Karras': (*FEWER, '--karras'),
    'dpmpp_2m, 5 steps': (*FEWER[:-1], 5),
  }
  folders = [
    bench.editor(f'{name}/fast', bench.size.sweep, *words) for name, words in tried.items()
  ]
  bench.compare(folders, 'fast')


def part_seeds(bench: Bench) -> None:
  folders = [
    bench.editor(f'seed {seed}/defaults', bench.size.samplers, '--seed', seed)
    for seed in range(bench.size.seeds)
  ]
  bench.compare(folders, 'seeds')


def part_methods(bench: Bench) -> None:
  """Every method of the table beside the editor, on the same examples."""
  size = bench.size
  folders = [bench.editor('editor/methods', size.methods)]
  for method, settings in METHODS.items():
    count = size.slow if method in SLOW else size.methods
    base = () if method == 'identity' else ('--base', CLIP if method == 'text2live' else BASE)
    words = [word for name, value in settings.items() for word in ('--set', f'{name}={value}')]
    if count:
      folders.append(bench.evaluate(f'{method}/methods', count, '--method', method, *base, *words))
  bench.compare(folders, 'methods')
  _sheet(bench.figures / 'methods.png', folders)


def _sheet(path: Path, folders: Sequence[Path]) -> None:
  """Some examples, edited by every method."""
  ids = list(run.read_results(folders[-1]))[:SHEET]
  examples = [world.example(int(row['id']), 'test') for row in ids]
  rows = []
  for row, one in zip(ids, examples, strict=True):
    edits = [Image.open(folder / run.EDITS / f'{row["id"]}.png') for folder in folders]
    shown = [Image.fromarray(world.picture(scene)) for scene in (one.scene, one.edited_scene)]
    rows.append([shown[0], *edits, shown[1]])
  names = ['input', *(folder.parent.name for folder in folders), 'truth']
  labels = [one.instruction for one in examples]
  plots.save_small(image_grid(rows, labels, names), path)


PARTS = {
  'defaults': part_defaults,
  'figure8': part_figure8,
  'figure10': part_figure10,
  'scales': part_scales,
  'samplers': part_samplers,
  'fast': part_fast,
  'seeds': part_seeds,
  'methods': part_methods,
}


def _points(folder: Path, curve: str = '*') -> list[Path]:
  """The evaluations of curves, in the order of their numbers."""
  files = folder.glob(f'{curve}/*/{run.SETTINGS}')
  points = [file.parent for file in files if not file.parent.name.isalpha()]
  return sorted(points, key=lambda point: (point.parent.name, float(point.name)))


def parse(arguments: Sequence[str] | None = None) -> tuple[Bench, str | None]:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--ckpt', type=Path, default=ASSETS / 'miniature', help='the editor')
  parser.add_argument('--editors', nargs='*', default=(), help='of figure 10, as NAME=PATH')
  parser.add_argument('--out', type=Path, help='by default out/miniature/evaluation')
  parser.add_argument('--figures', type=Path, help='by default beside this file; quick: in --out')
  parser.add_argument('--size', choices=SIZES, default='full', help='how much to measure')
  parser.add_argument('--only', choices=PARTS, nargs='*', help='some of the parts')
  given = parser.parse_args(arguments)
  is_full = given.size == 'full'
  out = given.out or Path('out/miniature/evaluation' if is_full else 'out/miniature/quick')
  figures = given.figures or (HERE / 'figures' if is_full else out / 'figures')
  bench = Bench(out, figures, SIZES[given.size], given.ckpt, given.editors)
  return bench, given.only


def evaluate(bench: Bench, only: Sequence[str] | None) -> None:
  world.write_held_out(bench.out / 'held-out', max(bench.size[:5]))
  bench.figures.mkdir(parents=True, exist_ok=True)
  for name, part in PARTS.items():
    if not only or name in only:
      print(f'== {name}', flush=True)
      part(bench)


if __name__ == '__main__':
  with console.one_line('evaluate.py', 'use --size quick.'):
    console.cache_compilations()
    evaluate(*parse())
