"""What the miniature can do, in eight minutes on two CPU cores.

  python examples/miniature/demo.py out/demo

Edits scenes that no training has seen, and lets the oracle judge them; then turns the shipped
text-to-image base into an editor of its own, for three minutes, and scores it before, in the middle
and at the end; and exports that for PyTorch. Tells every picture and file that it writes.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import oracle
import world
from PIL import Image, ImageDraw

from ip2p_jax import Editor, bundled, weights
from ip2p_jax.cli.console import cache_compilations, one_line
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline import workdir

ROOT = Path(__file__).parent.parent.parent
BASE = ROOT / 'assets' / 'miniature-base'
EDITED, SCORED = 64, 32  # held-out scenes, for the shipped editor and for each score of the run
PAIRS, STEPS = 4000, 300
KEEPS = STEPS // 2  # steps between checkpoints


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
    batch_size=SCORED,
  )


def judge(examples: Sequence[world.Example], edited: np.ndarray) -> list[oracle.Verdict]:
  return [oracle.judge(one, picture) for one, picture in zip(examples, edited, strict=True)]


def score(
  examples: Sequence[world.Example],
  edited: Sequence[np.ndarray],
  verdicts: Sequence[oracle.Verdict],
) -> str:
  found = oracle.summary(verdicts)
  low, high = found['done_interval']
  nearness = np.mean([
    oracle.psnr(picture / 255, oracle.seen(one.edited_scene))
    for one, picture in zip(examples, edited, strict=True)
  ])  # fmt: skip
  return (
    f'{nearness:.1f} dB from the truth, {found["done"]:4.0%} of {found["count"]} edits done (95%'
    f' interval {low:.0%} to {high:.0%}), the rest of the picture kept at {found["kept"]:.1f} dB'
  )


def sheet(
  examples: Sequence[world.Example],
  edited: Sequence[np.ndarray],
  verdicts: Sequence[oracle.Verdict],
  scale: int = 2,
) -> Image.Image:
  """Two columns of scene, edit and truth, with the instruction and the verdict below."""
  side, columns, text = world.SIDE * scale, 2, 44
  width, height = 3 * (side + 4) + 12, side + text
  rows = -(-len(examples) // columns)
  result = Image.new('RGB', (columns * width, rows * height + 20), 'white')
  draw = ImageDraw.Draw(result)
  for column in range(columns):
    for i, name in enumerate(('scene', 'edit', 'truth')):
      draw.text((column * width + i * (side + 4) + 4, 4), name, 'black')
  for n, (one, made, verdict) in enumerate(zip(examples, edited, verdicts, strict=True)):
    left, top = n % columns * width + 4, n // columns * height + 20
    for i, shown in enumerate((world.picture(one.scene), made, world.picture(one.edited_scene))):
      shown = Image.fromarray(shown).resize((side, side), Image.Resampling.NEAREST)
      result.paste(shown, (left + i * (side + 4), top))
    lines = textwrap.wrap(one.instruction, 64)[:2]
    draw.text((left, top + side + 2), '\n'.join(lines), 'black')
    place = left, top + side + 3 + 13 * len(lines)
    draw.text(place, 'done' if verdict.is_done else 'not done', 'gray')
  return result


def show_edits(out: Path, ckpt: Path) -> None:
  _say(f'The shipped editor, {ckpt}, edits {EDITED} scenes that it has never seen')
  examples = [world.example(seed, 'test') for seed in range(EDITED)]
  edited = edit(Editor.load(ckpt), examples)
  verdicts = judge(examples, edited)
  print(score(examples, edited, verdicts))
  for one, verdict in zip(examples, verdicts, strict=True):
    if not verdict.is_done:
      print(f'  not done: {one.instruction!r}: {verdict.reasons[0]}')
  _save(sheet(examples[:16], edited[:16], verdicts[:16]), out / 'edits.png')

  _say('One of them by the command line')
  one = next(one for one in examples if one.edits[0].kind == 'recolour')
  _save(Image.fromarray(world.picture(one.scene)), out / 'scene.png')
  named = () if bundled.is_it(ckpt) else ('--ckpt', ckpt)
  _run(
    *('sample.py', *named, '--input', out / 'scene.png', '--edit', one.instruction),
    *('--output', out / 'edited.png', '--seed', 0),
  )


def show_training(out: Path, base: Path) -> None:
  _say(f'An editor of our own, from the text-to-image base {base}, on {PAIRS:,} new pairs')
  for name in ('pairs', 'latents', 'run'):
    shutil.rmtree(out / name, ignore_errors=True)
  world.write_pairs(out / 'pairs', PAIRS, validation=SCORED)
  _run('ip2p', 'pack', out / 'pairs', out / 'latents', '--latents', '--ckpt', base, '--size', 64)
  _run(
    *('train.py', '--config=configs/mini.py', f'--workdir={out / "run"}'),
    *(f'--config.checkpoint={base}', f'--config.data.path={out / "latents"}'),
    *(f'--config.steps={STEPS}', f'--config.optimizer.warmup_steps={STEPS // 9}'),
    *(f'--config.log.checkpoint_every={KEEPS}', '--config.log.every=10'),
    *('--config.log.validate_every=0', '--config.log.previews=0'),
  )

  _say('Its score, before and after')
  examples = [world.example(seed, 'test') for seed in range(SCORED)]
  steps = range(0, STEPS + 1, KEEPS)
  for step in steps:
    if step:
      checkpoint = workdir.read(out / 'run', step=step)
    else:
      checkpoint = weights.with_input_channels(weights.read(base), 8)
    edited = edit(Editor.from_checkpoint(checkpoint), examples)
    verdicts = judge(examples, edited)
    print(f'step {step:4d}: {score(examples, edited, verdicts)}', flush=True)
  _save(sheet(examples[:16], edited[:16], verdicts[:16]), out / 'trained-edits.png')


def show_exports(out: Path) -> None:
  _say('Exports; where PyTorch and diffusers are installed, they repeat an edit and compare')
  _run('ip2p', 'convert', out / 'run', out / 'trained', '--overwrite')
  _run('ip2p', 'convert', out / 'run', out / 'trained.safetensors', '--overwrite')
  print(f'{out / "trained"} is for diffusers, {out / "trained.safetensors"} for A1111 and ComfyUI')


def main(out: Path, ckpt: Path | None, base: Path) -> None:
  began = time.time()
  if jax.config.jax_platforms == 'cpu' and jax.__version__.startswith('0.10.'):
    # Its default kernels for convolutions and their gradients take twice as long.
    os.environ.setdefault('XLA_FLAGS', '--xla_cpu_experimental_ynn_fusion_type=')
  cache_compilations()
  if not (base / 'model_index.json').is_file():
    raise InputError(f'{base}: the text-to-image base is not there; name its folder by --base.')
  ckpt = ckpt or bundled.path()
  out.mkdir(parents=True, exist_ok=True)
  show_edits(out, ckpt)
  show_training(out, base)
  show_exports(out)
  _say(f'Done in {(time.time() - began) / 60:.1f} minutes')
  print(f'{out}/edits.png          scenes, what the shipped editor makes of them, and the truth')
  print(f'{out}/trained-edits.png  the same by the editor just trained, after {STEPS} steps')


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


def _save(picture: Image.Image, path: Path) -> None:
  unfinished = path.with_suffix('.part.png')
  picture.save(unfinished)
  unfinished.rename(path)
  print(f'wrote {path}', flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path, help='a folder for pictures, data and checkpoints')
  parser.add_argument('--ckpt', type=Path, help='another editor than the shipped one')
  parser.add_argument('--base', type=Path, default=BASE, help='a text-to-image base')
  arguments = parser.parse_args()
  with one_line('demo.py', 'close other programs.'):
    main(arguments.out.absolute(), arguments.ckpt, arguments.base)
