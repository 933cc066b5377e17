"""Measures how fast training examples are made, from rows in memory.

  python benchmarks/loader.py
  python benchmarks/loader.py --size 512 --resolution 256 --workers 8

Prints pairs per second: of one thread, which is what a core can do, then of whole batches through
threads and through worker processes. A training step of B examples in T seconds needs B / T.
"""

import argparse
import contextlib
import functools
import io
import os
import time

import numpy as np
from PIL import Image

from ip2p_jax import weights
from ip2p_jax.config import DataConfig, TrainConfig
from ip2p_jax.data import examples, loader
from ip2p_jax.data.rows import LatentRow, Pair, Row
from ip2p_jax.text import ClipTokenizer

INSTRUCTION = 'make it look like a watercolour painting of a winter evening'


def image_rows(size: int, count: int = 16) -> list[Row]:
  """Pairs of JPEGs of about a photo's weight: waves and some grain."""
  y, x = np.mgrid[:size, :size][..., None] / size
  rng, rows = np.random.default_rng(0), []
  for i in range(count):
    files = []
    for shift in range(2):
      waves = np.sin((20 + i) * x + shift + np.arange(3)) * np.cos((14 + i) * y)
      array = 127 + 90 * waves + rng.normal(0, 8, (size, size, 3))
      file = io.BytesIO()
      Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
      files.append(file.getvalue())
    rows.append(Row(f'row {i}', (INSTRUCTION,), (Pair(*files),)))
  return rows


def latent_rows(resolution: int, count: int = 16) -> list[LatentRow]:
  side = resolution // 8
  values = np.random.default_rng(0).normal(size=(count, 1, 2, side, side, 4)).astype(np.float16)
  ids = np.zeros((1, 77), np.int32)
  return [LatentRow(f'row {i}', ids, array, array, array) for i, array in enumerate(values)]


def of_one_thread(rows, config, tokenizer, seconds: float) -> float:
  """Pairs per second without any loader."""
  make = functools.partial(examples.example, tokenizer=tokenizer)
  if isinstance(rows[0], LatentRow):
    make = examples.latent_example
  rng, start, made = np.random.default_rng(0), time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    make(rows[made % len(rows)], rng, config)
    made += 1
  return made / (time.perf_counter() - start)


def of_batches(rows, config, tokenizer, workers: int, batch_size: int, seconds: float) -> float:
  """Pairs per second of the loader, once it runs."""
  batches = loader.batches(
    [rows], [1.0], seed=0, batch_size=batch_size, rows=np.arange(batch_size), start_step=0,
    config=config, tokenizer=tokenizer, workers=workers,
  )  # fmt: skip
  with contextlib.closing(batches):
    for _ in range(4):  # what was made ahead while processes started
      next(batches)
    start, made = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
      made += len(next(batches)['weight'])
    return made / (time.perf_counter() - start)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=512, help='side of the JPEGs, pixels')
  parser.add_argument('--resolution', type=int, default=256, help='of training, pixels')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
  parser.add_argument('--batch-size', type=int, default=256)
  parser.add_argument('--seconds', type=float, default=5.0, help='per measurement')
  args = parser.parse_args()
  config = TrainConfig(resolution=args.resolution, data=DataConfig())
  tokenizer = ClipTokenizer(weights.clip_tokenizer())
  print(f'pairs per second, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}')
  kinds = {
    f'JPEG {args.size} px -> {args.resolution} px': image_rows(args.size),
    f'latents of {args.resolution} px': latent_rows(args.resolution),
  }
  for kind, rows in kinds.items():
    print(f'{kind}: one thread {of_one_thread(rows, config, tokenizer, args.seconds):,.0f}')
    for workers in (0, args.workers):
      speed = of_batches(rows, config, tokenizer, workers, args.batch_size, args.seconds)
      print(f'{kind}: {f"{workers} processes" if workers else "threads"} {speed:,.0f}')


if __name__ == '__main__':
  main()
