"""`ip2p edit`."""

import secrets
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from ip2p_jax import bundled
from ip2p_jax.cli import console
from ip2p_jax.cli.console import MAX_TEXT
from ip2p_jax.defaults import MAX_SEED
from ip2p_jax.errors import InputError

GRID_TEXT, GRID_IMAGE = '3,5,7.5,10', '1,1.2,1.5,1.8'


def edit(
  input: Annotated[Path, Option('--input', '-i', help='An image, or a folder of images.')],
  edit: Annotated[str, Option('--edit', '-e', help='What to do, such as "make it winter".')],
  output: Annotated[Path, Option('--output', '-o', help='An image to write, or a folder.')],
  ckpt: Annotated[
    str | None,
    Option(
      help='A diffusers folder, a single .safetensors or .ckpt file, or a workdir; by default the'
      ' bundled miniature, which edits drawn scenes of 64 px.'
    ),
  ] = None,
  resolution: Annotated[
    int | None,
    Option(min=8, max=8192, help="Longer side to work at, pixels; by default the checkpoint's."),
  ] = None,
  steps: console.Steps = None,
  cfg_text: console.CfgText = None,
  cfg_image: console.CfgImage = None,
  seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help='By default random.')] = None,
  index: Annotated[
    int | None,
    Option(min=0, max=2**31, help='With --seed: index of the first image; both fix the noise.'),
  ] = None,
  num: Annotated[int, Option(min=1, help='Variations per image: seed, seed + 1, ...')] = 1,
  negative: Annotated[str, Option(help='What the result should not show.')] = '',
  mask: Annotated[
    Path | None, Option(help='An image: white is edited, black does not change.')
  ] = None,
  grid: Annotated[bool, Option('--grid', help='One image of many scales, labelled.')] = False,
  grid_text: Annotated[
    str | None, Option(help=f'The text scales of --grid.  [default: {GRID_TEXT}]')
  ] = None,
  grid_image: Annotated[
    str | None, Option(help=f'The image scales of --grid.  [default: {GRID_IMAGE}]')
  ] = None,
  sampler: console.SamplerName = None,
  spacing: console.Spacing = None,
  karras: console.Karras = False,
  rescale: console.Rescale = 0.0,
  interval: console.Interval = (0.0, 1.0),
  batch_size: Annotated[
    int | None,
    Option(min=1, help='Images at a time, on all devices; by default 4 per device.'),
  ] = None,
  dtype: Annotated[
    str | None, Option(help='float32, bfloat16 or float16; by default float32 on a CPU only.')
  ] = None,
  variant: Annotated[str | None, Option(help="Variant of a folder's files, such as fp16.")] = None,
  ema: console.Ema = None,
  prediction_type: Annotated[
    str | None, Option(help='epsilon or v_prediction, for single files without this setting.')
  ] = None,
) -> None:
  """Edits images by an instruction.

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o winter.png

  ip2p edit -i scene.png -e "make the circle red" -o red.png

  ip2p edit --ckpt CKPT -i photos/ -e "make it winter" -o winter/ --num 4 --seed 1

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o sweep.png --grid --steps 20

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o winter.png --mask sky.png

  If the edit changes too little, lower --cfg-image or raise --cfg-text; if too much, do the
  opposite. Small faces improve if you crop so that they are larger. The result stores the settings.
  """
  from ip2p_jax.editing import image_files
  from ip2p_jax.editing.editor import Editor
  from ip2p_jax.pipeline.sampling import Sampling, check_acts

  _check(edit, negative, ckpt, ema)
  image_files.check_options({
    '--seed': seed, '--index': index, '--grid': grid, '--grid-text': grid_text,
    '--grid-image': grid_image, '--cfg-text': cfg_text, '--cfg-image': cfg_image,
  })  # fmt: skip
  seed, index = secrets.randbelow(2**31) if seed is None else seed, index or 0
  steps, cfg_text, cfg_image, sampler = console.editor_defaults(
    [ckpt], steps, cfg_text, cfg_image, sampler
  )
  scales = [(cfg_text, cfg_image)]
  if grid:
    scales = image_files.parse_scales(grid_text or GRID_TEXT, grid_image or GRID_IMAGE)
  jobs = image_files.plan_jobs(
    input, output, scales, seed=seed, index=index, num=num, mask=mask, is_grid=grid
  )
  options = {
    'steps': steps, 'sampler': sampler, 'spacing': spacing, 'karras': karras,
    'rescale': rescale, 'interval': interval, 'negative': negative,
  }  # fmt: skip
  # Refuses wrong values before loading.
  sampling = Sampling(steps, sampler, spacing, karras, rescale, interval)
  check_acts(sampling, *zip(*scales, strict=True), negative)
  ckpt = _bundled() if ckpt is None else ckpt
  console.cache_compilations()
  model = Editor.load(ckpt, dtype, variant=variant, ema=ema, prediction_type=prediction_type)
  console.say(f'seed {seed}')
  resolution = resolution or model.networks.resolution
  settings = options | {
    'edit': edit, 'ckpt': ckpt, 'resolution': resolution, 'mask': mask and str(mask),
    'dtype': model.dtype, 'variant': variant, 'ema': ema, 'prediction_type': prediction_type,
  }  # fmt: skip
  with console.progress('step', compiles=True) as progress:
    results = image_files.run_jobs(
      model, jobs, edit, resolution=resolution, batch_size=batch_size or 4 * model.mesh.size,
      mask=mask, options=options, progress=progress,
    )  # fmt: skip
    if grid:
      sheet = list(results)
    else:
      _save_each(results, settings)
  if grid:
    own = {'input': str(input), 'seed': seed, 'index': index, 'grid': scales}
    console.save(image_files.labelled_grid(sheet, edit), jobs[0].output, settings | own)


def _check(edit, negative, ckpt, ema) -> None:
  """Refuses wrong values before loading."""
  if not edit.strip():
    raise InputError('--edit is empty; say what to change, such as --edit "make it winter".')
  if len(edit) + len(negative) > MAX_TEXT:
    raise InputError(
      f'--edit and --negative are over {MAX_TEXT:,} characters; models read 77 tokens.'
    )
  if ema is False and ckpt and Path(ckpt, 'model_index.json').is_file():
    raise InputError(f'--no-ema: the folder {ckpt} holds no average; leave it out.')


def _save_each(results, settings) -> None:
  """Writes each result as soon as it is there."""
  for job, result in results:
    own = {'input': str(job.file), 'seed': job.seed, 'index': job.index,
           'cfg_text': job.cfg_text, 'cfg_image': job.cfg_image}  # fmt: skip
    console.save(result, job.output, settings | own)


def _bundled() -> str:
  ckpt = str(bundled.path())
  print(
    f'no --ckpt, so this uses the bundled miniature, {ckpt}: it edits drawn scenes of 64 x 64'
    ' pixels ("make the circle red"); for photos give an InstructPix2Pix checkpoint by --ckpt',
    file=sys.stderr,
  )
  return ckpt
