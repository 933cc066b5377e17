"""What the miniature can do, in five minutes on two CPU cores.

  python examples/miniature/demo.py out/demo

It edits scenes that no training has seen, and the oracle judges the edits. Then it teaches the
editor a kind of edit that it does not know, sunset, from 200 pairs, and scores it before and after.
At the end it exports the new editor for PyTorch. It names every image and file that it writes.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import oracle
import plots
import sunset
import world
from PIL import Image

from ip2p_jax import Editor, bundled
from ip2p_jax.cli.console import cache_compilations, one_line
from ip2p_jax.storage import replacing

ROOT = Path(__file__).parent.parent.parent
EDITED, SUNSETS = 64, 32  # held-out scenes that are scored
PAIRS, STEPS, LEARNING_RATE = 200, 200, 3e-4


def edit(editor: Editor, examples: Sequence[world.Example]) -> np.ndarray:
  """uint8 [N, 64, 64, 3]."""
  return editor.edit(
    np.stack([world.picture(one.scene) for one in examples]),
    [one.instruction for one in examples],
    steps=bundled.STEPS,
    text_guidance=bundled.TEXT_GUIDANCE,
    image_guidance=bundled.IMAGE_GUIDANCE,
    sampler=bundled.SAMPLER,
    seed=0,
    batch_size=SUNSETS,
  )


def judge(examples: Sequence[world.Example], edited: np.ndarray) -> list[oracle.Verdict]:
  return [oracle.judge(one, picture) for one, picture in zip(examples, edited, strict=True)]


def score(verdicts: Sequence[oracle.Verdict]) -> str:
  summary = oracle.summary(verdicts)
  low, high = summary['done_interval']
  done, count = summary['done'], summary['count']
  return f'{done:4.0%} of {count} edits done (95% interval {low:.0%} to {high:.0%})'


def show_edits(editor: Editor, examples: Sequence[world.Example], out: Path) -> None:
  _say(f'The editor edits {len(examples)} scenes that it has never seen')
  edited = edit(editor, examples)
  verdicts = judge(examples, edited)
  kept = oracle.summary(verdicts)['kept']
  print(f'{score(verdicts)}; the rest of the image kept at {kept:.1f} dB')
  for one, verdict in zip(examples, verdicts, strict=True):
    if not verdict.is_done:
      print(f'  not done: {one.instruction!r}: {verdict.reasons[0]}')
  _gallery(examples, edited, verdicts, out / 'edits.png')


def show_command(ckpt: Path, examples: Sequence[world.Example], out: Path) -> None:
  _say('One of them by the command line')
  one = next(one for one in examples if one.edits[0].kind == 'recolour')
  scene = Image.fromarray(world.picture(one.scene))
  with replacing(out / 'scene.png') as unfinished:
    scene.save(unfinished, 'PNG')
  print(f'wrote {out / "scene.png"}', flush=True)
  named = () if bundled.is_it(ckpt) else ('--ckpt', ckpt)
  _run(
    *('ip2p', 'edit', *named, '--input', out / 'scene.png', '--edit', one.instruction),
    *('--output', out / 'edited.png', '--seed', 0),
  )


def show_training(editor: Editor, ckpt: Path, examples: Sequence[world.Example], out: Path) -> None:
  _say(f'The editor learns a new kind of edit, sunset, from {PAIRS} pairs')
  for name in ('sunset', 'others', 'run'):
    shutil.rmtree(out / name, ignore_errors=True)
  sunset.write_pairs(out / 'sunset', PAIRS)
  # As many pairs of the kinds that it knows, so that it does not forget them.
  world.write_pairs(out / 'others', PAIRS, validation=0)
  _run(
    *('train.py', '--config=configs/mini.py', f'--workdir={out / "run"}'),
    f'--config.checkpoint={ckpt}',
    f'--config.data.path={out / "sunset"}=1,{out / "others"}=1',
    *(f'--config.steps={STEPS}', f'--config.optimizer.learning_rate={LEARNING_RATE}'),
    *('--config.optimizer.warmup_steps=10', '--config.optimizer.ema=0.97'),
    *(f'--config.log.checkpoint_every={STEPS}', '--config.log.every=20'),
    *('--config.log.validate_every=0', '--config.log.previews=0'),
  )

  _say('Before and after')
  trained = Editor.load(out / 'run')
  sunsets = [sunset.example(seed, 'test') for seed in range(SUNSETS)]
  print(f'sunset, before: {score(judge(sunsets, edit(editor, sunsets)))}', flush=True)
  edited = edit(trained, sunsets)
  verdicts = judge(sunsets, edited)
  print(f'sunset, after:  {score(verdicts)}', flush=True)
  print(f'other edits:    {score(judge(examples, edit(trained, examples)))}', flush=True)
  _gallery(sunsets, edited, verdicts, out / 'sunsets.png')


def show_exports(out: Path) -> None:
  _say('Exports; where PyTorch and diffusers are installed, they repeat an edit and compare')
  _run('ip2p', 'convert', out / 'run', out / 'trained', '--overwrite')
  _run('ip2p', 'convert', out / 'run', out / 'trained.safetensors', '--overwrite')
  print(f'{out / "trained"} is for diffusers, {out / "trained.safetensors"} for A1111 and ComfyUI')


def main(out: Path, ckpt: Path) -> None:
  began = time.time()
  if jax.config.jax_platforms == 'cpu' and jax.__version__.startswith('0.10.'):
    # Its default kernels for convolutions and their gradients take twice as long.
    os.environ.setdefault('XLA_FLAGS', '--xla_cpu_experimental_ynn_fusion_type=')
  cache_compilations()
  out.mkdir(parents=True, exist_ok=True)
  editor = Editor.load(ckpt)
  examples = [world.example(seed, 'test') for seed in range(EDITED)]
  show_edits(editor, examples, out)
  show_command(ckpt, examples, out)
  show_training(editor, ckpt, examples, out)
  show_exports(out)
  _say(f'Done in {(time.time() - began) / 60:.1f} minutes')
  print(f'{out}/edits.png    scenes, their edits, and the right results')
  print(f'{out}/sunsets.png  the same for the new kind of edit, after {STEPS} steps')


def _run(program: str, *arguments: object) -> None:
  """Runs a command of the package from the repository's root; ends with it if it fails."""
  arguments = [str(argument) for argument in arguments]
  shown = program if program == 'ip2p' else f'python {program}'
  print(f'$ {shown} {shlex.join(arguments)}', flush=True)
  start = ('-m', 'ip2p_jax.cli') if program == 'ip2p' else (program,)
  if code := subprocess.run([sys.executable, *start, *arguments], cwd=ROOT).returncode:
    sys.exit(code)


def _say(text: str) -> None:
  print(f'\n== {text}', flush=True)


def _gallery(examples, edited, verdicts, path) -> None:
  done = [verdict.is_done for verdict in verdicts[:16]]
  plots.gallery(path, examples[:16], edited[:16], done)
  print(f'wrote {path}', flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path, help='a folder for images, data and checkpoints')
  parser.add_argument('--ckpt', type=Path, help='another editor of the drawn world')
  arguments = parser.parse_args()
  with one_line('demo.py', 'close other programs.'):
    main(arguments.out.absolute(), (arguments.ckpt or bundled.path()).absolute())
