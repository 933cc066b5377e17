"""Batches, from sources to devices. Grain shuffles, mixes, and runs the threads and processes.

B batch, R rows of it that this host feeds. The example at place p = step * B + row of a run is a
function of the seed, p and the data. The numbers of hosts, devices and workers do not change it,
nor does resuming. Each epoch of a source is newly shuffled and has every row once.

A batch is a dict of arrays [R, ...], see `examples`, and `index` int32 [R]: the row in the global
batch (in validation, the row in the data set).
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import util
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from ip2p_jax.data import examples
from ip2p_jax.data.examples import Example, Framing, Tokenizer
from ip2p_jax.data.rows import LatentRow, Source
from ip2p_jax.errors import InputError
from ip2p_jax.interrupts import unheard_by_children

Batch = dict[str, np.ndarray]
PART = 32  # rows of one task, so that all workers share the first batch
FEW = 10_000  # rows; below it Grain's shuffle, which keeps no list, takes milliseconds per row
SMALL = 2**16  # bytes; larger arrays go through shared memory


class Feed(NamedTuple):
  """Everything that the examples depend on. Worker processes get it.

  Attributes:
    order: (number of the source, number of its row) by place.
    like: an example of a good row; all others have its shapes.
  """

  sources: tuple[Source, ...]
  order: grain.MapDataset
  seed: int
  framing: Framing
  tokenizer: Tokenizer
  like: Example


def batches(
  sources: Sequence[Source],
  weights: Sequence[float],
  *,
  seed: int,
  batch_size: int,
  rows: np.ndarray,
  start_step: int,
  framing: Framing,
  tokenizer: Tokenizer,
  workers: int,
) -> Generator[Batch, None, None]:
  """Endless batches, from `start_step` on. Close the generator to stop its workers.

  Args:
    sources: all of images, or all of latents of one size.
    weights: how often to draw from each source, relative to the others.
    seed: of order, pairs, instructions, crops and mirroring; 0 or more.
    batch_size: B, over all hosts.
    rows: which rows of the global batch this host feeds, ascending.
    start_step: 0 for a new run; a later start costs nothing.
    tokenizer: texts -> int32 [n, L].
    workers: processes; 0 uses threads of this one.

  A broken row stays in the batch with weight 0, and `error` is its message. Raises InputError if
  the sources cannot be mixed or a setting is impossible; RuntimeError if reading fails in another
  way.
  """
  feed = _feed(sources, weights, seed, framing, tokenizer)
  parts = _parts(rows)
  drawn = functools.partial(_drawn_example, feed)
  make = functools.partial(_part, drawn, batch_size, parts, start_step)
  batches = _join(_stream(make, sys.maxsize, len(parts), workers, feed.like), len(parts))
  return _starting_processes(batches) if workers else batches


def batch_at(
  sources: Sequence[Source],
  weights: Sequence[float],
  *,
  seed: int,
  batch_size: int,
  rows: np.ndarray,
  step: int,
  framing: Framing,
  tokenizer: Tokenizer,
) -> Batch:
  """The batch of one step, as `batches` gives it, without making the batches before it."""
  feed = _feed(sources, weights, seed, framing, tokenizer)
  return _part(functools.partial(_drawn_example, feed), batch_size, [np.asarray(rows)], step, 0)


def validation_batches(
  source: Source,
  *,
  batch_size: int,
  examples: int,
  rows: np.ndarray,
  framing: Framing,
  tokenizer: Tokenizer,
) -> Generator[Batch, None, None]:
  """The first `examples` rows in order, nothing random. Blanks of weight 0 fill the last batch."""
  feed = _feed([source], [1.0], 0, framing, tokenizer)
  parts, count = _parts(rows), min(examples, len(source))
  in_order = functools.partial(_ordered_example, feed, count)
  make = functools.partial(_part, in_order, batch_size, parts, 0)
  steps = -(-count // batch_size)
  return _join(_stream(make, steps * len(parts), len(parts), 0, feed.like), len(parts))


def to_device(
  batches: Generator[Batch, None, None],
  sharding: jax.sharding.Sharding,
  batch_size: int,
  prefetch: int = 2,
  on_error: Callable[[list[str]], None] = lambda errors: None,
) -> Generator[dict[str, jax.Array], None, None]:
  """Global arrays [B, ...] from every host's rows. A thread makes `prefetch` batches ahead.

  Args:
    batches: of this host; closing this generator closes it too.
    sharding: of the first axis.
    batch_size: B, over all hosts.
    prefetch: 1 or more.
    on_error: gets the messages of a batch's broken rows, just before that batch.
  """

  def place() -> tuple[dict[str, jax.Array], list[str]] | None:
    batch = next(batches, None)
    if batch is None:
      return None
    errors = [str(error) for error in batch.pop('error') if error]
    return globally(batch, sharding, batch_size), errors

  pool = ThreadPoolExecutor(1, 'to_device')
  try:
    ahead = deque(pool.submit(place) for _ in range(max(prefetch, 1)))
    while placed := ahead.popleft().result():
      ahead.append(pool.submit(place))
      arrays, errors = placed
      if errors:
        on_error(errors)
      yield arrays
  finally:
    pool.shutdown(cancel_futures=True)  # waits for the batch in work
    batches.close()


def globally(
  batch: Batch, sharding: jax.sharding.Sharding, batch_size: int
) -> dict[str, jax.Array]:
  """Global arrays [B, ...] from this host's rows; `batch` has no 'error'."""
  put = lambda x: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
  return {key: put(value) for key, value in batch.items()}


