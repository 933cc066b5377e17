"""The `ip2p` command. Each subcommand is a function; its docstring and options are its --help."""

import os
import secrets
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm
from typer import Option

from ip2p_jax import images as pictures
from ip2p_jax.errors import InputError

GRID_THUMBNAIL = 512  # pixels of the longer side of each picture in a grid


def edit(
  input: Annotated[Path, Option('--input', '-i', help='A picture, or a folder of pictures.')],
  edit: Annotated[str, Option('--edit', '-e', help='What to do, as in "make it winter".')],
  output: Annotated[Path, Option('--output', '-o', help='A picture to write, or a folder.')],
  ckpt: Annotated[Path, Option(help='A diffusers folder, or a single .safetensors or .ckpt file.')],
  resolution: Annotated[int, Option(min=8, help='Longer side at work, in pixels.')] = 512,
  steps: Annotated[int, Option(min=1, help='Steps of the sampler.')] = 100,
  cfg_text: Annotated[float, Option(help='How strongly to follow the instruction: 3 to 12.')] = 7.5,
  cfg_image: Annotated[float, Option(help='How strongly to keep the picture: 1 to 2.2.')] = 1.5,
  seed: Annotated[int | None, Option(min=0, max=2**32 - 1, help='Random, if left out.')] = None,
  index: Annotated[
    int, Option(min=0, help='Counts the pictures of a folder; picture and seed fix the noise.')
  ] = 0,
  num: Annotated[int, Option(min=1, help='Variations per picture: seed, seed + 1, ...')] = 1,
  negative: Annotated[str, Option(help='What the result should not be.')] = '',
  mask: Annotated[
    Path | None, Option(help='A picture: white is edited, black is kept exactly.')
  ] = None,
  grid: Annotated[bool, Option('--grid', help='One picture of many scales, labelled.')] = False,
  grid_text: Annotated[str, Option(help='The text scales of --grid.')] = '3,5,7.5,10',
  grid_image: Annotated[str, Option(help='The image scales of --grid.')] = '1,1.2,1.5,1.8',
  sampler: Annotated[
    str, Option(help='euler_ancestral, euler, heun, ddim, dpmpp_2m or lcm.')
  ] = 'euler_ancestral',
  spacing: Annotated[
    str | None, Option(help="linspace, leading or trailing; the sampler's own if left out.")
  ] = None,
  karras: Annotated[bool, Option('--karras', help='Noise levels of Karras et al.')] = False,
  rescale: Annotated[float, Option(help='0 to 1, against overexposure at high scales.')] = 0.0,
  interval: Annotated[
    tuple[float, float], Option(help='Part of the steps to guide in, as in 0.2 0.8; saves time.')
  ] = (0.0, 1.0),
  batch_size: Annotated[int, Option(min=1, help='Pictures at a time.')] = 4,
  dtype: Annotated[
    str | None, Option(help='float32, bfloat16 or float16; by default float32 on a CPU only.')
  ] = None,
  variant: Annotated[str | None, Option(help="Of a folder's files, such as fp16.")] = None,
  ema: Annotated[bool, Option(help='Whether to prefer averaged weights in a single file.')] = True,
  prediction_type: Annotated[
    str | None, Option(help='epsilon or v_prediction, for single files that cannot say.')
  ] = None,
) -> None:
  """Edits pictures by an instruction.

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o winter.png

  ip2p edit --ckpt CKPT -i photos/ -e "make it winter" -o winter/ --num 4 --seed 1

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o sweep.png --grid --steps 20

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o winter.png --mask sky.png

  Changes too little? Lower --cfg-image or raise --cfg-text. Too much? The other way round. Small
  faces come out better if you crop so that they are larger. The settings are stored in the result.
  """
  if not edit.strip():
    raise InputError('--edit is empty; say what to change, as in --edit "make it winter".')
  if not input.exists():
    raise InputError(f'--input {input}: no such file or folder.')
  files = pictures.find_images(input)
  scales = _grid_scales(grid_text, grid_image) if grid else [(cfg_text, cfg_image)]
  if grid and (len(files) > 1 or num > 1):
    raise InputError('--grid makes one picture of one picture; give a file, and leave out --num.')
  outputs = _outputs(input, files, output, 1 if grid else num)
  seed = secrets.randbelow(2**31) if seed is None else seed
  if seed + num > 2**32:
    raise InputError(f'--seed {seed} with --num {num} goes past {2**32 - 1}; use a lower seed.')
  jobs = [
    {'file': file, 'index': index + i, 'seed': seed + n, 'text': text, 'image': image}
    for i, file in enumerate(files)
    for n in range(num)
    for text, image in scales
  ]
  groups = _by_size(jobs, resolution, mask)  # also finds broken pictures before any work is done
  print(f'seed {seed}')

  from ip2p_jax.editor import Editor  # brings in jax, too slow for --help

  _cache_compilations()
  editor = Editor.load(ckpt, dtype, variant=variant, ema=ema, prediction_type=prediction_type)
  settings = {
    'edit': edit, 'negative': negative, 'ckpt': str(ckpt), 'resolution': resolution,
    'steps': steps, 'sampler': sampler, 'spacing': spacing, 'karras': karras, 'rescale': rescale,
    'interval': list(interval), 'mask': mask and str(mask), 'ema': ema, 'variant': variant,
    'prediction_type': prediction_type, 'dtype': editor.dtype,
  }  # fmt: skip
  batch_size = min(batch_size, max(map(len, groups)))
  batches = [
    group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)
  ]
  sheet = {}
  with _progress_bar(len(batches) * steps) as bar:
    for batch in batches:
      originals = [pictures.read(job['file']) for job in batch]
      results = editor.edit(
        originals,
        edit,
        steps=steps,
        text_guidance=[job['text'] for job in batch],
        image_guidance=[job['image'] for job in batch],
        seed=[job['seed'] for job in batch],
        indices=[job['index'] for job in batch],
        sampler=sampler,
        spacing=spacing,
        karras=karras,
        rescale=rescale,
        interval=interval,
        negative=negative,
        mask=mask and [pictures.read_mask(mask, original.size) for original in originals],
        resolution=resolution,
        batch_size=batch_size,
        progress=bar and _counter(bar),
      )
      for job, result in zip(batch, results, strict=True):
        if grid:
          result.thumbnail((GRID_THUMBNAIL, GRID_THUMBNAIL))
          sheet[job['text'], job['image']] = result
          continue
        path = outputs[job['file'], job['seed'] - seed]
        own = {'input': str(job['file']), 'seed': job['seed'], 'index': job['index'],
               'cfg_text': job['text'], 'cfg_image': job['image']}  # fmt: skip
        pictures.save(result, path, settings | own)
        _say(f'wrote {path}')
  if grid:
    (path,) = outputs.values()
    own = {'input': str(input), 'seed': seed, 'index': index, 'grid': scales}
    pictures.save(_labelled(sheet, edit), path, settings | own)
    _say(f'wrote {path}')


