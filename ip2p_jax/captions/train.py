"""Fine-tuning a language model on triplets: the paper's first stage.

The model reads the caption of each triplet and learns the rest: only the completion's tokens are in
the loss. Triplets are few, so all are tokenized once, to one length, and stay in memory.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ip2p_jax import parameters, sharding
from ip2p_jax.captions import triplets
from ip2p_jax.captions.generate import tokenizer_of
from ip2p_jax.captions.step import Recipe, language_step, validation_loss
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.captions.workdir import load_base, read_parameters, save_base, shapes_of
from ip2p_jax.config import LanguageConfig
from ip2p_jax.config_check import check_language
from ip2p_jax.data import loader
from ip2p_jax.data.holdout import groups
from ip2p_jax.errors import InputError
from ip2p_jax.training import flops, run
from ip2p_jax.training.run import Kind, Run, Task
from ip2p_jax.weights.language_folder import LanguageCheckpoint, read_language

ROUND = 32  # lengths are multiples of it, so that few programs are compiled for all data sets

TokenRows = dict[str, np.ndarray]  # a batch of `language_step`, or a whole data set like one


def train_language(config: LanguageConfig, workdir: str) -> int:
  """Trains until `config.steps`, or until a signal; a second call continues from the checkpoint.

  Returns the exit status: 0 when done, 143 when stopped by a signal, after writing a checkpoint.
  Raises InputError for mistakes in config, triplets, checkpoint or workdir, and for a loss that is
  not finite.
  """
  check_language(config)
  parts = split(triplets.read(config.data.path), config.data.holdout)
  kind = Kind(
    fixed=('lora.rank', 'lora.alpha'),
    read_start=lambda config: read_language(config.checkpoint),
    load_start=load_base,
    describe=functools.partial(_describe, *parts),
  )
  return run.train(kind, config, workdir)


def _describe(
  learnt: list[Triplet],
  held_out: list[Triplet],
  config: LanguageConfig,
  checkpoint: LanguageCheckpoint,
  mesh: Mesh,
  workdir: str,
) -> Task:
  rows = tokenized(learnt + held_out, checkpoint, config)
  data, validation = (
    {name: array[part] for name, array in rows.items()}
    for part in (slice(len(learnt)), slice(len(learnt), None))
  )
  model_def, shapes = shapes_of(checkpoint)
  length = rows['tokens'].shape[1]
  none = '' if held_out else ' (so no validation loss)'
  return Task(
    config=config,
    shapes=shapes,
    recipe=functools.partial(Recipe, model_def, config),
    step=language_step,
    values=lambda names: read_parameters(checkpoint, {name: shapes[name] for name in names}),
    frozen=functools.partial(_frozen, config, checkpoint, shapes, mesh),
    save_start=functools.partial(save_base, workdir, checkpoint),
    size=f'of {length} tokens',
    data=f'{len(learnt):,} triplets, {len(held_out):,} held out{none}',
    rows=len(learnt),
    batches=lambda run, start: batches(data, config, mesh, start),
    flops=functools.partial(_flops, shapes, length),
    validation=functools.partial(_validation, validation),
    validation_loss=validation_loss,
  )


def split(rows: Sequence[Triplet], holdout: float) -> tuple[list[Triplet], list[Triplet]]:
  """(rows to learn, held-out rows): at most a share `holdout` is held out, spread evenly.

  Triplets that share a caption, before or after the edit, stay together.
  """
  group = groups((row.caption, row.edited) for row in rows)
  members_by_group: dict[int, list[int]] = {}
  for i, first in enumerate(group):
    members_by_group.setdefault(first, []).append(i)
  seen, held_out = 0, set()
  for members in members_by_group.values():
    seen += len(members)
    # Rounded, since 100 * 0.29 is 28.999999999999996.
    if len(held_out) + len(members) <= int(round(seen * holdout, 6)):
      held_out |= {*members}
  pick = lambda is_held_out: [row for i, row in enumerate(rows) if (i in held_out) == is_held_out]
  return pick(False), pick(True)


def tokenized(
  rows: Sequence[Triplet], checkpoint: LanguageCheckpoint, config: LanguageConfig
) -> TokenRows:
  """All triplets as one batch of `language_step`, padded to a multiple of 32 tokens.

  Prompt and completion are tokenized separately, like prompts when the model writes.
  InputError for a triplet that is longer than the model or the config allows.
  """
  tokenizer = tokenizer_of(checkpoint)
  room = checkpoint.config['max_position_embeddings']
  limit = min(config.data.max_tokens, room)
  prompts, completions = [], []
  for i, row in enumerate(rows):
    prompts.append(tokenizer.encode(triplets.prompt(row.caption)).ids)
    completions.append(tokenizer.encode(triplets.completion(row), add_special_tokens=False).ids)
    count = len(prompts[i]) + len(completions[i])
    if count > limit:
      raise InputError(
        f'{config.data.path}: the triplet of {row.caption[:40]!r} takes {count} tokens, more than'
        f' {limit}; shorten it, or raise data.max_tokens (the model allows {room}).'
      )
  longest = max(len(a) + len(b) for a, b in zip(prompts, completions, strict=True))
  shape = len(rows), -(-longest // ROUND) * ROUND
  batch = {
    'tokens': np.zeros(shape, np.int32),
    'positions': np.full(shape, -1, np.int32),
    'weight': np.zeros(shape, np.float32),
  }
  for i, (first, second) in enumerate(zip(prompts, completions, strict=True)):
    end = len(first) + len(second)
    batch['tokens'][i, :end] = first + second
    batch['positions'][i, :end] = np.arange(end)
    batch['weight'][i, len(first) : end] = 1
  return batch


def batches(rows: TokenRows, config: LanguageConfig, mesh: Mesh, start: int) -> Iterator[dict]:
  """Yields the batch of every step from `start` on, on the devices.

  The seed decides which row is at place step x batch_size + row. Each epoch has all rows once, in
  its own order.
  """
  order = loader.order([len(rows['tokens'])], [1.0], config.seed)
  local = sharding.local_rows(mesh, config.batch_size)
  for step in itertools.count(start):
    chosen = [order[step * config.batch_size + int(row)][1] for row in local]
    host = {name: array[chosen] for name, array in rows.items()}
    yield loader.globally(host, sharding.of_batch(mesh), config.batch_size)


def _frozen(
  config: LanguageConfig,
  checkpoint: LanguageCheckpoint,
  shapes: dict[str, jax.ShapeDtypeStruct],
  mesh: Mesh,
  trained: Collection[str],
) -> dict[str, jax.Array]:
  """The weights that are not trained, on the devices, in the dtype of arithmetic."""
  frozen = {}
  fixed = {name: shapes[name] for name in shapes if name not in trained}
  for name, value in read_parameters(checkpoint, fixed).items():
    placement = sharding.split(mesh, value.shape, ('fsdp',))
    frozen[name] = sharding.put(value.astype(config.dtype), placement)
  return frozen


def _validation(rows: TokenRows, run: Run) -> Callable[[], Iterator[dict]] | None:
  """`batches()` of all held-out triplets; None if there are none."""
  size, count = run.microbatch * run.mesh.size, len(rows['tokens'])
  if not count:
    return None
  # The first rows fill the last batch, with weight 0.
  filled = {
    name: array[np.arange(-(-count // size) * size) % count] for name, array in rows.items()
  }
  filled['weight'][count:] = 0
  local = sharding.local_rows(run.mesh, size)

  def batches():
    for start in range(0, len(filled['tokens']), size):
      host = {name: array[start + local] for name, array in filled.items()}
      yield loader.globally(host, sharding.of_batch(run.mesh), size)

  return batches


def _flops(shapes: dict[str, jax.ShapeDtypeStruct], length: int, run: Run) -> float:
  """FLOPs of one row: forward, and backward through the trained weights."""
  total = sum(x.size for x in shapes.values())
  fixed = sum(x.size for x in run.frozen.values())
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  forward = lambda params, tokens: nnx.merge(run.recipe.model_def, params)(tokens)
  return flops.count(forward, parameters.unflatten(shapes), tokens) * (3 - fixed / total)
