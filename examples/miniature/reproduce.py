"""The paper's whole data factory in the drawn world, from captions to an editor and its score.

  python examples/miniature/reproduce.py out/reproduce               (two to three hours)
  python examples/miniature/reproduce.py out/reproduce-small --small  (six minutes)

The shipped writer makes instructions and edited captions of captions it has not seen; the shipped
base draws pairs of pictures with attention control; CLIP filters them; an editor is trained from
the base on what stays; the oracle judges it on held-out scenes. Beside it, the same training on
pairs without the filter, on pairs drawn without attention control, and on the world's exact pairs.

Every part is a command that can be run alone; killed and called again, it goes on where it was.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import make
import oracle
import plots
import world
from demo import edit, judge

from ip2p_jax import Editor
from ip2p_jax.cli.console import cache_compilations, one_line
from ip2p_jax.storage import write_bytes

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / 'assets'


class Size(NamedTuple):
  captions: int
  samples: int  # pairs drawn for each
  draw_steps: int
  pairs: int  # exact ones, to compare with
  train_steps: int  # of 8 examples: many small steps go further than a quarter as many of 32
  scored: int  # held-out scenes
  editors: tuple[str, ...]


EDITORS = {
  'factory': 'pairs by share+auto, filtered',
  'unfiltered': 'the same pairs, not filtered',
  'uncontrolled': 'pairs from the same noise only, filtered',
  'exact': "the world's exact pairs",
}
FULL = Size(600, 4, 20, 2400, 4000, 300, tuple(EDITORS))
SMALL = Size(60, 4, 20, 0, 1600, 64, ('factory',))
# The world's captions repeat words, which the penalty would punish; of rare words most are slips.
WRITING = ('--frequency-penalty', 0, '--top-p', 0.9)
CONTROLS = {'factory': 'share+auto', 'uncontrolled': 'none'}
# Thresholds as the paper has them, but for both pictures: the world's CLIP knows nothing but the
# world, and so sees more in a small change than one that knows everything.
THRESHOLDS = ('--image', 0.4)
ALL = ('--image', -1, '--caption', -1, '--direction', -1)


def commands(out: Path, size: Size) -> dict[str, list[str]]:
  """What is run, by name, in order."""
  script = lambda name, *args: [sys.executable, str(make.HERE / name), *map(str, args)]
  ip2p = lambda *args: [sys.executable, '-m', 'ip2p_jax.cli', *map(str, args)]
  base, clip = ASSETS / 'miniature-base', ASSETS / 'miniature-clip'
  texts, prompts = out / 'texts', out / 'captions' / 'prompts.jsonl'
  parts = {
    'sentences': script('start_writer.py', texts, '--triplets', 500, '--captions', size.captions),
    'captions': ip2p(
      *('captions', 'write', texts / 'captions.txt', prompts.parent),
      *('--model', ASSETS / 'miniature-writer', *WRITING),
    ),
  }
  parts['captions judged'] = script('grammar.py', prompts)
  for name, control in CONTROLS.items():
    if name in size.editors:
      parts[f'{name}: pairs'] = ip2p(
        *('pairs', prompts, out / name / 'raw', '--ckpt', base, '--clip', clip),
        *('--control', control, '--samples', size.samples, '--steps', size.draw_steps),
        *('--guidance', 2, 5, '--size', world.SIDE, '--batch-size', 16),
      )
  if 'exact' in size.editors:
    parts['exact: pairs'] = script(
      'world.py', out / 'exact' / 'pairs', '--train', size.pairs, '--first', 3_000_000
    )
  for name in size.editors:
    folder, pairs = out / name, out / name / 'pairs'
    if name != 'exact':
      raw = out / ('factory' if name == 'unfiltered' else name) / 'raw'
      how = (*ALL, '--most', size.samples) if name == 'unfiltered' else THRESHOLDS
      # Written anew each time: other thresholds must not meet the pairs of these.
      parts[f'{name}: filter'] = ip2p('filter', raw, pairs, *how)
    parts[f'{name}: latents'] = ip2p(
      *('pack', pairs, folder / 'latents', '--latents', '--ckpt', base),
      *('--size', world.SIDE, '--batch-size', 64),
    )
    parts[f'{name}: training'] = [
      *(sys.executable, str(ROOT / 'train.py'), f'--config={ROOT / "configs" / "mini.py"}'),
      *(f'--workdir={folder / "run"}', f'--config.checkpoint={base}'),
      *(f'--config.data.path={folder / "latents"}', f'--config.steps={size.train_steps}'),
      *('--config.batch_size=8', '--config.optimizer.learning_rate=7e-4'),
      *(f'--config.optimizer.warmup_steps={size.train_steps // 20}', '--config.log.previews=0'),
    ]
  return parts


def score(out: Path, size: Size) -> str:
  """A row per editor; pictures of the first to OUT/edits.png."""
  examples = [world.example(seed, 'test') for seed in range(size.scored)]
  rows = []
  for name in size.editors:
    edited = edit(Editor.load(out / name / 'run', dtype='float32'), examples)
    verdicts = judge(examples, edited)
    found = oracle.summary(verdicts)
    shares = (
      plots.text(measure, plots.Estimate(found[measure], *found[f'{measure}_interval']))
      for measure in ('done', 'kept')
    )
    rows.append([name, EDITORS[name], len(examples), *shares])
    done = [verdict.is_done for verdict in verdicts[:16]]
    plots.gallery(out / f'{name}.png', examples[:16], edited[:16], done)
  return plots.table(['editor', 'trained on', 'examples', 'done', 'kept'], rows)


def main(out: Path, size: Size) -> None:
  out.mkdir(parents=True, exist_ok=True)
  settings, file = json.dumps(size), out / 'size.json'
  if file.exists() and file.read_text() != settings:
    sys.exit(f'reproduce.py: error: {out} was begun at another size; give another folder.')
  write_bytes(file, settings.encode())
  done = out / 'done.json'
  finished = json.loads(done.read_text()) if done.exists() else []
  for name, command in commands(out, size).items():
    if name in finished:
      continue
    if name.endswith(': filter'):
      shutil.rmtree(command[5], ignore_errors=True)  # of a try that was killed after it
    make.run(name, command, out)
    finished.append(name)
    write_bytes(done, json.dumps(finished).encode())
  text = score(out, size)
  write_bytes(out / 'table.md', text.encode())
  print(f'\n{text}\nwrote {out / "table.md"}, and pictures beside it')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path)
  parser.add_argument('--small', action='store_true')
  given = parser.parse_args()
  with one_line('reproduce.py', 'use --small.'):
    cache_compilations()
    main(given.out.absolute(), SMALL if given.small else FULL)