def convert(
  src: Annotated[Path, typer.Argument(help='A diffusers folder, or a .safetensors or .ckpt file.')],
  dst: Annotated[Path, typer.Argument(help='A new folder (diffusers) or .safetensors file (ldm).')],
  to: Annotated[str, Option(help='diffusers or ldm.')] = 'diffusers',
  dtype: Annotated[str, Option(help='Of the written weights: float32, float16, bfloat16.')] = (
    'float32'
  ),
  ema: Annotated[bool, Option(help='Whether to prefer averaged weights in a single file.')] = True,
  variant: Annotated[
    str | None, Option(help='Which of a source folder’s files to read, such as fp16.')
  ] = None,
  prediction_type: Annotated[
    str | None, Option(help='epsilon or v_prediction, for single files that cannot say.')
  ] = None,
  verify: Annotated[
    bool, Option(help='Whether to store a short edit and a verify.py that repeats it in PyTorch.')
  ] = True,
  overwrite: Annotated[bool, Option('--overwrite', help='Replace what is at DST.')] = False,
) -> None:
  """Converts a checkpoint between the diffusers folder and the single LDM file.

  ip2p convert instruct-pix2pix-00-22000.ckpt ip2p-folder --to diffusers --dtype float16

  ip2p convert ip2p-folder instruct-pix2pix.safetensors --to ldm

  The LDM file is what A1111 and ComfyUI load. Beside the weights lie a stored edit and verify.py,
  which repeats it with torch and diffusers alone and prints the difference.
  """
  from ip2p_jax import convert as conversion

  _cache_compilations()
  conversion.convert(
    src, dst, to, dtype, ema=ema, variant=variant, prediction_type=prediction_type,
    verify=verify, overwrite=overwrite, say=_say,
  )  # fmt: skip


