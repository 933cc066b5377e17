"""`ip2p pairs` and `ip2p filter`."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax import storage
from ip2p_jax.cli import console
from ip2p_jax.defaults import SAMPLER, SAMPLERS
from ip2p_jax.errors import InputError
from ip2p_jax.pairs.thresholds import MOST, PAPER, RELEASED
from ip2p_jax.progress import unwatched


def pairs(
  context: typer.Context,
  prompts: Annotated[
    Path, typer.Argument(help='JSON lines with caption (or input), edit and output.')
  ],
  out: Annotated[str, typer.Argument(help='A new folder, or one to continue in.')],
  ckpt: Annotated[Path, Option(help='A text-to-image checkpoint, as for `ip2p edit`.')],
  clip: Annotated[Path, Option(help='A transformers folder of a CLIPModel (ViT-L/14).')],
  samples: Annotated[int, Option(min=1, help='Pairs to draw for each prompt.')] = 100,
  steps: Annotated[int, Option(min=1, help='Steps of the sampler.')] = 100,
  sampler: Annotated[str, Option(help=f'{SAMPLERS}.')] = SAMPLER,
  control: Annotated[
    str,
    Option(
      help='share (as in the released generator), replace or refine (as published), auto (whichever'
      ' of these two fits the captions), share+auto, or none.'
    ),
  ] = 'share',
  threshold: Annotated[
    tuple[float, float], Option(help='With share: range of the part of the steps that share.')
  ] = (0.1, 0.9),
  guidance: Annotated[tuple[float, float], Option(help='Range of the guidance scale.')] = (7.5, 15),
  cross_steps: Annotated[
    float,
    Option(help='With replace, refine or auto: share of the steps that control words.'),
  ] = 0.8,
  self_steps: Annotated[float, Option(help='The same for coarse self-attention.')] = 0.4,
  negative: Annotated[str, Option(help='What no image should show.')] = '',
  size: Annotated[
    int | None, Option(min=8, help="Side of the images, pixels; by default the checkpoint's.")
  ] = None,
  seed: Annotated[int, Option(min=0, help='Of the run.')] = 0,
  keep: Annotated[
    str,
    Option(help='Images to write: all, or passing (the released thresholds). Writes all scores.'),
  ] = 'all',
  batch_size: Annotated[int, Option(min=1, help='Pairs at a time, on all devices.')] = 8,
  shard: Annotated[str, Option(help='i/n: this worker of n that share the prompts.')] = '0/1',
  dtype: Annotated[
    str | None, Option(help='float32 or bfloat16; by default float32 on a CPU only.')
  ] = None,
  ema: console.Ema = None,
  show_attention: Annotated[
    int, Option(min=0, help='Only draw this many prompts once, with maps of attention to words.')
  ] = 0,
) -> None:
  """Draws pairs of images for pairs of captions, with CLIP's scores of each pair.

  ip2p pairs prompts.jsonl raw --ckpt stable-diffusion-v1-5 --clip clip-vit-large-patch14

  ip2p pairs prompts.jsonl raw --ckpt CKPT --clip CLIP --samples 4 --steps 25 --shard 3/8

  ip2p pairs prompts.jsonl maps --ckpt CKPT --clip CLIP --control auto --show-attention 4

  After a kill, run it again to continue; it ends with the same files. It can also continue with
  more samples or prompts, another batch size or number of workers. `ip2p filter` keeps good pairs.
  """
  from ip2p_jax.data.shard_writing import parse_shard
  from ip2p_jax.pairs.generate import PairGenerator, PairSettings, faults
  from ip2p_jax.pairs.prompts import read_prompts
  from ip2p_jax.pairs.run import draw_all
  from ip2p_jax.parameters import flatten
  from ip2p_jax.pipeline import workdir
  from ip2p_jax.pipeline.clip_scores import Clip
  from ip2p_jax.pipeline.networks import (
    bytes_digest,
    default_dtype,
    networks_of,
    params_of,
    tokenizer_of,
    weights_digest,
  )

  number = parse_shard(shard)
  settings = {
    'samples': samples, 'steps': steps, 'sampler': sampler, 'control': control,
    'threshold': threshold, 'guidance': guidance, 'cross': cross_steps, 'self': self_steps,
    'negative': negative, 'seed': seed, 'keep': keep, 'batch_size': batch_size,
  }  # fmt: skip
  PairSettings(**settings)  # refuses wrong values before loading
  _check_pairs_options(context, control, guidance, show_attention)
  if dtype not in (None, 'float32', 'bfloat16'):
    raise InputError(f'--dtype is {dtype!r}; use float32 or bfloat16.')
  console.cache_compilations()
  checkpoint = workdir.load(ckpt, ema=ema)
  networks = networks_of(checkpoint)
  dtype = dtype or default_dtype()
  size = size or networks.resolution
  drawing, tokenizer = PairSettings(size=size, **settings), tokenizer_of(checkpoint, networks)
  lines = read_prompts(prompts, lambda prompt: faults(prompt, drawing, tokenizer))
  towers = Clip.load(clip)
  params = params_of(checkpoint, networks, dtype)
  generator = PairGenerator(networks, params, tokenizer, towers, drawing, source=str(ckpt))
  if show_attention:
    _show_attention(generator, lines[:show_attention], storage.local_folder(out))
    return
  weights = {'clip': flatten(towers.params)}
  parts = {'weights': 'unet', 'vae': 'vae', 'text_encoder': 'text_encoder'}
  weights |= {name: checkpoint.tensors[part] for name, part in parts.items()}
  identity = {'dtype': dtype} | {name: weights_digest(part) for name, part in weights.items()}
  identity['bytes'] = bytes_digest(*weights.values())
  with console.progress('pair', compiles=True) as progress:
    count = draw_all(generator, lines, out, identity, number, progress or unwatched)
  console.say(f'{out}: {count} pairs; `ip2p filter {out} DST` keeps the good ones')


def _check_pairs_options(context, control, guidance, show_attention):
  """Raises InputError for an option without effect."""
  flags = console.changed_options(context)
  shares, injects = control.startswith('share'), control not in ('none', 'share')
  idle = {}  # reasons by name
  if not shares:
    idle['threshold'] = f'nothing is shared with --control {control}'
  if not injects:
    idle['cross_steps'] = idle['self_steps'] = f'no attention is replaced with --control {control}'
  if guidance == (1, 1):
    idle['negative'] = 'with --guidance 1 1 it has no weight'
  if show_attention:
    reason = '--show-attention draws each prompt once, and keeps no pairs'
    idle |= dict.fromkeys(('samples', 'keep', 'shard'), reason)
  for name, reason in idle.items():
    if name in flags:
      raise InputError(f'{flags[name]} would do nothing: {reason}; leave it out.')


def _show_attention(generator, prompts, out):
  import numpy as np

  from ip2p_jax.pairs.pair_files import attention_sheet

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
      console.save(sheet, out / f'{prompt.index:07d}_{sample.seed}.png', settings)


def filter(
  paths: Annotated[list[Path], typer.Argument(help='Folders of `ip2p pairs`, then a new folder.')],
  preset: Annotated[
    str | None, Option(help='paper or released: sets --image.  [default: paper]')
  ] = None,
  image: Annotated[
    float | None, Option(help='Least similarity of both images.  [default: 0.75, released 0.7]')
  ] = None,
  caption: Annotated[
    float, Option(help='Least similarity of each image and its caption.')
  ] = PAPER.clip_sim_0,
  direction: Annotated[
    float, Option(help='Least similarity of the changes of images and captions.')
  ] = PAPER.clip_sim_dir,
  most: Annotated[int, Option(min=1, help='Most pairs per prompt, the best by direction.')] = MOST,
  drop_duplicates: Annotated[
    bool, Option('--drop-duplicates', help='Keep only the best of pairs that look the same.')
  ] = False,
  shards: Annotated[
    bool, Option('--shards', help='Write packed shards, as `ip2p pack` would.')
  ] = False,
  holdout: Annotated[
    float, Option(min=0, max=0.5, help='With --shards: share of the rows for validation.')
  ] = 0.0,
) -> None:
  """Keeps the good pairs of `ip2p pairs`, ready to pack or to train on.

  ip2p filter raw pairs

  ip2p filter raw-of-worker-0 raw-of-worker-1 shards --shards --preset released

  ip2p filter raw stricter --image 0.8 --direction 0.25

  It draws nothing and does not change the folders, so you can try other thresholds.
  """
  from ip2p_jax.pairs.filter import LABELS, draw_histograms, filter_pairs
  from ip2p_jax.pipeline.scores import Scores

  presets = {None: PAPER, 'paper': PAPER, 'released': RELEASED}
  if preset not in presets:
    raise InputError(f'--preset is {preset!r}; use paper or released.')
  if preset and image is not None:
    raise InputError('--preset and --image both set one threshold; leave out one of them.')
  if len(paths) < 2:
    raise InputError('give the folders of `ip2p pairs`, and then a new one to write.')
  image = presets[preset].clip_sim_image if image is None else image
  thresholds = Scores(caption, caption, direction, image)
  if not all(-1 <= least <= 1 for least in thresholds):
    raise InputError('--image, --caption and --direction are cosines; give numbers from -1 to 1.')
  if holdout and not shards:
    raise InputError('--holdout is only for --shards; add that, or leave --holdout out.')
  *sources, out = paths
  write = functools.partial(_filter_to_shards, holdout=holdout) if shards else filter_pairs
  with console.progress('prompt') as progress:
    result = write(sources, out, thresholds, most, drop_duplicates, progress or unwatched)
  share = lambda count: f'{count} of {result.drawn} ({100 * count / max(result.drawn, 1):.1f}%)'
  for name, least, label in zip(Scores._fields, thresholds, LABELS, strict=True):
    console.say(f'{name} >= {least} ({label}): {share(result.passed[name])}')
  console.say(f'all thresholds: {share(result.passed_all)}')
  if result.broken:
    console.say(f'overflowed when they were drawn: {share(result.broken)}')
  if drop_duplicates:
    console.say(f'duplicates of a better pair: {result.duplicates}')
  if not result.kept:
    verb = 'pack' if shards else 'write'
    raise InputError(f'no pair passes all thresholds, so there is nothing to {verb}; lower them.')
  try:
    draw_histograms(result.scores, thresholds, out / 'histograms.png')
    console.say(f'wrote {out / "histograms.png"}')
  except ImportError:
    console.say('no histograms: install matplotlib to get them')
  console.say(f'{out}: {result.kept} pairs of {result.prompts} prompts, at most {most} each')


def _filter_to_shards(sources, out, *options, holdout):
  """Does `filter_pairs`, and packs its folder of hard links. Completely or not at all."""
  from ip2p_jax.data.pack import pack as pack_images
  from ip2p_jax.data.sources import open_splits
  from ip2p_jax.pairs.filter import filter_pairs

  with storage.new_folder(out) as place:
    pairs, packed = place / 'pairs', place / 'shards'
    result = filter_pairs(sources, pairs, *options)
    if result.kept:
      rows = open_splits(str(pairs), holdout=holdout)
      pack_images(rows, packed, holdout=holdout, workers=0, say=console.say)
      packed.rename(out)
  return result
