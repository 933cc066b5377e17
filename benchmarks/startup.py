"""From nothing to the first picture: imports, weights, compilation, edit; JAX beside diffusers.

  python benchmarks/startup.py --small                       (the bundled miniature, two minutes)
  python examples/random_checkpoint.py out/sd15 --like sd15  (4.3 GB of random weights)
  python benchmarks/startup.py --weights out/sd15 --out startup.jsonl

Every start is a new process. JAX starts with no compiled program on disk, and once more with those
that the first start left there, as `ip2p edit` keeps them. Both sides load the same folder, and
edit one square picture by Euler ancestral steps with three branches, float32 on a CPU and bfloat16
elsewhere. The files have been read before, so they are in memory.
"CPU" is what all cores spent till the first picture.
"""

import argparse
import datetime
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench_turns import machine, results, say, whole
from PIL import Image

MINIATURE = Path(__file__).parent.parent / 'assets' / 'miniature'
PARTS = ('import', 'load', 'first edit', 'next edit')
TEXTS = ('make it winter', 'turn the sky into a sea of red')
SIDES = ('JAX, nothing cached', 'JAX, again', 'diffusers')


def picture(size: int) -> Image.Image:
  y, x = np.mgrid[:size, :size] / size
  channels = [x, y, 0.5 + 0.5 * np.sin(20 * x) * np.cos(14 * y)]
  return Image.fromarray(np.round(255 * np.stack(channels, -1)).astype(np.uint8))


def now() -> tuple[float, float]:
  """The clock, and what all cores have done for this process."""
  return time.time(), time.process_time()


def start_jax(folder: str, size: int, steps: int) -> list[tuple[float, float]]:
  """The time after import, load, an edit, and another with another instruction and seed."""
  from ip2p_jax import Editor
  from ip2p_jax.cli import console

  console.cache_compilations()
  times = [now()]
  editor = Editor.load(folder)
  times.append(now())
  for seed, text in enumerate(TEXTS):
    editor.edit(picture(size), text, steps=steps, seed=seed)
    times.append(now())
  return times


def start_diffusers(folder: str, size: int, steps: int) -> list[tuple[float, float]]:
  """The same of diffusers' pipeline."""
  import torch
  from diffusers import StableDiffusionInstructPix2PixPipeline

  times = [now()]
  device, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
  pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=dtype)
  pipeline.set_progress_bar_config(disable=True)
  pipeline.to(device)
  times.append(now())
  for seed, text in enumerate(TEXTS):
    pipeline(
      text, image=picture(size), num_inference_steps=steps, guidance_scale=7.5,
      image_guidance_scale=1.5, generator=torch.Generator(device).manual_seed(seed),
    )  # fmt: skip
    times.append(now())
  return times


def start(side: str, args, cache: Path) -> list[float]:
  """Seconds of each of PARTS in a new process, and of the processor till the first picture."""
  if side == SIDES[0]:
    shutil.rmtree(cache, ignore_errors=True)
  command = [sys.executable, __file__, '--start', side, '--weights', str(args.weights)]
  command += ['--size', str(args.size), '--steps', str(args.steps)]
  settings = {'XDG_CACHE_HOME': str(cache), 'HF_HUB_OFFLINE': '1', 'DIFFUSERS_VERBOSITY': 'error'}
  environment = {
    key: value for key, value in os.environ.items() if key != 'JAX_COMPILATION_CACHE_DIR'
  }
  began = time.time()
  done = subprocess.run(command, env=environment | settings, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'{side} failed:\n{done.stderr[-2000:]}')
  times, used = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
  return [after - before for before, after in itertools.pairwise([began, *times])] + [used[2]]


def main() -> None:
  args = arguments()
  if args.start:
    run = start_diffusers if args.start == SIDES[2] else start_jax
    print(json.dumps(run(str(args.weights), args.size, args.steps)))
    return
  head = machine()
  for file in args.weights.rglob('*.safetensors'):
    file.read_bytes()
  found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
  with tempfile.TemporaryDirectory() as scratch:
    for number in range(args.rounds):
      say(f'round {number + 1} of {args.rounds}')
      for side in SIDES:
        found[side].append(start(side, args, Path(scratch) / 'cache'))
  lines = [
    f'{args.weights.name}, {args.size} px, {args.steps} steps; {head}; seconds, median of'
    f' {args.rounds}', '',
    ' ' * 20 + ''.join(f'{part:>12}' for part in (*PARTS, 'CPU', 'to picture', 'range')),
  ]  # fmt: skip
  for side, runs in found.items():
    totals = [sum(run[:3]) for run in runs]
    cells = [f'{statistics.median(column):.2f}' for column in zip(*runs, strict=True)]
    cells += [f'{statistics.median(totals):.2f}', f'{min(totals):.2f}-{max(totals):.2f}']
    lines.append(f'{side:20}' + ''.join(f'{cell:>12}' for cell in cells))
  print('\n'.join(lines))
  if args.out:
    line = {
      'benchmark': 'startup', 'weights': args.weights.name, 'size': args.size, 'steps': args.steps,
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), 'machine': head,
      'parts': (*PARTS, 'CPU'), 'seconds': found,
    }  # fmt: skip
    with args.out.open('a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--small', action='store_true', help='the bundled miniature at 64 px')
  parser.add_argument('--weights', type=Path, help='a diffusers folder')
  parser.add_argument('--size', type=whole, help='of the picture, in pixels')
  parser.add_argument('--steps', type=whole, help='of an edit')
  parser.add_argument('--rounds', type=whole, default=3, help='starts of each side')
  parser.add_argument('--out', type=results, help='a file to append a JSON line to')
  parser.add_argument('--start', choices=SIDES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if not args.small and not args.weights:
    parser.error('give --small, or --weights FOLDER (examples/random_checkpoint.py writes one)')
  if args.weights and not (args.weights / 'unet').is_dir():
    parser.error(f'--weights {args.weights} is no diffusers folder')
  args.weights = args.weights or MINIATURE
  args.size = args.size or (64 if args.small else 256)
  args.steps = args.steps or (30 if args.small else 2)
  return args


if __name__ == '__main__':
  main()
