"""`ip2p check` and `ip2p pack`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from ip2p_jax.cli import console
from ip2p_jax.errors import InputError
from ip2p_jax.progress import unwatched


def check(
  path: Annotated[str, typer.Argument(help='A data set, a checkpoint, or the workdir of a run.')],
  columns: Annotated[
    str, Option(help='Unusual column names: "input=before,edited=after,instruction=text".')
  ] = '',
  task: Annotated[str, Option(help='edit, or text_to_image.')] = 'edit',
  split: Annotated[str | None, Option(help='train, validation or test; by default all.')] = None,
  limit: Annotated[int | None, Option(min=1, help='Rows of each split to check.')] = None,
) -> None:
  """Checks every row of a data set, or every tensor of a checkpoint, and reports broken ones.

  ip2p check my-pairs

  ip2p check instruct-pix2pix.safetensors

  Exit status 2 if anything is broken.
  """
  from ip2p_jax.data.check import check as check_data_set
  from ip2p_jax.editing.export import check_checkpoint
  from ip2p_jax.pipeline import workdir

  is_checkpoint = workdir.is_workdir(path) or Path(path, 'unet').is_dir()
  if is_checkpoint or Path(path).suffix in ('.safetensors', '.ckpt'):
    options = {'--columns': columns, '--task': task != 'edit', '--split': split, '--limit': limit}
    if flags := [flag for flag, value in options.items() if value]:
      raise InputError(f'{path}: is a checkpoint, and {flags[0]} is for data sets; leave it out.')
    check_checkpoint(workdir.load(path))
    console.say(f'{path}: a checkpoint; every tensor fits its architecture')
    return
  with console.progress('row') as progress:
    summary = check_data_set(path, columns, task, split, console.say, progress or unwatched, limit)
  splits = ', '.join(f'{count} {name}' for name, count in summary.splits.items() if count)
  doubts = ', '.join(f'{count} {kind}' for kind, count in summary.warnings.items()) or 'none'
  console.say(f'{path}: {splits} rows, {summary.pairs} pairs; warnings: {doubts}')
  if summary.broken:
    raise InputError(f'{path}: {summary.broken} of {summary.rows} rows are broken, see above.')
  if summary.edits_nothing:
    raise InputError(
      f'{path}: in {summary.warnings["unchanged"]} of {summary.pairs} pairs both images are the'
      ' same, so there is no edit to learn; name the columns of input and edited by --columns.'
    )
  console.say('nothing is broken')


def pack(
  src: Annotated[str, typer.Argument(help='Any data set; or packed shards, to make latents from.')],
  dst: Annotated[Path, typer.Argument(help='A new folder, or one to continue in.')],
  size: Annotated[
    int | None,
    Option(
      min=0,
      help='Resolution of training, in pixels; 0 keeps files as they are.  [default: 256, or that'
      ' of packed shards]',
    ),
  ] = None,
  latents: Annotated[
    bool, Option('--latents', help='Store latents, the VAE encodings of the images; needs --ckpt.')
  ] = False,
  ckpt: Annotated[
    Path | None, Option(help='With --latents: the checkpoint that training will start from.')
  ] = None,
  holdout: Annotated[
    float | None,
    Option(
      min=0,
      max=0.5,
      help='Share of the rows, the last ones, for validation; rows that share an image stay'
      " together.  [default: the data set's splits; for the original's folders 90, 5 and 5 %]",
    ),
  ] = None,
  columns: Annotated[
    str, Option(help='Unusual column names: "input=before,edited=after,instruction=text".')
  ] = '',
  task: Annotated[str, Option(help='edit, or text_to_image.')] = 'edit',
  resize: Annotated[
    str | None,
    Option(help='With --latents: crop, or squash as in the original.  [default: crop]'),
  ] = None,
  dtype: Annotated[
    str | None,
    Option(help='With --latents: float32 or bfloat16, for the VAE.  [default: float32]'),
  ] = None,
  batch_size: Annotated[
    int | None, Option(min=1, help='With --latents: images at a time.  [default: 32]')
  ] = None,
  workers: Annotated[int, Option(min=0, help='Processes (threads, for latents).')] = 8,
  shard: Annotated[str, Option(help='i/n: this machine of n that share the work.')] = '0/1',
  max_corrupt: Annotated[int, Option(min=0, help='Broken rows to leave out before stopping.')] = 0,
) -> None:
  """Packs a data set into shards that train fast, or into latents that train twice as fast.

  ip2p pack my-pairs my-shards --holdout 0.05

  ip2p pack clip-filtered-dataset latents --latents --ckpt stable-diffusion-v1-5

  SRC: the original's folders, a folder with metadata.jsonl or metadata.csv, Parquet files, or local
  copies of the data sets on the Hugging Face hub. After a kill, run it again to continue.
  """
  from ip2p_jax.data.pack import pack as pack_images
  from ip2p_jax.data.pack_plan import pack_size
  from ip2p_jax.data.sources import open_splits

  options = {'--ckpt': ckpt, '--resize': resize, '--dtype': dtype, '--batch-size': batch_size}
  defaults = (None, 'crop', 'float32', 32)
  flags = [flag for flag, value in options.items() if value not in defaults]
  if flags and not latents:
    raise InputError(f'{flags[0]} is only for --latents; add that, or leave {flags[0]} out.')
  console.cache_compilations()
  opened = open_splits(src, columns, task, holdout)
  size = pack_size(src, size, latents)
  common = {
    'holdout': holdout or 0.0, 'shard': shard, 'workers': workers, 'max_corrupt': max_corrupt,
  }  # fmt: skip
  with console.progress('row', compiles=latents) as progress:
    common |= {'say': console.say, 'progress': progress or unwatched}
    if latents:
      own = {'resize': resize, 'dtype': dtype, 'batch_size': batch_size}
      own = {name: value for name, value in own.items() if value is not None}
      summary = _pack_latents(opened, dst, ckpt, size, common | own)
    else:
      summary = pack_images(opened, dst, size=size or None, **common)
  rows = ', '.join(f'{count} {split}' for split, count in summary.rows.items() if count)
  console.say(f'{dst}: {rows} rows, {len(summary.skipped)} left out')
  if not summary.is_complete:
    console.say(
      'other shards are still missing; the data set is complete when all machines are done'
    )


def _pack_latents(opened, dst, ckpt, size, options):
  from ip2p_jax.data.latents import pack_latents
  from ip2p_jax.pipeline import workdir
  from ip2p_jax.pipeline.networks import fingerprint, networks_of, tokenizer_of
  from ip2p_jax.weights import to_params

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
