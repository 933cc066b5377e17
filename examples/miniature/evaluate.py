"""Measures the miniature on held-out examples, and draws what its README shows.

  python examples/miniature/evaluate.py                      (about 20 minutes on 2 CPU cores)
  python examples/miniature/evaluate.py --size full          (more examples and seeds: an hour)
  python examples/miniature/evaluate.py --only sweep --first 100000   (other held-out examples)

Every measured point is a line of OUT/points.jsonl and not measured again, unless the weights, the
world or the oracle are others. Tables go to OUT/tables.md, figures beside this file.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import plots
import world
from bench import Bench, Setting, oracle_summary, summary, verdicts

from ip2p_jax import bundled
from ip2p_jax.cli import console
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.sdedit import SAMPLER
from ip2p_jax.pipeline.workdir import is_workdir
from ip2p_jax.storage import write_bytes

# What the shipped editor is used with.
DEFAULTS = {
  'steps': bundled.STEPS,
  'text_guidance': bundled.TEXT_GUIDANCE,
  'image_guidance': bundled.IMAGE_GUIDANCE,
}
DEFAULT = Setting('editor', **DEFAULTS, sampler=bundled.SAMPLER)
SAMPLERS = ('euler_ancestral', 'euler', 'heun', 'ddim', 'dpmpp_2m')
SHOWN = 16  # examples of the gallery
HERE = Path(__file__).parent


class Size(NamedTuple):
  """How many held-out examples each part takes, and which settings."""

  count: int = 500  # at the defaults
  sdedit: int = 500
  sweep: int = 100
  sweep_seeds: int = 3
  samplers: int = 100
  averages: int = 200
  seeds: int = 200
  num_seeds: int = 5
  batch: int = 50
  text_scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 7.5)
  image_scales: Sequence[float] = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
  strengths: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
  sdedit_scales: Sequence[float] = (2.0, 4.0, 7.5)
  steps: Sequence[int] = (5, 10, 20, 30, 50)


SIZES = {
  'full': Size(),
  'short': Size(
    sdedit=150, sweep=50, sweep_seeds=1, samplers=50, averages=100, seeds=50, steps=(5, 10, 20, 30)
  ),
  'quick': Size(
    *(16, 4, 4, 1, 4, 4, 4, 2, 4), (1.5, 3.0), (1.5, 2.0), (0.3, 0.6), (2.0, 4.0), steps=(1, 2)
  ),
}


# Parts: each measures what it needs, draws its figure and returns its section in Markdown.


def part_defaults(bench: Bench, size: Size, figures: Path) -> str:
  point = bench.measure(DEFAULT, size.count)
  judged, examples = verdicts(point), bench.examples[: size.count]
  found = summary([point])
  names = (*world.KINDS, world.TWO_STEPS, 'trained phrasings', 'new phrasings')
  groups = {name: [] for name in names}
  for example, verdict in zip(examples, judged, strict=True):
    groups[world.kind_of(example)].append(verdict)
    groups['new phrasings' if example.is_new_phrasing else 'trained phrasings'].append(verdict)
  rows = [['**all**', len(judged), *(plots.text(name, found[name]) for name in ('done', 'kept'))]]
  for name, group in groups.items():
    if group:
      of = oracle_summary(group)
      rows.append(
        [name, len(group), plots.text('done', of['done']), plots.text('kept', of['kept'])]
      )
  shown = range(min(SHOWN, len(examples)))
  parts = [shown[start : start + bench.batch] for start in shown[:: bench.batch]]
  edits = [edit for rows in parts for edit in bench.edit(DEFAULT, rows)]
  plots.gallery(figures / 'gallery.png', [
    (world.picture(one.scene), one.instruction, edit, oracle.judge(one, edit).is_done,
     world.picture(one.edited_scene))
    for one, edit in zip(examples, edits, strict=False)
  ])  # fmt: skip
  settings = ', '.join(f'{name.replace("_", " ")} {value:g}' for name, value in DEFAULTS.items())
  return (
    f'At the defaults ({settings}, {bundled.SAMPLER}), with 95% intervals:\n\n'
    + plots.table(['edit', 'examples', 'done', 'kept'], rows)
    + f'\nCLIP direction {plots.text("direction", found["direction"])},'
    f' CLIP image {plots.text("consistency", found["consistency"])}.\n'
  )


def part_sweep(bench: Bench, size: Size, figures: Path) -> str:
  sections, panels = [], []
  for name, scales in (('text', size.text_scales), ('image', size.image_scales)):
    curve = sweep(bench, size, f'{name}_guidance', scales)
    panels.append((f'{name} scale', curve, DEFAULTS[f'{name}_guidance']))
    other = 'image' if name == 'text' else 'text'
    sections.append(
      f'By {name} scale, {other} scale {DEFAULTS[f"{other}_guidance"]:g}; {size.sweep} examples,'
      f' seeds: {size.sweep_seeds}.\n\n' + plots.summary_table(f'{name} scale', curve)
    )
  plots.scales(figures / 'scales.png', panels)
  scale_grid(bench, size, figures / 'scale_grid.png')
  return '\n'.join(sections)


def sweep(bench: Bench, size: Size, name: str, scales: Sequence[float]) -> list:
  """[(scale, summary)], with the default among the scales, and the other scale at its default."""
  settings = [DEFAULT._replace(**{name: scale}) for scale in sorted({*scales, DEFAULTS[name]})]
  return [(getattr(s, name), bench.summary(s, size.sweep, size.sweep_seeds)) for s in settings]


def scale_grid(bench: Bench, size: Size, path: Path, row: int = 0) -> None:
  """One example edited with every pair of scales."""
  texts, images = size.text_scales, size.image_scales
  pairs = [(text, image) for text in texts for image in images]
  edits = []
  for start in range(0, len(pairs), bench.batch):
    of_text, of_image = zip(*pairs[start : start + bench.batch], strict=True)
    scales = {'text_guidance': of_text, 'image_guidance': of_image}
    edits += list(bench.edit(DEFAULT, [row] * len(of_text), **scales))
  example, shape = bench.examples[row], (len(texts), len(images))
  is_done = np.reshape([oracle.judge(example, edit).is_done for edit in edits], shape)
  edits = np.reshape(edits, (*shape, *edits[0].shape))
  title = f'{example.instruction} (green: done)'
  plots.scale_grid(path, edits, is_done, (texts, images), title)


def part_sdedit(bench: Bench, size: Size, figures: Path) -> str:
  setting = DEFAULT._replace(method='sdedit', sampler=SAMPLER, image_guidance=1.0, strength=0.6)
  tried = [
    (scale, bench.summary(setting._replace(text_guidance=scale), min(size.sweep, size.sdedit)))
    for scale in size.sdedit_scales
  ]
  best, _ = max(tried, key=lambda pair: pair[1]['done'].mean)
  setting = setting._replace(text_guidance=best)
  curve = [(s, bench.summary(setting._replace(strength=s), size.sdedit)) for s in size.strengths]
  ours = summary([bench.measure(DEFAULT, size.count)])
  images = sweep(bench, size, 'image_guidance', [s for s in size.image_scales if s <= 2.5])
  curves = {'editor, by image scale': images, f'SDEdit (text {best:g}), by strength': curve}
  plots.trade_off(figures / 'trade_off.png', curves)
  beaten = [s for s, of in curve if all(ours[k].mean > of[k].mean for k in ('done', 'kept'))]
  rows = [('editor, defaults', ours), *((f'SDEdit, {s:g}', found) for s, found in curve)]
  return (
    f'Text scale of SDEdit at strength 0.6, of which the one with most edits done is taken:\n\n'
    f'{plots.summary_table("text scale", tried)}\n'
    f'The editor ({size.count} examples) and SDEdit by strength ({size.sdedit} examples):\n\n'
    f'{plots.summary_table("method", rows)}\n'
    f'The editor does more edits and keeps more of the rest at {len(beaten)} of'
    f' {len(curve)} strengths.\n'
  )


def part_samplers(bench: Bench, size: Size, figures: Path) -> str:
  curves = {}
  for name in SAMPLERS:
    of = lambda steps, name=name: DEFAULT._replace(sampler=name, steps=steps)
    curves[name] = [(steps, bench.summary(of(steps), size.samplers)) for steps in size.steps]
  plots.by_steps(figures / 'samplers.png', curves)
  shown = lambda of: f'{100 * of["done"].mean:.0f}%, {of["kept"].mean:.1f} dB'
  rows = [[name, *(shown(of) for _, of in curve)] for name, curve in curves.items()]
  half = np.mean([of['done'].high - of['done'].low for c in curves.values() for _, of in c]) / 2
  return (
    f'Done and kept by sampler and steps; {size.samplers} examples, so that "done" is known to'
    f' about {100 * half:.0f} points:\n\n'
    + plots.table(['sampler', *(f'{steps} steps' for steps in size.steps)], rows)
  )


def part_fast(bench: Bench, size: Size, figures: Path) -> str:
  """Settings that take less, and what they lose."""
  guided = lambda low, high: DEFAULT._replace(guided_from=low, guided_to=high)
  fewer = lambda steps, **more: DEFAULT._replace(sampler='dpmpp_2m', steps=steps, **more)
  tried = {
    'the default': DEFAULT,
    'guided in 0.1 to 0.7 of the steps': guided(0.1, 0.7),
    'guided in 0.2 to 0.8': guided(0.2, 0.8),
    'guided in 0 to 0.5': guided(0.0, 0.5),
    'dpmpp_2m, 10 steps': fewer(10),
    'dpmpp_2m, 10 steps, Karras': fewer(10, karras=True),
    'dpmpp_2m, 5 steps': fewer(5),
  }
  rows = []
  for name, setting in tried.items():
    part = setting.guided_to - setting.guided_from
    rows.append(
      (
        f'{name} ({setting.steps * (1 + 2 * part):.0f} predictions)',
        bench.summary(setting, size.samplers),
      )
    )
  return (
    'By how often the network predicts for an edit, three times in a guided step and else once;'
    f' {size.samplers} examples:\n\n' + plots.summary_table('setting', rows)
  )


def part_averages(bench: Bench, size: Size, figures: Path) -> str:
  if not is_workdir(bench.paths['run']):
    print(f'no training run at {bench.paths["run"]}: leaving out raw against averaged weights')
    return ''
  rows = [
    (name, bench.summary(DEFAULT._replace(method=method), size.averages))
    for name, method in (('averaged (EMA)', 'averaged'), ('raw', 'raw'))
  ]
  head = f'Averaged against raw weights of the same run; {size.averages} examples:\n\n'
  return head + plots.summary_table('weights', rows)


def part_seeds(bench: Bench, size: Size, figures: Path) -> str:
  count, seeds = size.seeds, range(size.num_seeds)
  found = [summary([bench.measure(DEFAULT._replace(seed=seed), count)]) for seed in seeds]
  means = {name: [of[name].mean for of in found] for name in plots.LABELS}
  spread = ', '.join(
    f'{name} {np.mean(of):.3g} +- {np.std(of, ddof=1):.2g}' for name, of in means.items()
  )
  return (
    f'By seed of the noise; {count} examples:\n\n'
    + plots.summary_table('seed', list(zip(seeds, found, strict=True)))
    + f'\nMean and standard deviation over seeds: {spread}.\n'
  )


PARTS: dict[str, Callable[[Bench, Size, Path], str]] = {
  'defaults': part_defaults,
  'sweep': part_sweep,
  'sdedit': part_sdedit,
  'samplers': part_samplers,
  'fast': part_fast,
  'averages': part_averages,
  'seeds': part_seeds,
}


def main(bench: Bench, size: Size, figures: Path, only: str | None = None) -> None:
  """Runs the parts, and writes the sections of all that were ever run."""
  for name, part in PARTS.items():
    if only in (None, name):
      print(f'== {name}', flush=True)
      write_bytes(bench.out / 'sections' / f'{name}.md', part(bench, size, figures).encode())
  files = [bench.out / 'sections' / f'{name}.md' for name in PARTS]
  text = '\n'.join(file.read_text() for file in files if file.exists() and file.stat().st_size)
  write_bytes(bench.out / 'tables.md', text.encode())
  print(f'{text}\nwrote {bench.out / "tables.md"}, and figures to {figures}')


def parse(arguments: Sequence[str] | None = None) -> tuple[Bench, Size, Path, str | None]:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--ckpt', type=Path, default=Path('assets/miniature'), help='the editor')
  parser.add_argument('--base', type=Path, default=Path('assets/miniature-base'), help='of SDEdit')
  parser.add_argument('--clip', type=Path, default=Path('assets/miniature-clip'))
  parser.add_argument(
    '--run', type=Path, default=Path('out/miniature/run-2'), help='for raw weights'
  )
  parser.add_argument('--out', type=Path, default=Path('out/miniature/evaluation'))
  parser.add_argument('--figures', type=Path, default=HERE / 'figures')
  parser.add_argument('--size', choices=SIZES, default='short', help='how much to measure')
  parser.add_argument('--quick', action='store_const', const='quick', dest='size')
  parser.add_argument('--first', type=int, default=0, help='seed of the first example')
  parser.add_argument('--count', type=int, help='examples at the default settings (500)')
  parser.add_argument('--only', choices=PARTS, help='a single part')
  given = parser.parse_args(arguments)
  size = SIZES[given.size]
  if given.count is not None:
    if given.count < 2:
      raise InputError(f'--count is {given.count}; give 2 or more.')
    size = size._replace(count=given.count)
  paths = {'editor': given.ckpt, 'base': given.base, 'clip': given.clip, 'run': given.run}
  bench = Bench(paths, given.out, max(size.count, size.sdedit), size.batch, given.first)
  return bench, size, given.figures, given.only


if __name__ == '__main__':
  with console.one_line('evaluate.py', 'use a smaller --size.'):
    console.cache_compilations()
    main(*parse())
