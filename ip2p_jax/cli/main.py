"""The `ip2p` command. Each subcommand is a function; its docstring and options are its --help."""

import contextlib
import functools
import os
import secrets
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from typer import Option

from ip2p_jax import bundled, storage
from ip2p_jax.captions.write import local_folder
from ip2p_jax.cli import captions
from ip2p_jax.cli.console import (
  INTERRUPTED,
  MAX_TEXT,
  MISTAKE,
  cache_compilations,
  complain,
  one_line,
  progress_bar,
  save_image,
  say,
  waiting,
)
from ip2p_jax.cli.convert import convert_any
from ip2p_jax.cli.draw import draw
from ip2p_jax.config import load_config
from ip2p_jax.data.check import check as check_data_set
from ip2p_jax.data.latents import pack_latents
from ip2p_jax.data.pack import pack as pack_pictures
from ip2p_jax.data.pack_plan import pack_size
from ip2p_jax.data.shard_writing import parse_shard
from ip2p_jax.data.sources import open_splits
from ip2p_jax.editing import image_files
from ip2p_jax.editing.editor import Editor
from ip2p_jax.editing.export import check_checkpoint
from ip2p_jax.errors import InputError
from ip2p_jax.pairs.filter import LABELS, MOST, PAPER, draw_histograms, filter_pairs
from ip2p_jax.pairs.generate import PairGenerator, PairSettings
from ip2p_jax.pairs.pair_files import RELEASED, attention_sheet
from ip2p_jax.pairs.prompts import read_prompts
from ip2p_jax.pairs.run import draw_all
from ip2p_jax.parameters import flatten
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.base import default_dtype
from ip2p_jax.pipeline.clip_scores import Clip, Scores
from ip2p_jax.pipeline.networks import (
  check_is_editor,
  check_is_text_to_image,
  fingerprint,
  networks_of,
  params_of,
  tokenizer_of,
  weights_digest,
)
from ip2p_jax.pipeline.rows import MAX_SCALE
from ip2p_jax.pipeline.sampling import Sampling, check_acts
from ip2p_jax.planning import devices, gpus
from ip2p_jax.planning.sampling import plan_sampling, sampling_report, work_on
from ip2p_jax.planning.training import plan_training, settled, stable_diffusion, training_report
from ip2p_jax.training.start import starting_checkpoint
from ip2p_jax.weights import to_params

# The paper's; the bundled miniature, and what is like it, has its own.
STEPS, CFG_TEXT, CFG_IMAGE, SAMPLER = 100, 7.5, 1.5, 'euler_ancestral'
GRID_TEXT, GRID_IMAGE = '3,5,7.5,10', '1,1.2,1.5,1.8'


Ema = Annotated[
  bool | None,
  Option(
    '--ema/--no-ema',
    help='Averaged or live weights, of a single file or workdir that holds both; by default'
    ' averaged, unless a file shows that its live ones were merged, or had an adapter added.',
  ),
]


def _default(usual: float | str, miniature: float | str) -> str:
  return f'  [default: {usual}, with the miniature {miniature}]'