def main() -> None:
  """The `ip2p` command."""
  app = typer.Typer(add_completion=False, rich_markup_mode=None, help='InstructPix2Pix in JAX.')
  app.command()(edit)
  app.command()(convert)
  run(app, 'ip2p')


def run(app: typer.Typer | Callable, name: str) -> None:
  """Runs a command line. A user's mistake is one line on stderr and exit status 2."""
  if not isinstance(app, typer.Typer):
    function, app = app, typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
  warnings.showwarning = lambda message, *_: _complain(name, f'warning: {message}')
  try:
    status = typer.main.get_command(app)(prog_name=name, standalone_mode=False)
  except InputError as error:
    _complain(name, f'error: {error}')
    status = 2
  except KeyboardInterrupt:
    _complain(name, 'stopped')
    status = 130
  except Exception as error:
    if hasattr(error, 'format_message'):  # what click raises for a wrong flag
      _complain(name, f'error: {error.format_message()} (see {name} --help)')
      status = 2
    elif 'RESOURCE_EXHAUSTED' in str(error):
      _complain(name, 'error: out of memory; lower --batch-size or --resolution.')
      status = 2
    else:
      raise
  sys.exit(status)


def _complain(name, text):
  print(f'{name}: {" ".join(text.split())}', file=sys.stderr)


def _say(text):
  tqdm.write(text)


def _progress_bar(total):
  return tqdm(total=total, unit='step', disable=not sys.stderr.isatty(), dynamic_ncols=True)


def _counter(bar):
  before = bar.n

  def count(done, total):
    del total
    bar.update(before + done - bar.n)

  return None if bar.disable else count


def _cache_compilations():
  """Keeps compiled programs on disk, so that the next start is fast."""
  import jax

  if not jax.config.jax_compilation_cache_dir:
    home = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    jax.config.update('jax_compilation_cache_dir', str(home / 'ip2p-jax'))


def _grid_scales(text, image) -> list[tuple[float, float]]:
  try:
    texts, images = ([float(part) for part in scales.split(',')] for scales in (text, image))
  except ValueError:
    raise InputError(
      '--grid-text and --grid-image take numbers with commas, as in 3,5,7.5.'
    ) from None
  return [(t, i) for t in texts for i in images]


def _labelled(sheet, title):
  texts, images = (list(dict.fromkeys(scales)) for scales in zip(*sheet, strict=True))
  rows = [[sheet[text, image] for image in images] for text in texts]
  row_labels = [f'text {text:g}' for text in texts]
  return pictures.grid(rows, row_labels, [f'image {image:g}' for image in images], title)


def _outputs(input, files, output, num) -> dict[tuple[Path, int], Path]:
  """Where each (file, variation) goes; checks now that all of it can be written."""
  is_folder = output.is_dir() or input.is_dir() or not output.suffix
  if is_folder and output.suffix.lower() in pictures.WRITE_FORMATS and not output.is_dir():
    raise InputError(f'--output {output}: --input is a folder, so give a folder.')
  suffixes = [f'-{n}' for n in range(num)] if num > 1 else ['']
  result = {}
  for file in files:
    base = output / f'{file.stem}.png' if is_folder else output
    for n, suffix in enumerate(suffixes):
      result[file, n] = path = base.with_name(f'{base.stem}{suffix}{base.suffix}')
      pictures.check_writable(path)
      if list(result.values()).count(path) > 1:
        raise InputError(f'--input {input}: two pictures would both be written to {path}.')
  return result


def _by_size(jobs, resolution, mask) -> list[list[dict]]:
  groups: dict[tuple[int, int], list[dict]] = {}
  sizes = {}
  for job in jobs:
    file = job['file']
    if file not in sizes:
      picture = pictures.read(file)
      sizes[file] = pictures.working_size(*picture.size, resolution)
      if mask is not None:
        pictures.read_mask(mask, picture.size)
    groups.setdefault(sizes[file], []).append(job)
  return list(groups.values())
