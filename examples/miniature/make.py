"""Trains the whole miniature from nothing, as the shipped one was.

  python examples/miniature/make.py out/miniature
  python examples/miniature/make.py out/miniature --install assets   (also writes what is shipped)

Every part is a command that can be run alone; killed and called again, it goes on where it was.
About five hours on two CPU cores. Times are kept in OUT/times.jsonl.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import world

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SHIPPED = {
  'miniature': 'editor',
  'miniature-base': 'base',
  'miniature-clip': 'clip',
  'miniature-writer': 'writer',
}


def commands(out: Path, pairs: int) -> dict[str, list[str]]:
  """What is run, by name, in order."""
  script = lambda name, *args: [sys.executable, str(HERE / name), *map(str, args)]
  ip2p = lambda *args: [sys.executable, '-m', 'ip2p_jax.cli', *map(str, args)]
  train = lambda config, workdir, start, data, *more: [
    *(sys.executable, str(ROOT / 'train.py'), f'--config={ROOT / "configs" / config}'),
    *(f'--workdir={out / workdir}', f'--config.checkpoint={out / start}'),
    *(f'--config.data.path={data}', *more),
  ]
  write = lambda workdir, start, triplets, *more: ip2p(
    *('captions', 'train', '--config', ROOT / 'configs' / 'mini_captions.py'),
    *('--workdir', out / workdir, f'--config.checkpoint={out / start}'),
    *(f'--config.data.path={out / "writer-start" / triplets}.jsonl', *more),
  )
  pack = lambda pairs, name, task: ip2p(
    *('pack', out / pairs, out / name, '--latents', '--ckpt', out / 'start'),
    *('--size', 64, '--batch-size', 64, '--task', task),
  )
  export = lambda workdir, name: ip2p('convert', out / workdir, out / name, '--overwrite')
  again = lambda steps: (f'--config.steps={steps}', '--config.optimizer.learning_rate=6e-4')
  hard = ('--first', 1_000_000, '--kinds', world.TWO_STEPS, 'style')
  mixture = f'{out / "edits"}=2,{out / "more-edits"}=1'
  return {
    'pairs': script('world.py', out / 'pairs', '--train', pairs),
    'autoencoder': script('train_vae.py', out / 'vae'),
    'clip': script('train_clip.py', out / 'clip'),
    'start': script('start.py', out / 'start', '--vae', out / 'vae', '--clip', out / 'clip'),
    'captions': pack('pairs', 'captions', 'text_to_image'),
    'base': train('mini_base.py', 'base-run', 'start', out / 'captions'),
    'base export': export('base-run', 'base-1'),
    'edits': pack('pairs', 'edits', 'edit'),
    'editor': train('mini.py', 'run', 'base-1', out / 'edits'),
    'editor export': export('run', 'editor-1'),
    # What the editor found hardest, a third of every batch from here on.
    'more pairs': script(
      *('world.py', out / 'more-pairs', '--train', 3 * pairs // 10, '--validation', 16, *hard)
    ),
    'more edits': pack('more-pairs', 'more-edits', 'edit'),
    'editor again': train('mini.py', 'run-2', 'editor-1', mixture, *again(9000)),
    'editor again, export': export('run-2', 'editor'),
    'base again': train('mini_base.py', 'base-run-2', 'base-1', out / 'captions', *again(4000)),
    'base again, export': export('base-run-2', 'base'),
    'sentences': script('start_writer.py', out / 'writer-start'),
    'writer': write('writer-run', 'writer-start/model', 'triplets'),
    'writer, export': export('writer-run', 'writer-1'),
    # To keep several objects apart; then all captions again, of which it forgets those of one.
    'writer again': write(
      *('writer-run-2', 'writer-1', 'several', '--config.steps=4500'),
      '--config.optimizer.learning_rate=2e-3',
    ),
    'writer again, export': export('writer-run-2', 'writer-2'),
    'writer, last': write(
      *('writer-run-3', 'writer-2', 'triplets', '--config.steps=600'),
      *('--config.optimizer.learning_rate=7e-4', '--config.optimizer.warmup_steps=20'),
      '--config.optimizer.ema=0.99',
    ),
    'writer, last, export': export('writer-run-3', 'writer'),
  }


def run(name: str, command: list[str], out: Path) -> None:
  print(f'\n== {name}: {" ".join(command)}', flush=True)
  began = time.time()
  environment = dict(os.environ)
  if jax.default_backend() == 'cpu' and jax.__version__.startswith('0.10.'):
    # Its default kernels for convolutions and their gradients take twice as long.
    environment.setdefault('XLA_FLAGS', '--xla_cpu_experimental_ynn_fusion_type=')
  code = subprocess.run(command, env=environment, cwd=ROOT).returncode
  if code:
    sys.exit(code)
  with (out / 'times.jsonl').open('a') as file:
    file.write(json.dumps({'part': name, 'seconds': round(time.time() - began, 1)}) + '\n')


def install(out: Path, assets: Path) -> None:
  """Writes what is shipped: float16, as diffusers and transformers read it."""
  from ip2p_jax import weights
  from ip2p_jax.weights.files import read_tensors
  from ip2p_jax.weights.language_folder import read_language, write_language

  for name in ('miniature', 'miniature-base'):
    checkpoint = weights.read(out / SHIPPED[name])
    weights.write(checkpoint, assets / name, dtype='float16', overwrite=True)
  clip = assets / 'miniature-clip'
  clip.mkdir(exist_ok=True)
  for file in (out / 'clip').glob('*.*'):
    if file.suffix in ('.json', '.txt'):
      shutil.copy(file, clip)
  weights.write_safetensors(
    clip / 'model.safetensors', read_tensors(out / 'clip' / 'model.safetensors')[0], 'float16'
  )
  writer = read_language(out / SHIPPED['miniature-writer'])
  write_language(writer, assets / 'miniature-writer', 'float16', overwrite=True)
  card = HERE / 'card.md'
  for name in SHIPPED:
    shutil.copy(card, assets / name / 'README.md')
  print(f'wrote {", ".join(str(assets / name) for name in SHIPPED)}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path)
  parser.add_argument('--pairs', type=int, default=40_000, help='examples to train on')
  parser.add_argument('--install', type=Path, metavar='ASSETS', help='also write what is shipped')
  parser.add_argument('--only', help='a single part, by its name')
  arguments = parser.parse_args()
  out = arguments.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  for name, command in commands(out, arguments.pairs).items():
    if arguments.only in (None, name):
      run(name, command, out)
  if arguments.install:
    install(out, arguments.install)