def edit(
  input: Annotated[Path, Option('--input', '-i', help='A picture, or a folder of pictures.')],
  edit: Annotated[str, Option('--edit', '-e', help='What to do, as in "make it winter".')],
  output: Annotated[Path, Option('--output', '-o', help='A picture to write, or a folder.')],
  ckpt: Annotated[
    str | None,
    Option(
      help='A diffusers folder, a single .safetensors or .ckpt file, or a workdir; by default the'
      ' bundled miniature, which edits drawn scenes of 64 px.'
    ),
  ] = None,
  resolution: Annotated[
    int | None,
    Option(min=8, max=8192, help="Longer side at work, in pixels; the checkpoint's if left out."),
  ] = None,
  steps: Annotated[
    int | None, Option(min=1, help='Steps of the sampler.' + _default(STEPS, bundled.STEPS))
  ] = None,
  cfg_text: Annotated[
    float | None,
    Option(
      min=-MAX_SCALE,
      max=MAX_SCALE,
      help='How strongly to follow the text: 3 to 12.' + _default(CFG_TEXT, bundled.TEXT_GUIDANCE),
    ),
  ] = None,
  cfg_image: Annotated[
    float | None,
    Option(
      min=-MAX_SCALE,
      max=MAX_SCALE,
      help='How strongly to keep the picture: 1 to 2.2.'
      + _default(CFG_IMAGE, bundled.IMAGE_GUIDANCE),
    ),
  ] = None,
  seed: Annotated[int | None, Option(min=0, max=2**32 - 1, help='Random, if left out.')] = None,
  index: Annotated[
    int | None,
    Option(min=0, max=2**31, help='With --seed: of the first picture; both fix the noise.'),
  ] = None,
  num: Annotated[int, Option(min=1, help='Variations per picture: seed, seed + 1, ...')] = 1,
  negative: Annotated[str, Option(help='What the result should not be.')] = '',
  mask: Annotated[
    Path | None, Option(help='A picture: white is edited, black is kept exactly.')
  ] = None,
  grid: Annotated[bool, Option('--grid', help='One picture of many scales, labelled.')] = False,
  grid_text: Annotated[
    str | None, Option(help=f'The text scales of --grid.  [default: {GRID_TEXT}]')
  ] = None,
  grid_image: Annotated[
    str | None, Option(help=f'The image scales of --grid.  [default: {GRID_IMAGE}]')
  ] = None,
  sampler: Annotated[
    str | None,
    Option(
      help='euler_ancestral, euler, heun, ddim, dpmpp_2m or lcm.'
      + _default(SAMPLER, bundled.SAMPLER)
    ),
  ] = None,
  spacing: Annotated[
    str | None, Option(help="linspace, leading or trailing; the sampler's own if left out.")
  ] = None,
  karras: Annotated[bool, Option('--karras', help='Noise levels of Karras et al.')] = False,
  rescale: Annotated[float, Option(help='0 to 1, against overexposure at high scales.')] = 0.0,
  interval: Annotated[
    tuple[float, float], Option(help='Part of the steps to guide in, as in 0.2 0.8; saves time.')
  ] = (0.0, 1.0),
  batch_size: Annotated[
    int | None,
    Option(min=1, help='Pictures at a time, on all devices together; 4 for each if left out.'),
  ] = None,
  dtype: Annotated[
    str | None, Option(help='float32, bfloat16 or float16; by default float32 on a CPU only.')
  ] = None,
  variant: Annotated[str | None, Option(help="Of a folder's files, such as fp16.")] = None,
  ema: Ema = None,
  prediction_type: Annotated[
    str | None, Option(help='epsilon or v_prediction, for single files that cannot say.')
  ] = None,
) -> None:
  """Edits pictures by an instruction.

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o winter.png

  ip2p edit -i scene.png -e "make the circle red" -o red.png

  ip2p edit --ckpt CKPT -i photos/ -e "make it winter" -o winter/ --num 4 --seed 1

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o sweep.png --grid --steps 20

  ip2p edit --ckpt CKPT -i photo.jpg -e "make it winter" -o winter.png --mask sky.png

  Changes too little? Lower --cfg-image or raise --cfg-text. Too much? The other way round. Small
  faces come out better if you crop so that they are larger. The settings are stored in the result.
  """
  if not edit.strip():
    raise InputError('--edit is empty; say what to change, as in --edit "make it winter".')
  if len(edit) + len(negative) > MAX_TEXT:
    raise InputError(f'--edit and --negative are over {MAX_TEXT:,} characters; 77 tokens are read.')
  image_files.check_options({
    '--seed': seed, '--index': index, '--grid': grid, '--grid-text': grid_text,
    '--grid-image': grid_image, '--cfg-text': cfg_text, '--cfg-image': cfg_image,
  })  # fmt: skip
  if ema is False and ckpt and Path(ckpt, 'model_index.json').is_file():
    raise InputError(f'--no-ema: the folder {ckpt} holds no average; leave it out.')
  seed, index = secrets.randbelow(2**31) if seed is None else seed, index or 0
  own = (bundled.STEPS, bundled.TEXT_GUIDANCE, bundled.IMAGE_GUIDANCE, bundled.SAMPLER)
  defaults = own if bundled.is_like_it(ckpt) else (STEPS, CFG_TEXT, CFG_IMAGE, SAMPLER)
  steps, cfg_text, cfg_image, sampler = (
    default if given is None else given
    for given, default in zip((steps, cfg_text, cfg_image, sampler), defaults, strict=True)
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
  # Mistakes are refused before loading.
  sampling = Sampling(steps, sampler, spacing, karras, rescale, interval)
  check_acts(sampling, *zip(*scales, strict=True), negative)
  ckpt = _bundled() if ckpt is None else ckpt
  say(f'seed {seed}')
  cache_compilations()
  model = Editor.load(ckpt, dtype, variant=variant, ema=ema, prediction_type=prediction_type)
  batch_size = batch_size or 4 * model.mesh.size
  resolution = resolution or model.networks.resolution
  settings = options | {
    'edit': edit, 'ckpt': ckpt, 'resolution': resolution, 'mask': mask and str(mask),
    'dtype': model.dtype, 'variant': variant, 'ema': ema, 'prediction_type': prediction_type,
  }  # fmt: skip
  sheet = []
  with progress_bar('step', compiles=True) as progress:
    for job, result in image_files.run_jobs(
      model, jobs, edit, resolution=resolution, batch_size=batch_size, mask=mask,
      options=options, progress=progress,
    ):  # fmt: skip
      if grid:
        sheet.append((job, result))
        continue
      own = {'input': str(job.file), 'seed': job.seed, 'index': job.index,
             'cfg_text': job.cfg_text, 'cfg_image': job.cfg_image}  # fmt: skip
      save_image(result, job.output, settings | own)
  if grid:
    own = {'input': str(input), 'seed': seed, 'index': index, 'grid': scales}
    save_image(image_files.labelled_grid(sheet, edit), jobs[0].output, settings | own)


def _bundled() -> str:
  ckpt = str(bundled.path())
  print(
    f'no --ckpt, so this is the bundled miniature, {ckpt}: it edits drawn scenes of 64 x 64 pixels'
    ' ("make the circle red"); for photos give an InstructPix2Pix checkpoint by --ckpt',
    file=sys.stderr,
  )
  return ckpt


def convert(
  src: Annotated[
    str, typer.Argument(help='A diffusers folder, a .safetensors or .ckpt file, or a workdir.')
  ],
  dst: Annotated[
    Path,
    typer.Argument(help='A new folder (diffusers), .safetensors (ldm) or .ckpt file (original).'),
  ],
  to: Annotated[
    str | None,
    Option(help='diffusers, ldm, original, lora (adapters alone); or by the name of DST.'),
  ] = None,
  dtype: Annotated[str, Option(help='Of the written weights: float32, float16, bfloat16.')] = (
    'float32'
  ),
  ema: Ema = None,
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
  """Converts a checkpoint, or what a training run made, to a diffusers folder or an LDM file.

  ip2p convert instruct-pix2pix-00-22000.ckpt ip2p-folder --to diffusers --dtype float16

  ip2p convert ip2p-folder instruct-pix2pix.safetensors --to ldm

  ip2p convert workdir trained.safetensors

  ip2p convert workdir trained.ckpt

  ip2p convert workdir adapters --to lora

  The LDM file is what A1111 and ComfyUI load; the .ckpt file, which needs torch to be written, is
  what the original's own edit_cli.py loads: with a state_dict, and averages beside the weights.
  Beside what is written lie a stored edit and verify.py, which repeats it with torch and diffusers
  alone and prints the difference.
  """
  cache_compilations()
  convert_any(
    src, dst, to, dtype, ema=ema, variant=variant, prediction_type=prediction_type,
    verify=verify, overwrite=overwrite, say=say,
  )  # fmt: skip


def pack(
  src: Annotated[str, typer.Argument(help='Any data set; or packed shards, to make latents of.')],
  dst: Annotated[Path, typer.Argument(help='A new folder; or one that an earlier try began.')],
  size: Annotated[
    int | None,
    Option(
      min=0,
      help='Pixels you will train at; 0 keeps files as are.  [default: 256, or that of packed'
      ' shards]',
    ),
  ] = None,
  latents: Annotated[
    bool, Option('--latents', help='Store what the VAE makes of the pictures; needs --ckpt.')
  ] = False,
  ckpt: Annotated[
    Path | None, Option(help='With --latents: the checkpoint that training will start from.')
  ] = None,
  holdout: Annotated[
    float | None,
    Option(
      min=0,
      max=0.5,
      help='Share of the rows, the last, to keep for validation; rows that share a picture stay'
      " together.  [default: the data set's own splits; of the original's folders 90, 5 and 5 %]",
    ),
  ] = None,
  columns: Annotated[
    str, Option(help='Unusual column names: "input=before,edited=after,instruction=text".')
  ] = '',
  task: Annotated[str, Option(help='edit, or text_to_image.')] = 'edit',
  resize: Annotated[
    str | None,
    Option(help='With --latents: crop, or squash as the original.  [default: crop]'),
  ] = None,
  dtype: Annotated[
    str | None,
    Option(help='With --latents: of the VAE; float32 or bfloat16.  [default: float32]'),
  ] = None,
  batch_size: Annotated[
    int | None, Option(min=1, help='With --latents: pictures at once.  [default: 32]')
  ] = None,
  workers: Annotated[int, Option(min=0, help='Processes (threads, for latents).')] = 8,
  shard: Annotated[str, Option(help='i/n: this machine of n that share the work.')] = '0/1',
  max_corrupt: Annotated[int, Option(min=0, help='Broken rows to leave out before stopping.')] = 0,
) -> None:
  """Packs a data set into shards that train fast, or into latents that train twice as fast.

  ip2p pack my-pairs my-shards --holdout 0.05

  ip2p pack clip-filtered-dataset latents --latents --ckpt stable-diffusion-v1-5

  SRC: the original's folders, a folder with metadata.jsonl or metadata.csv, Parquet files, or local
  copies of the data sets on the Hugging Face hub. Killed, it goes on where it was.
  """
  of_latents = {'--ckpt': ckpt, '--resize': resize, '--dtype': dtype, '--batch-size': batch_size}
  usual = (None, 'crop', 'float32', 32)  # what they are without it
  given = [option for option, value in of_latents.items() if value not in usual]
  if given and not latents:
    raise InputError(f'{given[0]} is only for --latents; add that, or leave {given[0]} out.')
  cache_compilations()
  opened = open_splits(src, columns, task, holdout)
  size = pack_size(src, size, latents)
  common = {
    'holdout': holdout or 0.0, 'shard': shard, 'workers': workers, 'max_corrupt': max_corrupt,
  }  # fmt: skip
  with progress_bar('row', compiles=latents) as progress:
    told = common | {'say': say, 'progress': progress or (lambda done, total: None)}
    if latents:
      own = {'resize': resize, 'dtype': dtype, 'batch_size': batch_size}
      own = {name: value for name, value in own.items() if value is not None}
      summary = _pack_latents(opened, dst, ckpt, size, told | own)
    else:
      summary = pack_pictures(opened, dst, size=size or None, **told)
  rows = ', '.join(f'{count} {split}' for split, count in summary.rows.items() if count)
  say(f'{dst}: {rows} rows, {len(summary.skipped)} left out')
  if not summary.is_complete:
    say('other shards are still missing: the data set is complete when all machines are done')


def _pack_latents(opened, dst, ckpt, size, options):
  if ckpt is None or not size:
    raise InputError('--latents needs --ckpt, the checkpoint to train from, and a --size.')
  checkpoint = workdir.load(ckpt)
  networks = networks_of(checkpoint)
  tokenizer = tokenizer_of(checkpoint, networks)
  vae = to_params(
    checkpoint.tensors['vae'], networks.shapes['vae'], 'vae', source=checkpoint.source
  )
  return pack_latents(
    opened, dst, networks=networks, params=vae, tokenizer=tokenizer, resolution=size,
    fingerprint=fingerprint(checkpoint, tokenizer), **options,
  )  # fmt: skip


def check(
  path: Annotated[str, typer.Argument(help='A data set, a checkpoint, or the workdir of a run.')],
  columns: Annotated[
    str, Option(help='Unusual column names: "input=before,edited=after,instruction=text".')
  ] = '',
  task: Annotated[str, Option(help='edit, or text_to_image.')] = 'edit',
  split: Annotated[str | None, Option(help='train, validation or test; all, if left out.')] = None,
  limit: Annotated[int | None, Option(min=1, help='Rows of each split to look at.')] = None,
) -> None:
  """Looks at every row of a data set, or every tensor of a checkpoint, and names what is broken.

  ip2p check my-pairs

  ip2p check instruct-pix2pix.safetensors

  Exit status 2 if anything is.
  """
  is_checkpoint = workdir.is_workdir(path) or Path(path, 'unet').is_dir()
  if is_checkpoint or Path(path).suffix in ('.safetensors', '.ckpt'):
    of_data = {'--columns': columns, '--task': task != 'edit', '--split': split, '--limit': limit}
    if given := [option for option, value in of_data.items() if value]:
      raise InputError(f'{path}: is a checkpoint, and {given[0]} is for data sets; leave it out.')
    check_checkpoint(workdir.load(path))
    say(f'{path}: a checkpoint, every tensor as its architecture wants it')
    return
  with progress_bar('row') as progress:
    found = check_data_set(
      path, columns, task, split, say, progress or (lambda done, total: None), limit
    )
  splits = ', '.join(f'{count} {name}' for name, count in found.splits.items() if count)
  doubts = ', '.join(f'{count} {kind}' for kind, count in found.warnings.items()) or 'none'
  say(f'{path}: {splits} rows, {found.pairs} pairs; warnings: {doubts}')
  if found.broken:
    raise InputError(f'{path}: {found.broken} of {found.rows} rows are broken, see above.')
  if found.edits_nothing:
    raise InputError(
      f'{path}: in {found.warnings["unchanged"]} of {found.pairs} pairs both pictures are the same,'
      ' so there is no edit to learn; see which columns are input and edited, and say it by'
      ' --columns.'
    )
  say('nothing is broken')


def pairs(
  context: typer.Context,
  prompts: Annotated[
    Path, typer.Argument(help='JSON lines with caption (or input), edit and output.')
  ],
  out: Annotated[str, typer.Argument(help='A new folder; or one that an earlier try began.')],
  ckpt: Annotated[Path, Option(help='A text-to-image checkpoint, as for `ip2p edit`.')],
  clip: Annotated[Path, Option(help="A folder as transformers saves a CLIPModel (ViT-L/14's).")],
  samples: Annotated[int, Option(min=1, help='Pairs to draw for each prompt.')] = 100,
  steps: Annotated[int, Option(min=1, help='Steps of the sampler.')] = 100,
  sampler: Annotated[
    str, Option(help='euler_ancestral, euler, heun, ddim, dpmpp_2m or lcm.')
  ] = 'euler_ancestral',
  control: Annotated[
    str,
    Option(
      help='share (as the released generator), replace or refine (as published), auto (the one of'
      ' these that fits the captions), share+auto, or none.'
    ),
  ] = 'share',
  threshold: Annotated[
    tuple[float, float], Option(help='With share: range of the part of the steps that shares.')
  ] = (0.1, 0.9),
  guidance: Annotated[tuple[float, float], Option(help='Range of the guidance scale.')] = (7.5, 15),
  cross_steps: Annotated[
    float,
    Option(help='With replace, refine or auto: part of the steps in which they act on words.'),
  ] = 0.8,
  self_steps: Annotated[float, Option(help='The same, on coarse self-attention.')] = 0.4,
  negative: Annotated[str, Option(help='What no picture should be.')] = '',
  size: Annotated[
    int | None, Option(min=8, help="Of the pictures, pixels; the checkpoint's if left out.")
  ] = None,
  seed: Annotated[int, Option(min=0, help='Of the whole run.')] = 0,
  keep: Annotated[
    str,
    Option(help='Pictures to write: all, or those passing the released thresholds; numbers: all.'),
  ] = 'all',
  batch_size: Annotated[int, Option(min=1, help='Pairs at a time, on all devices together.')] = 8,
  shard: Annotated[str, Option(help='i/n: this worker of n that share the prompts.')] = '0/1',
  dtype: Annotated[
    str | None, Option(help='float32 or bfloat16; by default float32 on a CPU only.')
  ] = None,
  ema: Ema = None,
  show_attention: Annotated[
    int, Option(min=0, help='Only draw so many prompts, once, and where each word looked.')
  ] = 0,
) -> None:
  """Draws pairs of pictures for pairs of captions, with CLIP's numbers for each.

  ip2p pairs prompts.jsonl raw --ckpt stable-diffusion-v1-5 --clip clip-vit-large-patch14

  ip2p pairs prompts.jsonl raw --ckpt CKPT --clip CLIP --samples 4 --steps 25 --shard 3/8

  ip2p pairs prompts.jsonl maps --ckpt CKPT --clip CLIP --control auto --show-attention 4

  Killed, it goes on where it was, and ends with the very same files. It may also go on with more
  samples or prompts, another batch size or number of workers. `ip2p filter` keeps the good pairs.
  """
  read = read_prompts(prompts)
  number = parse_shard(shard)
  settings = {
    'samples': samples, 'steps': steps, 'sampler': sampler, 'control': control,
    'threshold': threshold, 'guidance': guidance, 'cross': cross_steps, 'self': self_steps,
    'negative': negative, 'seed': seed, 'keep': keep, 'batch_size': batch_size,
  }  # fmt: skip
  PairSettings(**settings)  # refuses mistakes before loading
  _check_pairs_options(context, control, guidance, show_attention)
  if dtype not in (None, 'float32', 'bfloat16'):
    raise InputError(f'--dtype is {dtype!r}; use float32 or bfloat16.')
  cache_compilations()
  checkpoint = workdir.load(ckpt, ema=ema)
  networks = networks_of(checkpoint)
  dtype = dtype or default_dtype()
  size = size or networks.resolution
  towers = Clip.load(clip)
  generator = PairGenerator(
    networks, params_of(checkpoint, networks, dtype), tokenizer_of(checkpoint, networks), towers,
    PairSettings(size=size, **settings),
  )  # fmt: skip
  if show_attention:
    _show_attention(generator, read[:show_attention], local_folder(out))
    return
  identity = {'dtype': dtype, 'clip': weights_digest(flatten(towers.params))}
  parts = {'weights': 'unet', 'vae': 'vae', 'text_encoder': 'text_encoder'}
  identity |= {name: weights_digest(checkpoint.tensors[part]) for name, part in parts.items()}
  with progress_bar('pair', compiles=True) as progress:
    told = progress or (lambda done, total: None)
    count = draw_all(generator, read, out, identity, number, told)
  say(f'{out}: {count} pairs; `ip2p filter {out} DST` keeps the good ones')


def _check_pairs_options(context, control, guidance, show_attention):
  """InputError for an option that was given and would do nothing."""
  given = captions.given_options(context)
  shares, injects = control.startswith('share'), control not in ('none', 'share')
  idle = {}  # why, by name
  if not shares:
    idle['threshold'] = f'nothing is shared with --control {control}'
  if not injects:
    idle['cross_steps'] = idle['self_steps'] = f'no attention is replaced with --control {control}'
  if guidance == (1, 1):
    idle['negative'] = 'with --guidance 1 1 it has no weight'
  if show_attention:
    only_once = '--show-attention draws each prompt once, and keeps no pairs'
    idle |= dict.fromkeys(('samples', 'keep', 'shard'), only_once)
  for name, why in idle.items():
    if name in given:
      raise InputError(f'{given[name]} would do nothing: {why}; leave it out.')


def _show_attention(generator, prompts, out):
  generator.check(prompts)
  size = generator.drawing.batch_size
  for start in range(0, len(prompts), size):
    part = prompts[start : start + size]
    samples = [generator.drawing.sample(prompt.index, 0) for prompt in part]
    drawn, _, attention = generator.draw(part, samples, shows_attention=True)
    for i, (prompt, sample) in enumerate(zip(part, samples, strict=True)):
      sheet = attention_sheet(
        generator.tokenizer, prompt, np.asarray(drawn)[:, i], np.asarray(attention)[:, i]
      )
      settings = {'caption': prompt.caption, 'output': prompt.edited_caption, **sample._asdict()}
      out.mkdir(parents=True, exist_ok=True)
      save_image(sheet, out / f'{prompt.index:07d}_{sample.seed}.png', settings)


def filter(
  paths: Annotated[list[Path], typer.Argument(help='Folders of `ip2p pairs`, then a new one.')],
  preset: Annotated[
    str | None, Option(help='paper or released: what --image is.  [default: paper]')
  ] = None,
  image: Annotated[
    float | None, Option(help='Least likeness of both pictures.  [default: 0.75, released 0.7]')
  ] = None,
  caption: Annotated[
    float, Option(help='Least likeness of each picture and its caption.')
  ] = PAPER.clip_sim_0,
  direction: Annotated[
    float, Option(help='Least likeness of the ways that pictures and captions change.')
  ] = PAPER.clip_sim_dir,
  most: Annotated[int, Option(min=1, help='Pairs of a prompt, the best by direction.')] = MOST,
  drop_duplicates: Annotated[
    bool, Option('--drop-duplicates', help='Of pairs that look the same, keep the best.')
  ] = False,
  shards: Annotated[
    bool, Option('--shards', help='Write packed shards, as `ip2p pack` would of the folder.')
  ] = False,
  holdout: Annotated[
    float, Option(min=0, max=0.5, help='With --shards: share of the rows kept for validation.')
  ] = 0.0,
) -> None:
  """Keeps the good ones of the pairs that `ip2p pairs` drew, ready to pack or to train on.

  ip2p filter raw pairs

  ip2p filter raw-of-worker-0 raw-of-worker-1 shards --shards --preset released

  ip2p filter raw stricter --image 0.8 --direction 0.25

  Nothing is drawn again and the folders stay as they are, so other thresholds can be tried at will.
  """
  presets = {None: PAPER, 'paper': PAPER, 'released': RELEASED}
  if preset not in presets:
    raise InputError(f'--preset is {preset!r}; use paper or released.')
  if preset and image is not None:
    raise InputError('--preset is a value for --image, which is given too; leave out one of them.')
  if len(paths) < 2:
    raise InputError('give the folders of `ip2p pairs`, and then a new one to write to.')
  image = presets[preset].clip_sim_image if image is None else image
  thresholds = Scores(caption, caption, direction, image)
  if not all(-1 <= least <= 1 for least in thresholds):
    raise InputError('--image, --caption and --direction are cosines; give numbers of -1 to 1.')
  if holdout and not shards:
    raise InputError('--holdout is only for --shards; add that, or leave --holdout out.')
  *sources, out = paths
  write = functools.partial(_filter_to_shards, holdout=holdout) if shards else filter_pairs
  with progress_bar('prompt') as progress:
    told = progress or (lambda done, total: None)
    found = write(sources, out, thresholds, most, drop_duplicates, told)
  of_all = lambda count: f'{count} of {found.drawn} ({100 * count / max(found.drawn, 1):.1f}%)'
  for name, least, label in zip(Scores._fields, thresholds, LABELS, strict=True):
    say(f'{name} >= {least} ({label}): {of_all(found.passed[name])}')
  say(f'all of these: {of_all(found.passed_all)}')
  if found.broken:
    say(f'overflowed when they were drawn: {of_all(found.broken)}')
  if drop_duplicates:
    say(f'look like a better one: {found.duplicates}')
  if not found.kept:
    what = 'pack' if shards else 'write'
    raise InputError(f'no pair passes all thresholds, so there is nothing to {what}; lower them.')
  try:
    draw_histograms(found.scores, thresholds, out / 'histograms.png')
    say(f'wrote {out / "histograms.png"}')
  except ImportError:
    say('no histograms: install matplotlib to have them')
  say(f'{out}: {found.kept} pairs of {found.prompts} prompts, at most {most} each')


def _filter_to_shards(sources, out, *how, holdout):
  """`filter_pairs`, whose folder (of hard links) is packed; whole or not at all."""
  busy = f'{out}: another process writes it; wait for that, or give another folder.'
  with contextlib.ExitStack() as stack:
    stack.enter_context(storage.locked(out.with_name(f'.{out.name}.lock'), busy))
    if out.exists():
      raise InputError(f'{out} exists; give a new folder, or delete it.')
    place = stack.enter_context(storage.unfinished(out))
    pairs, packed = place / 'pairs', place / 'shards'
    found = filter_pairs(sources, pairs, *how)
    if found.kept:
      rows = open_splits(str(pairs), holdout=holdout)
      pack_pictures(rows, packed, holdout=holdout, workers=0, say=say)
      packed.rename(out)
  return found


def plan(
  topology: Annotated[
    list[str],
    Option(
      help='A slice of TPUs (v5e-16, or its shape v5e:4x4), or GPUs of one host (h100, h100x8); may'
      ' be repeated.'
    ),
  ],
  config: Annotated[
    Path | None,
    Option(help='Of the training run, as for train.py; configs/train_256.py by default.'),
  ] = None,
  change: Annotated[
    list[str] | None,
    Option('--set', help='A setting of the config: accumulation=4, mesh.fsdp=4; may be repeated.'),
  ] = None,
  device_batch: Annotated[
    int | None,
    Option(
      min=1, help='Examples at a time on a device; accumulation follows, of each topology its own.'
    ),
  ] = None,
  ckpt: Annotated[
    Path | None, Option(help='Whose architecture to plan for; Stable Diffusion 1.5 if left out.')
  ] = None,
  from_pictures: Annotated[
    bool, Option('--from-pictures', help='Not from latents: the VAE runs in every step.')
  ] = False,
  of: Annotated[
    str, Option(help='What to plan: training, edits, or pairs (as `ip2p pairs` draws them).')
  ] = 'training',
  size: Annotated[
    int | None, Option(min=8, help='With edits and pairs: of the pictures, pixels; 512 by default.')
  ] = None,
  batch_size: Annotated[
    int | None,
    Option(
      min=1, help='With edits and pairs: of one call, on all devices of a host; 8 each by default.'
    ),
  ] = None,
  steps: Annotated[
    int | None, Option(min=1, help='With edits and pairs: of the sampler; 100 by default.')
  ] = None,
  quick: Annotated[
    bool,
    Option(
      '--quick', help='On TPUs: compile sooner; tells whether it fits, not how long it takes.'
    ),
  ] = False,
) -> None:
  """Tells what work needs on TPUs or GPUs: does it fit, what does it cost. Neither is needed.

  ip2p plan --topology v5e-16 --device-batch 32

  ip2p plan --quick --topology v6e-8 --topology v4-8 --config configs/train_512.py --device-batch 16

  ip2p plan --topology v5e-8 --of edits --size 512 --batch-size 32

  ip2p plan --topology a100-40 --topology h100x8 --device-batch 32

  The real compiler compiles the real program. At full size on two cores a TPU's takes 7 to 60
  minutes and up to 16 GB, a GPU's about 5 minutes. They come with `pip install 'jax[tpu]'` and
  `'jax[cuda13]'`. GPUs: a100-40, a100-80, a6000, h100, h200, b200.
  """
  if of not in ('training', 'edits', 'pairs'):
    raise InputError(f'--of is {of!r}; use training, edits or pairs.')
  _check_plan_options(
    of,
    {'--size': size, '--batch-size': batch_size, '--steps': steps},
    {'--set': change, '--device-batch': device_batch, '--from-pictures': from_pictures,
     '--config': config},
  )  # fmt: skip
  for name in topology:
    if quick and gpus.is_gpu(name):
      raise InputError(f"--quick: of no use with {name}; a GPU's compiler does not know it.")
    devices.describe(name)
  settings = {}  # by topology; mistakes are refused before the first long compile
  if of == 'training':
    loaded = load_config(config or Path('configs/train_256.py'), change or [])
    settings = {name: settled(loaded, name, device_batch) for name in topology}
  if ckpt is None:
    is_editor = of == 'edits' or (of == 'training' and loaded.task == 'edit')
    networks = stable_diffusion(is_editor)
  elif of == 'training':
    networks = networks_of(starting_checkpoint(replace(loaded, checkpoint=str(ckpt))))
  else:
    networks = networks_of(workdir.load(ckpt))
  if of != 'training':
    work = {name: work_on(name, of, size or 512, batch_size, steps or 100) for name in topology}
    check = check_is_editor if of == 'edits' else check_is_text_to_image
    check(networks, str(ckpt))
    if (size or 512) % networks.vae_config.factor:
      raise InputError(f'--size is {size or 512}; use a multiple of {networks.vae_config.factor}.')
  failed = 0
  for name in topology:
    with waiting('compiling, minutes to an hour'):
      if of == 'training':
        found = plan_training(settings[name], networks, name, not from_pictures, say, quick)
        text = training_report(found, settings[name])
      else:
        found = plan_sampling(networks, work[name], name, say, quick)
        text = sampling_report(found)
    print(text)
    failed += not found.compiled.fits
  if failed:
    sys.exit(1)


def _check_plan_options(of, of_sampling, of_training):
  if of == 'training':
    wrong, advice = of_sampling, 'say --set resolution=256, --set batch_size=1024'
  else:
    wrong, advice = of_training, 'say --size and --batch-size'
  given = ' and '.join(option for option, value in wrong.items() if value)
  if given:
    raise InputError(f'{given}: of no use with --of {of}; {advice}.')
  changes = of_training['--set'] or ()
  if any(item.partition('=')[0] == 'checkpoint' for item in changes):
    raise InputError('--set checkpoint: only the architecture is planned; say it by --ckpt.')
  if of_training['--device-batch'] and any(item.startswith('accumulation') for item in changes):
    raise InputError('--device-batch and --set accumulation say the same; give one of them.')


def app() -> typer.Typer:
  """All commands."""
  app = typer.Typer(add_completion=False, rich_markup_mode=None, help='InstructPix2Pix in JAX.')
  app.command()(edit)
  app.command()(draw)
  app.command()(convert)
  app.command()(check)
  app.command()(pack)
  app.add_typer(captions.app, name='captions')
  app.command()(pairs)
  app.command()(filter)
  app.command()(plan)
  return app


def main() -> None:
  """The `ip2p` command."""
  run(app(), 'ip2p')


def run(app: typer.Typer | Callable, name: str) -> None:
  """Runs a command line. A user's mistake is one line on stderr and exit status 2."""
  if not isinstance(app, typer.Typer):
    function, app = app, typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
  with warnings.catch_warnings():
    warnings.simplefilter('default', UserWarning)
    tell = functools.cache(lambda message: complain(name, f'warning: {message}'))  # each once
    warnings.showwarning = lambda message, *_: tell(str(message))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that we tidy up
    status = _status(app, name)
  if status == INTERRUPTED:  # the device may still be at work, and would fail under our feet
    sys.stdout.flush()
    os._exit(status)
  sys.exit(status)


def _status(app: typer.Typer, name: str) -> int:
  try:
    with one_line(name, 'lower --batch-size or --resolution.'):
      status = typer.main.get_command(app)(prog_name=name, standalone_mode=False)
    if status != INTERRUPTED:
      return status or 0
  except typer.Abort:  # the same in older versions of typer
    pass
  except Exception as error:
    if not hasattr(error, 'format_message'):  # what a wrong flag raises
      raise
    command = getattr(getattr(error, 'ctx', None), 'command_path', name)
    complain(name, f'error: {error.format_message()} (see {command} --help)')
    return MISTAKE
  complain(name, 'stopped')
  return INTERRUPTED


if __name__ == '__main__':
  main()
