"""Measures how fast training examples are made from files, beside a torch DataLoader.

  python benchmarks/loader.py --small                (under two minutes on two CPU cores)
  python benchmarks/loader.py --out loader.jsonl
  python benchmarks/loader.py --size 512 --resolution 256 --workers 8

Pairs per second, median of turns: of one thread without any loader, by its own processor time, so
that a busy machine does not show; then, by the clock, of whole batches through the loader's
threads, through its processes, and through a torch DataLoader of as many processes that makes the
same arrays of the same files. JPEGs are read from a folder with metadata.jsonl, and from packed
shards that hold them as they are; PIL alone, which only decodes, is the ceiling of one core.
Latents, as large as Stable Diffusion's, are read from packed shards, by the package's reader on
both sides. All files have been read before. A training step of B examples in T seconds needs B / T.
"""

import argparse
import contextlib
import datetime
import functools
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_turns import machine, results, whole
from PIL import Image

from ip2p_jax import weights
from ip2p_jax.data import examples, loader, shards
from ip2p_jax.data.examples import Framing
from ip2p_jax.data.latents import pack_latents
from ip2p_jax.data.pack import pack
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.data.sources import open_source
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of

MINIATURE = Path(__file__).parent.parent / 'assets' / 'miniature'
INSTRUCTION = 'make it look like a watercolour painting of a winter evening'
LATENT_SIDE = 32  # Stable Diffusion's at 256 px


def write_pictures(folder: Path, size: int, count: int) -> None:
  """Pairs of JPEGs of about a photo's weight, waves and some grain, with metadata.jsonl."""
  y, x = np.mgrid[:size, :size][..., None] / size
  rng, lines = np.random.default_rng(0), []
  folder.mkdir()
  for i in range(count):
    names = [f'{i}_input.jpg', f'{i}_edited.jpg']
    for shift, name in enumerate(names):
      waves = np.sin((20 + i) * x + shift + np.arange(3)) * np.cos((14 + i) * y)
      array = 127 + 90 * waves + rng.normal(0, 8, (size, size, 3))
      Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / name, quality=90)
    line = dict(zip(('input_image', 'edited_image'), names, strict=True))
    lines.append(json.dumps(line | {'instruction': INSTRUCTION}) + '\n')
  (folder / 'metadata.jsonl').write_text(''.join(lines))


def write_latents(pictures: Path, folder: Path) -> None:
  """Shards of the pictures' latents by the miniature's VAE, `LATENT_SIDE` wide."""
  checkpoint = workdir.load(MINIATURE)
  networks = networks_of(checkpoint)
  pack_latents(
    {'train': open_source(str(pictures))}, folder, networks=networks,
    params=params_of(checkpoint, networks, 'float32')['vae'],
    tokenizer=tokenizer_of(checkpoint, networks), fingerprint='benchmark',
    resolution=LATENT_SIDE * networks.vae_config.factor, say=lambda text: None,
  )  # fmt: skip


class Pictures:
  """The same examples as a torch Dataset would have them: files in, arrays out, by PIL."""

  def __init__(self, folder: Path, resolution: int, tokenizer: ClipTokenizer):
    lines = (folder / 'metadata.jsonl').read_text().splitlines()
    self.rows = [json.loads(line) for line in lines]
    self.folder, self.resolution, self.tokenizer = folder, resolution, tokenizer

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i, is_mirrored=None):
    if is_mirrored is None:
      is_mirrored = np.random.random() < 0.5
    row = self.rows[i]
    example = {key: self._picture(row[key], is_mirrored) for key in ('input_image', 'edited_image')}
    return example | {'token_ids': self.tokenizer([row['instruction']])[0]}

  def _picture(self, name, is_mirrored):
    image = Image.open(self.folder / name).convert('RGB')
    short = min(image.size)  # the centre, its short side at the resolution
    left, top = ((side - short) / 2 for side in image.size)
    box = (left, top, left + short, top + short)
    image = image.resize((self.resolution,) * 2, Image.Resampling.LANCZOS, box)
    return np.array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else image)


class Latents:
  """The same rows as a torch Dataset, from the same shards."""

  def __init__(self, folder: Path):
    self.source = shards.open_shards(folder, 'train')

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i, is_mirrored=None):
    row = self.source[i]
    side = int(np.random.random() < 0.5 if is_mirrored is None else is_mirrored)
    keys = ('input_mean', 'edited_mean', 'edited_log_variance')
    example = {key: np.array(getattr(row, key)[0, side]) for key in keys}
    return example | {'token_ids': row.token_ids[0]}


def check_same(source, dataset, framing, tokenizer) -> None:
  """Both sides make the same arrays of a row, or nothing is timed."""
  row = source[0]
  ours = (
    examples.latent_example(row, None, framing)
    if isinstance(row, LatentRow)
    else examples.example(row, None, framing, tokenizer)
  )
  for key, value in dataset.__getitem__(0, is_mirrored=False).items():
    np.testing.assert_array_equal(value, ours[key], key)


def of_one_thread(make: Callable[[int], object], seconds: float) -> float:
  """Calls of `make(i)` per second of a core, whatever else the machine does."""
  start, made = time.thread_time(), 0
  while time.thread_time() - start < seconds:
    make(made)
    made += 1
  return made / (time.thread_time() - start)


