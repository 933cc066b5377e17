"""Draws all pairs of a file of prompts, alone or with other workers, into files of `pair_files`.

A run that is killed and started again with the same command ends with the same bytes. A run that
continues with other batches, more samples, more prompts or another number of workers ends like a
new run of that command, except for rounding in batches of other samples.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import warnings
from collections.abc import Sequence

import numpy as np

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.pairs import pair_files
from ip2p_jax.pairs.generate import PairGenerator
from ip2p_jax.pairs.prompts import Prompt
from ip2p_jax.pipeline.scores import Scores
from ip2p_jax.progress import Progress, unwatched

THREADS = 8  # write JPEGs


def draw_all(
  generator: PairGenerator,
  prompts: Sequence[Prompt],
  out: str,
  identity: dict[str, str],
  shard: pair_files.Shard = (0, 1),
  progress: Progress = unwatched,
) -> int:
  """Draws all samples of this worker's prompts, and continues an earlier run.

  `identity` identifies the checkpoints, so that a run cannot continue with others. `shard` (i, n)
  is worker i of n, which draws every n-th prompt. Returns the number of this worker's samples.
  Samples that overflowed are recorded, with a warning.

  Raises InputError before drawing if a prompt cannot be drawn, or the folder has another run; and
  in the end if no sample is finite.
  """
  generator.check(prompts)
  drawing, folder = generator.drawing, storage.folder(out)
  lines = '\n'.join(f'{prompt.index} {prompt.line}' for prompt in prompts)
  digest = hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()
  settings = dataclasses.asdict(drawing) | identity | {'prompts': digest}
  mine = prompts[shard[0] :: shard[1]]
  total, size = len(mine) * drawing.samples, drawing.batch_size
  with (
    pair_files.working(folder, settings, prompts, shard),
    concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
  ):
    rest = pair_files.remaining(folder, mine, drawing.samples, size, shard)
    done, broken, rows = total - rest.count(), rest.broken, rest.rows()
    batches = itertools.chain([rest.torn], iter(lambda: list(itertools.islice(rows, size)), []))
    waiting = None  # the device draws one batch while the previous one is written
    for batch in itertools.chain(filter(None, batches), [None]):
      drawn = None
      if batch is not None:
        samples = [drawing.sample(prompt.index, number) for prompt, number in batch]
        drawn = batch, samples, generator.draw([prompt for prompt, _ in batch], samples)
      if waiting is not None:
        batch, samples, (images, scores, _) = waiting
        new, not_finite = pair_files.write_batch(
          folder, shard, size, batch, samples, np.asarray(images),
          Scores(*map(np.asarray, scores)), drawing.keep, pool,
        )  # fmt: skip
        done, broken = done + new, broken + not_finite
        progress(done, total)
      waiting = drawn
    pair_files.end(folder, shard)
  if broken:
    text = (
      f'{broken} of {total} pairs overflowed, and have no images; try bfloat16, float32 or less'
      ' guidance, with another folder'
    )
    if broken == total:
      raise InputError(f'{text}.')
    warnings.warn(text, stacklevel=2)
  return total
