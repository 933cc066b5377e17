"""Precomputes latents: the VAE encodes every image once, so that training skips the encoder.

Without random crops an image has two versions: as it is, and mirrored. The encoder's mean and log
variance are stored for both, so training from latents draws from the same distribution as training
from images.

B images of one call of the encoder, R resolution, h w latent sides, P pairs of a row.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ip2p_jax.data import examples, shard_writing, shards
from ip2p_jax.data.pack_plan import (
  SHARD_BYTES,
  Shard,
  Sources,
  check_row,
  has_input,
  hold_out,
  make_plan,
  sample,
)
from ip2p_jax.data.rows import LatentRow, Row
from ip2p_jax.data.shard_writing import Summary
from ip2p_jax.errors import InputError, check_choice, check_multiple
from ip2p_jax.models.layers import Params
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.progress import Progress, unwatched
from ip2p_jax.xla_alarms import quietly

Moments = Callable[[np.ndarray], tuple[Array, Array]]


class Prepared(NamedTuple):
  """A row, ready for the encoder.

  Attributes:
    row: the row itself.
    token_ids: int32 [I, L].
    images: uint8 [N, R, R, 3]: for each pair the input image, if any, then the edited image.
  """

  row: Row
  token_ids: np.ndarray
  images: np.ndarray


def pack_latents(
  sources: Sources,
  dst: str | os.PathLike,
  *,
  networks: Networks,
  params: Params,
  tokenizer: ClipTokenizer,
  resolution: int,
  fingerprint: str,
  dtype: str = 'float32',
  resize: str = 'crop',
  batch_size: int = 32,
  holdout: float = 0.0,
  shard_bytes: int = SHARD_BYTES,
  shard: str = '0/1',
  workers: int = 8,
  max_corrupt: int = 0,
  say: Callable[[str], None] = print,
  progress: Progress = unwatched,
) -> Summary:
  """Writes shards of latents. After a kill, the same call continues where it stopped.

  Args:
    sources: rows of images by split; packed shards are the fastest.
    dst: a new folder, or one where the same pack was begun.
    networks, params: the checkpoint's networks, and its VAE's parameters.
    tokenizer: the checkpoint's.
    resolution: R, side of the square images; training can use the latents at this size only.
    fingerprint: of the checkpoint; stored in the data set, so that training can compare.
    dtype: of the encoder's arithmetic, 'float32' or 'bfloat16'; latents are stored as float16.
    resize: 'crop' or 'squash', as in `examples.Framing`.
    batch_size: images per call of the encoder, which encodes each also mirrored, on all devices of
      this process; rounded up to a multiple of their number.
    holdout, shard_bytes, shard, max_corrupt, say, progress: as in `pack.pack`.
    workers: threads that decode images.

  Raises:
    InputError: as `pack.pack`; and if the encoder gives values that are not finite.
  """
  framing = examples.Framing(resolution, resize=resize)
  _check(framing, networks, dtype, batch_size, workers)
  sources, held = hold_out(sources, holdout, dst, say, progress)
  samples = sample(sources)
  framing = framing._replace(task='edit' if has_input(samples) else 'text_to_image')
  settings = _settings(framing, networks, dtype, fingerprint, tokenizer)
  side_bytes = math.prod(settings['latent_shape']) * np.float16().nbytes
  arrays = 3 if settings['has_input'] else 2
  size_of = lambda row: len(row.pairs) * arrays * 2 * side_bytes
  plan = make_plan('latents', settings, sources, samples, size_of, shard_bytes, held)
  encode, batch_size = encoder(networks, params, dtype, batch_size)
  prepare_row = functools.partial(prepare, framing=framing, tokenizer=tokenizer)
  with (
    shard_writing.working(dst, plan, shard, max_corrupt) as job,
    concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as threads,
  ):
    places = ((sources[s.split], i) for s in job.todo for i in range(s.start, s.stop))
    rows = _ahead(prepare_row, places, threads, batch_size)
    results = ((s, _write(job, s, rows, encode, batch_size)) for s in job.todo)
    shard_writing.work(job, results, say, progress)
    return shard_writing.finish(job)


def encoder(networks: Networks, params: Params, dtype: str, batch_size: int) -> tuple[Moments, int]:
  """The encoder on all devices of this process, and the batch size that fits them.

  The encoder takes uint8 [B, R, R, 3] and returns what `moments` returns.
  """
  mesh = Mesh(np.array(jax.local_devices()), ('batch',), axis_types=(AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('batch'))
  cast = lambda leaf: jax.device_put(np.asarray(leaf).astype(jnp.dtype(dtype)), everywhere)
  params = jax.tree.map(cast, params)
  encode = lambda images: quietly(moments, networks.vae_def, params, jax.device_put(images, split))
  return encode, -(-batch_size // mesh.size) * mesh.size


@functools.partial(jax.jit, static_argnums=0)
def moments(vae_def: nnx.GraphDef, params: Params, images: Array) -> tuple[Array, Array]:
  """Mean and log variance of images uint8 [B, R, R, 3], as they are and mirrored.

  Both are float16 [B, 2, h, w, latent_channels], of the unscaled posterior. Mirroring comes before
  encoding, since the two do not commute.
  """
  both = jnp.stack([images, images[:, :, ::-1]], 1)  # [B, 2, R, R, 3]
  posterior = parts.encode(vae_def, params, both.reshape(-1, *images.shape[1:]))
  fold = lambda x: x.reshape(*both.shape[:2], *x.shape[1:]).astype(jnp.float16)
  return fold(posterior.mean), fold(posterior.log_variance)


def prepare(place, framing: examples.Framing, tokenizer: ClipTokenizer) -> Prepared | InputError:
  """A row's images as training makes them, but not mirrored; or the error of a broken row."""
  source, i = place
  try:
    row = source[i]
    check_row(row, framing.task == 'edit')
    images = []
    for pair in row.pairs:
      example = examples.example(row._replace(pairs=(pair,)), None, framing, tokenizer)
      images += [example[key] for key in ('input_image', 'edited_image') if key in example]
    return Prepared(row, tokenizer(row.instructions), np.stack(images))
  except InputError as error:
    return error