def of_batches(batches, size: int, seconds: float) -> float:
  """Pairs per second of batches, once they run."""
  for _ in range(4):  # what was made ahead while processes started
    next(batches)
  start, made = time.perf_counter(), 0
  while time.perf_counter() - start < seconds:
    next(batches)
    made += size
  return made / (time.perf_counter() - start)


def ours(source, framing, tokenizer, workers: int, size: int, seconds: float) -> float:
  batches = loader.batches(
    [source], [1.0], seed=0, batch_size=size, rows=np.arange(size), start_step=0,
    framing=framing, tokenizer=tokenizer, workers=workers,
  )  # fmt: skip
  with contextlib.closing(batches):
    return of_batches(batches, size, seconds)


def torchs(dataset, workers: int, size: int, seconds: float) -> float:
  from torch.utils.data import DataLoader, RandomSampler

  sampler = RandomSampler(dataset, replacement=True, num_samples=2**40)
  batches = iter(
    DataLoader(dataset, size, sampler=sampler, num_workers=workers, multiprocessing_context='spawn')
  )
  return of_batches(batches, size, seconds)  # whose end is its workers'


def decode(rows, i: int) -> None:
  """What PIL needs for both files of a row, and nothing more."""
  pair = rows[i % len(rows)].pairs[0]
  for encoded in (pair.input_image, pair.edited_image):
    Image.open(io.BytesIO(encoded)).load()


def sides_of(source, dataset, framing, tokenizer, args) -> dict[str, Callable[[float], float]]:
  """Everything that is measured of one kind of files, by name: `side(seconds)` -> pairs/s.

  Without a data set, our sides alone.
  """
  rng, count = np.random.default_rng(0), len(source)
  if isinstance(source[0], LatentRow):
    make = lambda i: examples.latent_example(source[i % count], rng, framing)
    sides = {}
  else:
    rows = [source[i] for i in range(count)]
    make = lambda i: examples.example(source[i % count], rng, framing, tokenizer)
    sides = {'one thread, PIL decodes': lambda s: of_one_thread(lambda i: decode(rows, i), s)}
  sides['one thread'] = functools.partial(of_one_thread, make)
  for workers in (0, args.workers):
    name = f'loader, {workers} processes' if workers else 'loader, threads'
    sides[name] = functools.partial(ours, source, framing, tokenizer, workers, args.batch_size)
  if dataset is not None:
    torch = functools.partial(torchs, dataset, args.workers, args.batch_size)
    sides['one thread, torch Dataset'] = lambda s: of_one_thread(lambda i: dataset[i % count], s)
    sides[f'torch DataLoader, {args.workers} processes'] = torch
  return sides


def main() -> None:
  args = arguments()
  framing = Framing(args.resolution)
  tokenizer = ClipTokenizer(weights.clip_tokenizer())
  head, found = machine(), {}
  with tempfile.TemporaryDirectory() as scratch:
    pictures, packed, latents = (Path(scratch) / name for name in ('pictures', 'packed', 'latents'))
    write_pictures(pictures, args.size, args.rows)
    pack({'train': open_source(str(pictures))}, packed, workers=0, say=lambda text: None)
    write_latents(pictures, latents)
    jpeg = f'JPEG {args.size} px -> {args.resolution} px'
    kinds = {
      jpeg: (open_source(str(pictures)), Pictures(pictures, args.resolution, tokenizer)),
      f'{jpeg}, packed': (shards.open_shards(packed, 'train'), None),
      f'latents, {LATENT_SIDE} x {LATENT_SIDE}': (
        shards.open_shards(latents, 'train'), Latents(latents)
      ),
    }  # fmt: skip
    for kind, (source, dataset) in kinds.items():
      if dataset is not None:
        check_same(source, dataset, framing, tokenizer)
      sides = sides_of(source, dataset, framing, tokenizer, args)
      times = {name: [] for name in sides}
      for number in range(args.rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
          times[name].append(sides[name](args.seconds))
      found[kind] = times
  print(f'pairs per second, median of {args.rounds} (range); {head}')
  for kind, times in found.items():
    for name, rates in times.items():
      shown = f'{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})'
      print(f'  {kind:34}{name:36}{shown}')
  if args.out:
    line = {
      'benchmark': 'loader', 'machine': head, 'batch_size': args.batch_size,
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'pairs_per_second': found,
    }  # fmt: skip
    with args.out.open('a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--small', action='store_true', help='short turns, small batches')
  parser.add_argument('--size', type=whole, default=512, help='side of the JPEGs, pixels')
  parser.add_argument('--resolution', type=whole, default=256, help='of training, pixels')
  parser.add_argument('--rows', type=whole, default=64, help='pairs of files')
  parser.add_argument('--workers', type=whole, default=os.cpu_count(), help='processes')
  parser.add_argument('--batch-size', type=whole, help='of a loader; 256 by default')
  parser.add_argument('--seconds', type=float, help='of a turn; 5 by default')
  parser.add_argument('--rounds', type=whole, help='turns of each; 5 by default')
  parser.add_argument('--out', type=results, help='a file to append a JSON line to')
  args = parser.parse_args()
  args.batch_size = args.batch_size or (64 if args.small else 256)
  args.seconds = args.seconds or (1.0 if args.small else 5.0)
  args.rounds = args.rounds or (2 if args.small else 5)
  return args


if __name__ == '__main__':
  main()