def order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
  """(number of the source, number of its row) at every place of an endless run.

  Each epoch of a source has a new order. The shares of the sources match the weights within 1 %.
  """
  seeds = np.random.SeedSequence(seed).generate_state(len(lengths))
  datasets = []
  for source, (length, seed_k) in enumerate(zip(lengths, map(int, seeds), strict=True)):
    if length < FEW:
      rows = grain.MapDataset.range(sys.maxsize).map(functools.partial(_permuted, length, seed_k))
    else:
      rows = grain.MapDataset.range(length).shuffle(seed=seed_k).repeat()
    datasets.append(rows.map(functools.partial(_pair, source)))
  return grain.MapDataset.mix(datasets, list(weights))


def _permuted(length, seed, place) -> int:
  epoch, i = divmod(place, length)
  return _permutation(length, seed, epoch)[i]


@functools.lru_cache(maxsize=64)
def _permutation(length, seed, epoch) -> np.ndarray:
  return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)


def _pair(source, row):
  return source, int(row)


def _feed(sources, weights, seed, framing, tokenizer) -> Feed:
  framing.check()
  if seed < 0:
    raise InputError(f'seed is {seed}; it must be 0 or more.')
  for k, (source, weight) in enumerate(zip(sources, weights, strict=True), 1):
    if not 0 < weight < float('inf'):
      raise InputError(f'data.path: data set {k} has weight {weight}; it must be more than 0.')
    if not len(source):
      raise InputError(f'data.path: data set {k} has no examples in this split.')
  likes = [_first_good(source, framing, tokenizer) for source in sources]
  for k, like in enumerate(likes[1:], 2):
    if _shapes(like) != _shapes(likes[0]):
      raise InputError(
        f'data.path: data set {k} gives {_shapes(like)} and data set 1 {_shapes(likes[0])}; all'
        ' must be images, or all latents of one resolution.'
      )
  places = order([len(source) for source in sources], weights, seed)
  return Feed(tuple(sources), places, seed, framing, tokenizer, likes[0])


def _first_good(source, framing, tokenizer) -> Example:
  first = None
  for i in range(min(len(source), 100)):
    try:
      return _example(source[i], None, framing, tokenizer)
    except InputError as error:
      first = first or error
  raise InputError(f'the first rows of a data set are all broken: {first}')


def _example(row, rng, framing, tokenizer) -> Example:
  if isinstance(row, LatentRow):
    return examples.latent_example(row, rng, framing)
  return examples.example(row, rng, framing, tokenizer)


def _shapes(example) -> str:
  """The shapes as text, to compare and for messages."""
  shapes = sorted((key, value.shape) for key, value in example.items() if key != 'error')
  return ', '.join(f'{key} {list(shape)}' for key, shape in shapes if shape)


def _drawn_example(feed, place) -> Example:
  """The example at a place of the run."""
  source, row = feed.order[place]
  rng = np.random.Generator(np.random.Philox(key=[feed.seed, place]))
  return _read(feed, feed.sources[source], row, rng)