def encoded(
  rows: Iterable[Prepared | InputError], encode: Moments, batch_size: int
) -> Iterator[LatentRow | InputError]:
  """The rows' latents, in order. Computes one group of batches while it yields the previous one."""
  previous = []
  for group in _groups(rows, batch_size):
    images = [row.images for row in group if isinstance(row, Prepared)]
    batches = []
    if images:
      images = np.concatenate(images)
      images = np.pad(images, ((0, -len(images) % batch_size), (0, 0), (0, 0), (0, 0)))
      batches = [encode(part) for part in np.split(images, len(images) // batch_size)]
    yield from _latent_rows(*previous) if previous else ()
    previous = group, batches
  yield from _latent_rows(*previous) if previous else ()


def _check(framing, networks, dtype, batch_size, workers):
  framing.check()
  factor = networks.vae_config.factor
  check_multiple('resolution', framing.resolution, factor)
  check_choice('dtype', dtype, ('float32', 'bfloat16'))
  if batch_size < 1 or workers < 0:
    raise InputError(f'batch_size is {batch_size} and workers {workers}; use 1 or more.')


def _settings(framing, networks, dtype, fingerprint, tokenizer) -> dict:
  side = framing.resolution // networks.vae_config.factor
  return {
    'has_input': framing.task == 'edit',
    'resolution': framing.resolution,
    'resize': framing.resize,
    'dtype': dtype,
    'fingerprint': fingerprint,
    'latent_shape': [side, side, networks.vae_config.latent_channels],
    'tokens': tokenizer.length,
  }


def _ahead(function, items, threads, number):
  """`map` with threads that work up to `number` items ahead."""
  waiting = collections.deque()
  for item in items:
    waiting.append(threads.submit(function, item))
    if len(waiting) > number:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


def _write(job, shard: Shard, rows, encode, batch_size) -> list[str]:
  rows = encoded(itertools.islice(rows, shard.stop - shard.start), encode, batch_size)
  as_examples = (row if isinstance(row, InputError) else shards.latent_example(row) for row in rows)
  return shard_writing.write_shard(job.folder, job.plan, shard, as_examples)


def _groups(rows, batch_size):
  """Groups of rows whose images fit into one batch; a larger row is a group of its own."""
  group, number = [], 0
  for row in rows:
    row_images = len(row.images) if isinstance(row, Prepared) else 0
    if group and number + row_images > batch_size:
      yield group
      group, number = [], 0
    group.append(row)
    number += row_images
  if group:
    yield group


def _latent_rows(group, batches):
  moments = [np.concatenate([np.asarray(batch[k]) for batch in batches]) for k in (0, 1) if batches]
  start = 0
  for prepared in group:
    if isinstance(prepared, InputError):
      yield prepared
      continue
    row, number = prepared.row, len(prepared.images)
    mean, log_variance = (values[start : start + number] for values in moments)
    start += number
    if not (np.isfinite(mean).all() and np.isfinite(log_variance).all()):
      raise InputError(f'{row.name}: the VAE gives values that are not finite; try dtype float32.')
    step = number // len(row.pairs)  # 2 for edits
    yield LatentRow(
      row.name,
      prepared.token_ids,
      mean[::2] if step == 2 else None,
      mean[step - 1 :: step],
      log_variance[step - 1 :: step],
      row.may_flip,
    )
