"""`ip2p pack`: writes any data set as shards of encoded images, in parallel and resumable."""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ip2p_jax import images
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
from ip2p_jax.data.rows import Row
from ip2p_jax.data.shard_writing import Summary
from ip2p_jax.errors import InputError
from ip2p_jax.interrupts import unheard_by_children
from ip2p_jax.progress import Progress, unwatched

Say = Callable[[str], None]


class Form(NamedTuple):
  """How images are stored; see `pack`."""

  size: int | None
  quality: int | None
  has_input: bool


def pack(
  sources: Sources,
  dst: str | os.PathLike,
  *,
  size: int | None = None,
  quality: int | None = 95,
  holdout: float = 0.0,
  shard_bytes: int = SHARD_BYTES,
  shard: str = '0/1',
  workers: int = 8,
  max_corrupt: int = 0,
  say: Say = print,
  progress: Progress = unwatched,
) -> Summary:
  """Writes shards of encoded images. After a kill, the same call continues where it stopped.

  Every image is decoded once, so that all packed images can be read. Kills and the numbers of
  processes and machines do not change a byte of the files.

  Args:
    sources: rows by split. Worker processes get them pickled.
    dst: a new folder, or one where the same pack was begun.
    size: resolution of training, in pixels. An image whose short side is over 9/8 of it (288 for
      256, as the paper's augmentation needs) is resized to that with Lanczos, upright,
      transparency on white. Smaller images keep their bytes, and with None all do.
    quality: JPEG quality of resized images, without chroma subsampling; None is lossless PNG, about
      three times as large (95 is 41 to 45 dB from it on photos).
    holdout: share of the rows, the last ones, that become 'validation' if there is none. Rows that
      share an image stay together, see `holdout.hold_out`.
    shard_bytes: approximate size of a file, larger if there would be over 512 files; used only by
      the first call.
    shard: 'i/n', this machine of n that share the folder; the last to end completes the data set.
    workers: processes; 0 works in this one.
    max_corrupt: number of broken rows to leave out; the data set lists them. More stop the pack.
    say: gets one line per broken row, and one on the work to do.
    progress: gets (rows done, all rows) of this machine.

  Raises:
    InputError: too many rows are broken, the folder holds something else, an argument is
      impossible, or the disk failed.
  """
  _check(size, quality, workers, max_corrupt)
  sources, held = hold_out(sources, holdout, dst, say, progress)
  samples = sample(sources)
  form = Form(size, quality, has_input(samples))
  size_of = lambda row: sum(len(image or b'') for pair in packed(row, form).pairs for image in pair)
  plan = make_plan('images', form._asdict(), sources, samples, size_of, shard_bytes, held)
  with shard_writing.working(dst, plan, shard, max_corrupt) as job:
    with _results(job, sources, form, workers) as results:
      shard_writing.work(job, results, say, progress)
    return shard_writing.finish(job)


def packed(row: Row, form: Form) -> Row:
  """The row as it is stored. Raises InputError if the loader would refuse it."""
  check_row(row, form.has_input)
  if form.size is not None:
    shrink = lambda image: image and smaller(image, form.size, form.quality)
    row = row._replace(pairs=tuple(pair._make(map(shrink, pair)) for pair in row.pairs))
  task = 'edit' if form.has_input else 'text_to_image'
  framing = examples.Framing(images.MIN_SIDE, task)
  no_tokens = lambda texts: np.zeros((len(texts), 0), np.int32)
  for pair in row.pairs:
    examples.example(row._replace(pairs=(pair,)), None, framing, no_tokens)
  return row


def smaller(encoded: bytes, size: int, quality: int | None) -> bytes:
  """Shrinks an image file to a short side of 9/8 size. Keeps a smaller or a broken file."""
  short = size * 9 // 8
  try:
    with warnings.catch_warnings(action='ignore'):
      image = Image.open(io.BytesIO(encoded), 'r', images.READ_FORMATS)
      least = min(image.size)
      if least <= short or image.width * image.height > images.MAX_PIXELS:
        return encoded
      image = images.plain(image)
  except Exception:  # the loader's own reader reports it better
    return encoded
  width, height = ((2 * side * short + least) // (2 * least) for side in image.size)
  image, file = Image.fromarray(images.to_array(image, (width, height))), io.BytesIO()
  if quality is None:
    image.save(file, 'PNG')
  else:
    image.save(file, 'JPEG', quality=quality, subsampling='4:4:4')
  return file.getvalue()


def _check(size, quality, workers, max_corrupt):
  problem = None
  if size is not None and size < images.MIN_SIDE:
    problem = f'size is {size}; use at least {images.MIN_SIDE}'
  if quality is not None and not 1 <= quality <= 100:
    problem = f'quality is {quality}; use 1 to 100, or none for lossless'
  if min(workers, max_corrupt) < 0:
    problem = f'workers is {workers} and max_corrupt {max_corrupt}; neither can be negative'
  if problem:
    raise InputError(f'{problem}.')


@contextlib.contextmanager
def _results(job, sources, form, workers) -> Iterator[Iterator[tuple[Shard, list[str]]]]:
  """Gives an iterator of (finished file, its broken rows). Stops the workers at the end."""
  if not (workers and job.todo):
    task = Task(job.folder, job.plan, sources, form, threading.Event())
    yield ((shard, task.write(shard)) for shard in job.todo)
    return
  context = multiprocessing.get_context('spawn')  # JAX and other threads do not survive a fork
  task = Task(job.folder, job.plan, sources, form, context.Event())
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(job.todo)), context, _start_worker, (task,)
  )
  try:
    with unheard_by_children(signal.SIGINT):
      shard_of = {pool.submit(_work, shard): shard for shard in job.todo}
    yield ((shard_of[done], done.result()) for done in concurrent.futures.as_completed(shard_of))
  except concurrent.futures.process.BrokenProcessPool:
    raise InputError(
      f'{job.folder}: a worker process was killed, perhaps for lack of memory; use fewer workers,'
      ' and run this again to continue.'
    ) from None
  finally:
    task.stop.set()
    pool.shutdown(cancel_futures=True)


class Task(NamedTuple):
  """Everything that a worker process needs to write any shard."""

  folder: os.PathLike
  plan: dict
  sources: Sources
  form: Form
  stop: Any  # an Event, of threading or multiprocessing

  def write(self, shard: Shard) -> list[str]:
    """Writes one file. Returns one line per broken row."""
    return shard_writing.write_shard(self.folder, self.plan, shard, self._examples(shard))

  def _examples(self, shard):
    for i in range(shard.start, shard.stop):
      if self.stop.is_set():
        raise InterruptedError('another worker failed')
      try:
        row = packed(self.sources[shard.split][i], self.form)
        yield shards.image_example(row, self.form.has_input)
      except InputError as error:
        yield error


_task: Task | None = None  # of a worker process


def _start_worker(task):
  global _task
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers, without 8 tracebacks
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _task = task


def _work(shard):
  return _task.write(shard)


def _end_with_parent():
  multiprocessing.parent_process().join()
  os._exit(1)
