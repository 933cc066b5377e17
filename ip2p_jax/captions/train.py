"""Fine-tuning a language model on triplets: the paper's first stage.

Of each triplet the model sees the caption and learns the rest: the loss is over the completion's
tokens alone. Triplets are few, so all are tokenized once, to one length, and stay in memory.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ip2p_jax import parameters, sharding, storage
from ip2p_jax.captions import triplets
from ip2p_jax.captions.generate import tokenizer_of
from ip2p_jax.captions.step import Recipe, language_step, validation_loss
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.captions.workdir import load_base, read_parameters, save_base, shapes_of
from ip2p_jax.config import LanguageConfig, check_language
from ip2p_jax.data import loader
from ip2p_jax.data.holdout import groups
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.workdir import Checkpoints
from ip2p_jax.training import flops, logs, optimizer
from ip2p_jax.training.loop import (
  Job,
  course_of,
  describe_params,
  keep_config,
  loop,
  say,
  signals,
  stop_if_bad,
)
from ip2p_jax.training.run import as_begun, claimed, resumed, sizes, started, trained_shapes
from ip2p_jax.training.step import State, initial_state, jitted
from ip2p_jax.weights.language_folder import LanguageCheckpoint, read_language

ROUND = 32  # lengths are multiples of it, so that few programs serve all data sets

TokenRows = dict[str, np.ndarray]  # a batch of `language_step`, or a whole data set like one


class Run(NamedTuple):
  """What stays the same from step to step; see `setup_run.Run`."""

  config: LanguageConfig
  mesh: Mesh
  recipe: Recipe
  shapes: dict[str, Any]
  shardings: State
  frozen: dict[str, jax.Array]
  microbatch: int


def train_language(config: LanguageConfig, workdir: str) -> int:
  """Trains until `config.steps`, or until a signal; called again, goes on where it was.

  Returns the exit status: 0 when done, 143 when stopped by a signal (a checkpoint is written
  first). Raises InputError for anything wrong with config, triplets, checkpoint or workdir, and for
  a loss that is not finite.
  """
  check_language(config)
  workdir = str(storage.folder(workdir))
  learnt, held_out = split(triplets.read(config.data.path), config.data.holdout)
  mesh = sharding.make_mesh(config.mesh.fsdp)
  with contextlib.ExitStack() as stack:
    stack.enter_context(claimed(workdir))
    manager = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.log.keep)))
    if manager.latest_step() is not None:
      config = as_begun(config, ('lora.rank', 'lora.alpha'), workdir, say)
    checkpoint = _starting_point(config, workdir, manager)
    rows = tokenized(learnt + held_out, checkpoint, config)
    data, validation = (
      {name: array[part] for name, array in rows.items()}
      for part in (slice(len(learnt)), slice(len(learnt), None))
    )
    run, state, extras = _prepare(config, workdir, mesh, manager, checkpoint, _length(rows))
    sharding.check_placed(state, run.shardings)
    step = int(state['step'])
    if step:
      say(f'resumed   from the checkpoint of step {step:,}')
    if step >= config.steps:
      say(f'done: already at step {step:,} of {config.steps:,}')
      return 0
    keep_config(config, workdir, step)
    course = course_of(extras, config)
    if extras['rows'] not in (None, len(learnt)):
      say(f'there were {extras["rows"]} triplets, and now are {len(learnt)}: the order is another')
    writer = stack.enter_context(logs.Writer(workdir, step))
    none = '' if held_out else ' (so no validation loss)'
    say(f'data      {len(learnt):,} triplets, {len(held_out):,} held out{none}')
    describe_params(state, writer)
    must_stop = stack.enter_context(signals())
    # Counted in batches of today's size, in case that has changed; no triplet comes twice.
    ahead = -(-extras['examples'] // config.batch_size) - step
    job = _job(run, data, validation, manager, ahead, step)
    meter = _meter(run, rows)
    status = loop(job, config, state, workdir, manager, writer, meter, must_stop, course)
  if status == 0:
    say(f'done: {config.steps:,} steps')
    say(f'ip2p convert {workdir} DST exports the averaged weights')
  return status


def split(rows: Sequence[Triplet], holdout: float) -> tuple[list[Triplet], list[Triplet]]:
  """Those to learn and those to hold out, a part `holdout` of them at most, spread evenly.

  Triplets that share a caption, before or after the edit, are together on one side.
  """
  group = groups((row.caption, row.edited) for row in rows)
  of_group: dict[int, list[int]] = {}
  for i, first in enumerate(group):
    of_group.setdefault(first, []).append(i)
  seen, held = 0, set()
  for members in of_group.values():
    seen += len(members)
    # Rounded, since 100 * 0.29 is 28.999999999999996.
    if len(held) + len(members) <= int(round(seen * holdout, 6)):
      held |= {*members}
  pick = lambda is_held: [row for i, row in enumerate(rows) if (i in held) == is_held]
  return pick(False), pick(True)


def tokenized(
  rows: Sequence[Triplet], checkpoint: LanguageCheckpoint, config: LanguageConfig
) -> TokenRows:
  """All triplets as one batch of `language_step`, padded to a multiple of 32 tokens.

  Prompt and completion are tokenized apart, as a prompt is when the model writes.
  InputError for a triplet that is longer than the model, or the config, allows.
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
        f' {limit}; shorten it, or raise data.max_tokens (the model has room for {room}).'
      )
  longest = max(len(a) + len(b) for a, b in zip(prompts, completions, strict=True))
  shape = len(rows), -(-longest // ROUND) * ROUND
  found = {
    'tokens': np.zeros(shape, np.int32),
    'positions': np.full(shape, -1, np.int32),
    'weight': np.zeros(shape, np.float32),
  }
  for i, (first, second) in enumerate(zip(prompts, completions, strict=True)):
    end = len(first) + len(second)
    found['tokens'][i, :end] = first + second
    found['positions'][i, :end] = np.arange(end)
    found['weight'][i, len(first) : end] = 1
  return found


def batches(rows: TokenRows, config: LanguageConfig, mesh: Mesh, start: int) -> Iterator[dict]:
  """The batch of every step from `start` on, on the devices.

  What stands at place step x batch_size + row follows from the seed: all rows once, in an order of
  their own for each epoch, and again.
  """
  order = loader.order([len(rows['tokens'])], [1.0], config.seed)
  local = sharding.local_rows(mesh, config.batch_size)
  for step in itertools.count(start):
    chosen = [order[step * config.batch_size + int(row)][1] for row in local]
    host = {name: array[chosen] for name, array in rows.items()}
    yield loader.globally(host, sharding.of_batch(mesh), config.batch_size)


def _starting_point(config, workdir, manager) -> LanguageCheckpoint:
  if manager.latest_step() is None:
    return read_language(config.checkpoint)
  checkpoint = load_base(workdir)
  if checkpoint is None:
    raise InputError(f'{workdir}: has checkpoints of no language model; use a new workdir.')
  return checkpoint


def _prepare(config, workdir, mesh, manager, checkpoint, length):
  """Starts or resumes: (run, state, {'examples': seen so far, 'rows': number of triplets})."""
  microbatch = sharding.check_batch(mesh, config.batch_size, config.accumulation)
  model_def, shapes = shapes_of(checkpoint)
  trained, adapters = trained_shapes(config, shapes)
  transform = optimizer.adamw(config.optimizer, {*shapes, *trained}, config.steps)
  recipe = Recipe(model_def, config, transform)
  abstract = jax.eval_shape(functools.partial(initial_state, recipe), trained)
  shardings = sharding.of_state(mesh, abstract, config.mesh.zero1)
  if manager.latest_step() is not None:
    manager.check_fits(abstract)
  fixed, frozen = {name: shapes[name] for name in shapes if name not in trained}, {}
  for name, value in read_parameters(checkpoint, fixed).items():
    where = sharding.split(mesh, value.shape, ('fsdp',))
    frozen[name] = sharding.put(value.astype(config.dtype), where)
  run = Run(config, mesh, recipe, shapes, shardings, frozen, microbatch)
  say(sizes(run, abstract, f'of {length} tokens'))
  if manager.latest_step() is not None:
    return run, *resumed(manager, abstract, shardings)
  save_base(workdir, checkpoint, set() if adapters else set(trained))
  kept = {name: shapes[name] for name in trained if name in shapes}
  values = adapters or read_parameters(checkpoint, kept)
  return run, started(recipe, values, shardings), {'examples': 0, 'rows': None}


def _job(run: Run, data: TokenRows, validation: TokenRows, manager, ahead, first) -> Job:
  save = functools.partial(_save, run, data, manager, ahead)
  step_of = jitted(run.recipe, run.mesh, run.shardings, language_step)
  return Job(
    step=lambda state, batch: step_of(state, run.frozen, batch),
    batches=batches(data, run.config, run.mesh, first + ahead),
    shardings=run.shardings,
    save=save,
    check=lambda values, state, course: stop_if_bad(values, state, course, save, manager),
    validate=_validation(run, validation),
  )


def _save(run, data, manager, ahead, step, state, course) -> None:
  extras = {
    'examples': (step + ahead) * run.config.batch_size,
    'rows': len(data['tokens']),
    'config': dataclasses.asdict(run.config),
    'course': course._asdict(),
  }
  manager.save(step, state, extras, course.good)


def _validation(run: Run, rows: TokenRows) -> Callable[[Any], float | None] | None:
  """`validate(ema)`: the mean loss over all held-out triplets' completions."""
  size, count = run.microbatch * run.mesh.size, len(rows['tokens'])
  if not (run.config.log.validate_every and count):
    return None
  losses = jax.jit(
    functools.partial(validation_loss, run.recipe),
    out_shardings=sharding.replicated(run.mesh),
  )
  # The last batch is filled up with the first row, at no weight.
  filled = {
    name: array[np.arange(-(-count // size) * size) % count] for name, array in rows.items()
  }
  filled['weight'][count:] = 0
  local = sharding.local_rows(run.mesh, size)

  def validate(ema):
    totals = []
    for start in range(0, len(filled['tokens']), size):
      host = {name: array[start + local] for name, array in filled.items()}
      batch = loader.globally(host, sharding.of_batch(run.mesh), size)
      totals.append(jax.device_get(losses(ema, run.frozen, batch)))
    loss, weight = np.sum(np.array(totals, np.float64), 0)
    return float(loss / weight) if weight else None

  return validate


def _meter(run: Run, rows: TokenRows) -> logs.Meter:
  whole = sum(x.size for x in run.shapes.values())
  fixed = sum(x.size for x in run.frozen.values())
  tokens = jax.ShapeDtypeStruct((1, _length(rows)), jnp.int32)
  forward = lambda params, tokens: nnx.merge(run.recipe.model_def, params)(tokens)
  work = flops.count(forward, parameters.unflatten(run.shapes), tokens) * (3 - fixed / whole)
  devices = run.mesh.devices.flat
  return logs.Meter(run.config.batch_size, work, run.mesh.size, flops.peak(devices[0]))


def _length(rows: TokenRows) -> int:
  return rows['tokens'].shape[1]
