"""`ip2p pairs` and `ip2p filter`."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax import storage
from ip2p_jax.cli import console
from ip2p_jax.errors import InputError
from ip2p_jax.pairs.thresholds import MOST, PAPER, RELEASED
from ip2p_jax.progress import unwatched


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
  ema: console.Ema = None,
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
  PairSettings(**settings)  # refuses mistakes before loading
  _check_pairs_options(context, control, guidance, show_attention)
  if dtype not in (None, 'float32', 'bfloat16'):
    raise InputError(f'--dtype is {dtype!r}; use float32 or bfloat16.')
  console.cache_compilations()
  checkpoint = workdir.load(ckpt, ema=ema)
  networks = networks_of(checkpoint)
  dtype = dtype or default_dtype()
  size = size or networks.resolution
  drawing, tokenizer = PairSettings(size=size, **settings), tokenizer_of(checkpoint, networks)
  read = read_prompts(prompts, lambda prompt: faults(prompt, drawing, tokenizer))
  towers = Clip.load(clip)
  params = params_of(checkpoint, networks, dtype)
  generator = PairGenerator(networks, params, tokenizer, towers, drawing)
  if show_attention:
    _show_attention(generator, read[:show_attention], storage.local_folder(out))
    return
  weights = {'clip': flatten(towers.params)}
  parts = {'weights': 'unet', 'vae': 'vae', 'text_encoder': 'text_encoder'}
  weights |= {name: checkpoint.tensors[part] for name, part in parts.items()}
  identity = {'dtype': dtype} | {name: weights_digest(part) for name, part in weights.items()}
  identity['bytes'] = bytes_digest(*weights.values())
  with console.progress('pair', compiles=True) as progress:
    count = draw_all(generator, read, out, identity, number, progress or unwatched)
  console.say(f'{out}: {count} pairs; `ip2p filter {out} DST` keeps the good ones')


def _check_pairs_options(context, control, guidance, show_attention):
  """InputError for an option that was given and would do nothing."""
  given = console.given_options(context)
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
  from ip2p_jax.pairs.filter import LABELS, draw_histograms, filter_pairs
  from ip2p_jax.pipeline.scores import Scores

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
  with console.progress('prompt') as progress:
    found = write(sources, out, thresholds, most, drop_duplicates, progress or unwatched)
  of_all = lambda count: f'{count} of {found.drawn} ({100 * count / max(found.drawn, 1):.1f}%)'
  for name, least, label in zip(Scores._fields, thresholds, LABELS, strict=True):
    console.say(f'{name} >= {least} ({label}): {of_all(found.passed[name])}')
  console.say(f'all of these: {of_all(found.passed_all)}')
  if found.broken:
    console.say(f'overflowed when they were drawn: {of_all(found.broken)}')
  if drop_duplicates:
    console.say(f'look like a better one: {found.duplicates}')
  if not found.kept:
    what = 'pack' if shards else 'write'
    raise InputError(f'no pair passes all thresholds, so there is nothing to {what}; lower them.')
  try:
    draw_histograms(found.scores, thresholds, out / 'histograms.png')
    console.say(f'wrote {out / "histograms.png"}')
  except ImportError:
    console.say('no histograms: install matplotlib to have them')
  console.say(f'{out}: {found.kept} pairs of {found.prompts} prompts, at most {most} each')


def _filter_to_shards(sources, out, *how, holdout):
  """`filter_pairs`, whose folder (of hard links) is packed; whole or not at all."""
  from ip2p_jax.data.pack import pack as pack_images
  from ip2p_jax.data.sources import open_splits
  from ip2p_jax.pairs.filter import filter_pairs

  with storage.new_folder(out) as place:
    pairs, packed = place / 'pairs', place / 'shards'
    found = filter_pairs(sources, pairs, *how)
    if found.kept:
      rows = open_splits(str(pairs), holdout=holdout)
      pack_images(rows, packed, holdout=holdout, workers=0, say=console.say)
      packed.rename(out)
  return found