def _ordered_example(feed, count, place) -> Example:
  """The example at a place of the validation; a blank from place `count` on."""
  example = examples.blank(feed.like, '')
  if place < count:
    example = _read(feed, feed.sources[0], place, None)
  return example | {'index': np.int32(place)}


def _read(feed, source, i, rng) -> Example:
  try:
    row = source[i]
    example = _example(row, rng, feed.framing, feed.tokenizer)
    if _shapes(example) != _shapes(feed.like):
      raise InputError(f'{row.name} has {_shapes(example)}; others have {_shapes(feed.like)}.')
    return example
  except InputError as error:
    return examples.blank(feed.like, str(error))


def _parts(rows) -> list[np.ndarray]:
  rows = np.asarray(rows)
  return [rows[i : i + PART] for i in range(0, len(rows), PART)]


def _part(example_at, batch_size, parts, start_step, i) -> Batch:
  """The i-th part of the stream, stacked."""
  step, part = divmod(i, len(parts))
  try:
    rows = [
      {'index': np.int32(row)} | example_at((start_step + step) * batch_size + int(row))
      for row in parts[part]
    ]
  except Exception as error:
    # As text, since an exception that cannot be pickled would never arrive.
    kind = type(error).__name__
    raise RuntimeError(
      f'reading examples of step {start_step + step} failed with {kind}: {error}\n'
      f'{traceback.format_exc()}'
    ) from None
  return {key: np.stack([np.asarray(example[key]) for example in rows]) for key in rows[0]}


def _stream(make, count, parts, workers, like) -> grain.IterDataset:
  """`make(i)` for i = 0, 1, ..., count - 1, in order, about one batch (of `parts`) ahead."""
  dataset = grain.MapDataset.range(count).map(make)
  ahead = -(-parts // max(workers, 1))
  part_bytes = PART * sum(value.nbytes for key, value in like.items() if key != 'error')
  if not workers or not _has_shared_memory(part_bytes * workers * (ahead + 2)):
    threads = workers or min(os.cpu_count() or 1, 16)
    return dataset.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=threads + parts))
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain passes its flags to processes; only absl parses them
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.experimental.DatasetOptions(min_shm_size=SMALL)
  dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
  return dataset.mp_prefetch(grain.MultiprocessingOptions(workers, ahead), _start_worker)


def _join(stream, parts) -> Generator[Batch, None, None]:
  """Batches of `parts` elements of the stream each."""
  pieces = iter(stream)
  try:
    while batch := _concatenate(list(itertools.islice(pieces, parts))):
      yield batch
  finally:
    pieces.close()


def _starting_processes(batches) -> Generator[Batch, None, None]:
  """The same batches; Ctrl-C and a job manager's SIGTERM reach no process that Grain starts."""
  with contextlib.closing(batches):
    while True:
      with unheard_by_children(signal.SIGINT, signal.SIGTERM):
        batch = next(batches)
      yield batch


def _concatenate(pieces) -> Batch:
  """Copies, to free the shared memory at once."""
  keys = pieces[0] if pieces else ()
  return {key: np.concatenate([np.asarray(piece[key]) for piece in pieces]) for key in keys}


def _has_shared_memory(size) -> bool:
  """Whether processes have room to pass batches; containers often have only 64 MB."""
  try:
    free = shutil.disk_usage('/dev/shm').free
  except OSError:
    return True  # this system keeps it elsewhere
  if free < 2 * size:  # twice, since Grain frees it late; a process that runs out is killed
    warnings.warn(
      f'/dev/shm has {free >> 20} MB free of the {2 * size >> 20} MB that data.workers need, so'
      ' threads read the images, which may be slower; give the container more.',
      stacklevel=2,
    )
  return free >= 2 * size


def _start_worker(_index, _count):
  # Ctrl-C and a job manager's SIGTERM reach the whole group, but the parent decides.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  jax.config.update('jax_platforms', 'cpu')  # Grain imports jax; the parent owns the devices
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  warnings.filterwarnings('ignore', module=r'PIL\.')
  threading.Thread(target=_die_with_parent, daemon=True).start()
  # Exit once queues are flushed (-5): a normal exit of Python with jax takes a second.
  util.Finalize(None, os._exit, (1,), exitpriority=-6)


def _die_with_parent():
  multiprocessing.parent_process().join()  # returns when the parent ends, even if it was killed
  os._exit(1)
