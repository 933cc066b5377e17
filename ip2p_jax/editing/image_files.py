"""Edits image files: plans inputs, seeds, scales and outputs, and runs them in batches."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ip2p_jax.defaults import MAX_SCALE, MAX_SEED
from ip2p_jax.editing.editor import Editor
from ip2p_jax.errors import InputError
from ip2p_jax.images import (
  WRITE_FORMATS,
  check_writable,
  find_images,
  for_file,
  image_grid,
  read,
  read_mask,
  size_of,
  working_size,
)
from ip2p_jax.pipeline import rows
from ip2p_jax.progress import Progress, part_of

GRID_THUMBNAIL = 512  # pixels of the longer side of each image in a grid


@dataclasses.dataclass(frozen=True)
class Job:
  """One image to make. With the common settings, it can be made again."""

  file: Path
  size: tuple[int, int]  # the image's own
  seed: int
  index: int
  cfg_text: float
  cfg_image: float
  output: Path


def check_options(values: dict[str, Any]) -> None:
  """Raises InputError for a flag without effect. A flag that is absent has the value None."""
  needs = {'--index': '--seed', '--grid-text': '--grid', '--grid-image': '--grid'}
  defaults = (None, 0)  # 0 is the default of --index
  for flag, needed in needs.items():
    if values[flag] not in defaults and values[needed] in (None, False):
      raise InputError(f'{flag}: of no use without {needed}; add that, or leave {flag} out.')
  for flag, grid_flag in {'--cfg-text': '--grid-text', '--cfg-image': '--grid-image'}.items():
    if values['--grid'] and values[flag] is not None:
      raise InputError(f'{flag}: of no use with --grid, which takes its scales from {grid_flag}.')


def plan_jobs(
  input: Path,
  output: Path,
  scales: Sequence[tuple[float, float]],
  *,
  seed: int,
  index: int,
  num: int,
  mask: Path | None,
  is_grid: bool,
) -> list[Job]:
  """Every image to make. Checks all inputs and outputs now, before hours of work.

  Images of a folder count up from `index`, variations from `seed`. Each pair (text scale, image
  scale) of `scales` is another image, with the same output.
  """
  if seed + num > MAX_SEED + 1:
    raise InputError(f'--seed {seed} with --num {num} goes past {MAX_SEED}; use a lower seed.')
  files = find_images(input)
  if is_grid and (len(files) > 1 or num > 1):
    raise InputError('--grid takes a single image; give a file, and leave out --num.')
  outputs = _outputs(input, files, output, num)
  sizes = [size_of(file) for file in files]
  for size in set(sizes) if mask is not None else ():
    read_mask(mask, size)
  return [
    Job(file, size, seed + n, index + i, text, image, outputs[file, n])
    for i, (file, size) in enumerate(zip(files, sizes, strict=True))
    for n in range(num)
    for text, image in scales
  ]


def _outputs(input, files, output, num) -> dict[tuple[Path, int], Path]:
  is_image_file = output.suffix.lower() in WRITE_FORMATS and not output.is_dir()
  if input.is_dir() and is_image_file:
    raise InputError(f'--output {output}: --input is a folder, so give a folder.')
  is_folder = output.is_dir() or input.is_dir() or not output.suffix
  result = {}
  for file in files:
    base = output / f'{file.stem}.png' if is_folder else output
    for n, path in enumerate(numbered(base, num)):
      if path in result.values():
        raise InputError(f'--input {input}: two images would both be written to {path}; '
                         'give them different names.')  # fmt: skip
      if path.exists() and any(path.samefile(other) for other in files):
        raise InputError(f'--output {path} is an image of --input; give another name or folder.')
      result[file, n] = path
  for path in result.values():
    check_writable(path)
  return result


def numbered(path: Path, num: int) -> list[Path]:
  """The files of `num` variations: out-0.png, out-1.png and so on; for one, the file itself."""
  return [path.with_stem(f'{path.stem}-{n}') for n in range(num)] if num > 1 else [path]


def run_jobs(
  editor: Editor,
  jobs: Sequence[Job],
  instruction: str,
  *,
  resolution: int,
  batch_size: int,
  mask: Path | None,
  options: dict[str, Any],
  progress: Progress | None = None,
) -> Iterator[tuple[Job, Image.Image]]:
  """Makes the images batch by batch. `options` are those of `Editor.edit`."""
  image_of = functools.lru_cache(1)(read)  # jobs of one file follow each other
  mask_of = functools.lru_cache(1)(read_mask)
  factor = editor.networks.vae_config.factor
  sizes = [working_size(*job.size, resolution, factor) for job in jobs]
  batches = [[jobs[row] for row in group] for group in rows.groups(sizes, batch_size)]
  for done, batch in enumerate(batches):
    originals = [for_file(image_of(job.file), job.output) for job in batch]
    results = editor.edit(
      originals,
      instruction,
      text_guidance=[job.cfg_text for job in batch],
      image_guidance=[job.cfg_image for job in batch],
      seed=[job.seed for job in batch],
      indices=[job.index for job in batch],
      mask=mask and [mask_of(mask, original.size) for original in originals],
      resolution=resolution,
      batch_size=min(batch_size, max(map(len, batches))),
      progress=part_of(progress, done, len(batches)),
      **options,
    )
    yield from zip(batch, results, strict=True)


def parse_scales(text: str, image: str) -> list[tuple[float, float]]:
  """'3,7.5' and '1,1.5' -> every pair (text scale, image scale), row by row."""
  try:
    texts, images = ([float(part) for part in scales.split(',')] for scales in (text, image))
    if not all(abs(scale) <= MAX_SCALE for scale in texts + images):
      raise ValueError
  except ValueError:
    raise InputError(
      '--grid-text and --grid-image take numbers separated by commas, such as 3,5,7.5, none over'
      f' {MAX_SCALE}.'
    ) from None
  if len(set(texts)) < len(texts) or len(set(images)) < len(images):
    raise InputError('--grid-text and --grid-image take each scale once; leave out repeated ones.')
  return [(t, i) for t in texts for i in images]


def labelled_grid(results: Sequence[tuple[Job, Image.Image]], title: str) -> Image.Image:
  """One image of a sweep: a row per text scale, a column per image scale."""
  cells = {}
  for job, image in results:
    image.thumbnail((GRID_THUMBNAIL, GRID_THUMBNAIL))
    cells[job.cfg_text, job.cfg_image] = image
  texts, images = (list(dict.fromkeys(scales)) for scales in zip(*cells, strict=True))
  return image_grid(
    [[cells[text, image] for image in images] for text in texts],
    [f'text {text:g}' for text in texts],
    [f'image {image:g}' for image in images],
    title,
  )
