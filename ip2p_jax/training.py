"""Training an editor: batches in; metrics, validation, previews and checkpoints out."""

import contextlib
import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ip2p_jax import config as configuration
from ip2p_jax import flops, metrics, previews, sharding, storage, train_step
from ip2p_jax.checkpoints import Checkpoints
from ip2p_jax.config import TrainConfig
from ip2p_jax.data import examples, loader
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.errors import InputError
from ip2p_jax.setup_run import Data, Run, claimed, open_data, prepare
from ip2p_jax.training_loop import (
  Job,
  course_of,
  describe_params,
  keep_config,
  loop,
  say,
  signals,
  stop_if_bad,
)
from ip2p_jax.xla_alarms import quietly


def train(config: TrainConfig, workdir: str) -> int:
  """Trains until `config.steps`, or until a signal; called again, goes on where it was.

  Returns the exit status: 0 when done, 143 when stopped by a signal (a checkpoint is written
  first). Raises InputError for anything wrong with config, data, checkpoint or workdir; for a loss
  that is not finite; and for more broken examples than `data.max_corrupt`.
  """
  configuration.check(config)
  workdir = str(storage.folder(workdir))
  data = open_data(config)
  mesh = sharding.make_mesh(config.mesh.fsdp)
  with contextlib.ExitStack() as stack:
    stack.enter_context(claimed(workdir))
    manager = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.log.keep)))
    run, state, extras = prepare(config, workdir, mesh, manager, say)
    config = run.config
    sharding.check_placed(state, run.shardings)
    step = int(state['step'])
    if step:
      say(f'resumed   from the checkpoint of step {step:,}')
    if step >= config.steps:
      say(f'done: already at step {step:,} of {config.steps:,}')
      return 0
    keep_config(config, workdir, step)
    course = course_of(extras, config)
    if extras['rows'] not in (None, _rows(data)):
      say(
        f'the data set had {extras["rows"]} rows, and now has {_rows(data)}: the order is another'
      )
    writer = stack.enter_context(metrics.Writer(workdir, step))
    _describe(data)
    describe_params(state, writer)
    must_stop = stack.enter_context(signals())
    # Counted in batches of today's size, in case that has changed; no example comes twice.
    ahead = -(-extras['examples'] // config.batch_size) - step
    job = _job(run, data, manager, workdir, ahead, step)
    meter = _meter(run, data)
    status = loop(job, config, state, workdir, manager, writer, meter, must_stop, course)
  if status == 0:
    pictures = f', pictures in {workdir}/previews' if job.preview else ''
    say(f'done: {config.steps:,} steps{pictures}')
    say(f'ip2p convert {workdir} DST exports the averaged weights')
  return status


def _job(run: Run, data: Data, manager, workdir, ahead, first) -> Job:
  """The batch of a step is that of place step + ahead; `first` steps are taken."""
  save = functools.partial(_save, manager, run, data, ahead)
  step_of = train_step.jitted(run.recipe, run.mesh, run.shardings)
  validate = _validation(run, data)
  return Job(
    step=lambda state, batch: step_of(state, run.frozen, batch),
    batches=_batches(run, data, first + ahead),
    shardings=run.shardings,
    save=save,
    check=functools.partial(_check_finite, run, data, ahead, save, manager, workdir),
    validate=validate and (lambda ema: validate(ema, run.frozen)),
    preview=_preview(run, data),
    check_log=functools.partial(_check_skipped, run, data, ahead, save),
  )


def _save(manager: Checkpoints, run: Run, data: Data, ahead: int, step: int, state, course) -> None:
  extras = {
    'examples': (step + ahead) * run.config.batch_size,
    'rows': _rows(data),
    'config': dataclasses.asdict(run.config),
    'course': course._asdict(),
  }
  manager.save(step, state, extras, course.good)


def _rows(data: Data) -> list[int]:
  return [len(source) for source in data.train]


def _batches(run: Run, data: Data, start: int) -> Iterator[dict[str, jax.Array]]:
  config = run.config
  host = loader.batches(
    data.train, data.weights, seed=config.seed, batch_size=config.batch_size, start_step=start,
    rows=sharding.local_rows(run.mesh, config.batch_size), config=config, tokenizer=run.tokenizer,
    workers=0 if data.is_latents else config.data.workers,  # nothing to decode: threads are faster
  )  # fmt: skip
  where = sharding.of_batch(run.mesh)
  return loader.to_device(host, where, config.batch_size, config.data.prefetch, _name_broken)


def _name_broken(errors: list[str]) -> None:
  for error in errors:  # whichever process met it
    print(f'skipped a broken example: {error}', file=sys.stderr, flush=True)


def _validation(run: Run, data: Data) -> Callable[[Any, Any], float | None] | None:
  """`validate(ema, frozen)`: the mean loss over the first validation examples that are good."""
  log, size = run.config.log, run.microbatch * run.mesh.size
  if not (log.validate_every and log.validation_examples and len(data.validation)):
    return None
  losses = jax.jit(
    functools.partial(train_step.validation_loss, run.recipe),
    out_shardings=sharding.replicated(run.mesh),
  )

  def validate(ema, frozen):
    host = loader.validation_batches(
      data.validation, batch_size=size, examples=log.validation_examples,
      rows=sharding.local_rows(run.mesh, size), config=run.config, tokenizer=run.tokenizer,
    )  # fmt: skip
    placed = loader.to_device(host, sharding.of_batch(run.mesh), size, on_error=_name_broken)
    with contextlib.closing(placed) as batches:
      totals = [jax.device_get(losses(ema, frozen, batch)) for batch in batches]
    loss, weight = np.sum(np.array(totals, np.float64), 0)
    return float(loss / weight) if weight else None

  return validate


def _preview(run: Run, data: Data) -> Callable[[Any], Any] | None:
  """`preview(ema)`: a picture of the first validation (or else training) examples, edited."""
  count = run.config.log.previews
  source = data.validation if len(data.validation) else data.train[0]
  shown, latents = [], []
  for i in range(min(len(source), 10 * count)):
    if len(shown) + len(latents) == count:
      break
    with contextlib.suppress(InputError):  # training names broken rows; here they only do not show
      row = source[i]
      if isinstance(row, LatentRow):
        latents.append(row)
        continue
      made = examples.example(row, None, run.config, run.tokenizer)
      pictures = {
        key: made[f'{key}_image'] for key in ('input', 'edited') if f'{key}_image' in made
      }
      shown.append(pictures | {'instruction': row.instructions[0]})
  if latents:
    shown = previews.latent_examples(run.networks, run.frozen['vae'], run.tokenizer, latents)
  if not shown:
    return None
  preview = previews.make_preview(
    run.networks, run.tokenizer, shown, steps=run.config.log.preview_steps, mesh=run.mesh
  )
  gather = jax.jit(
    functools.partial(train_step.unet_params, run.recipe),
    out_shardings=sharding.replicated(run.mesh),
  )

  def show(ema):
    params = {'unet': gather(run.frozen['unet'], ema)}
    return preview(params | {part: run.frozen[part] for part in ('vae', 'text_encoder')})

  return show


def _meter(run: Run, data: Data) -> metrics.Meter:
  work = flops.training_flops(
    run.networks, run.config.resolution, latents=data.is_latents,
    trained_fraction=flops.trained_fraction(run.networks, run.frozen['unet']),
  )  # fmt: skip
  devices = run.mesh.devices.flat
  return metrics.Meter(run.config.batch_size, work, run.mesh.size, flops.peak(devices[0]))


def _check_finite(
  run: Run, data: Data, ahead, save, manager, workdir, values, state, course
) -> None:
  """Stops at a loss that is not finite, and keeps what is needed to look into it.

  The batch lies in W/failures, with each example's loss and draws.
  """
  look = functools.partial(_keep_batch, run, data, ahead, workdir, state)
  stop_if_bad(values, state, course, save, manager, look)


def _keep_batch(run: Run, data: Data, ahead, workdir, state, step) -> str:
  """Writes the batch of the step after `step`, which `state` stands before; says where."""
  config, rows = run.config, sharding.local_rows(run.mesh, run.config.batch_size)
  host = loader.batch_at(
    data.train, data.weights, seed=config.seed, batch_size=config.batch_size, step=step + ahead,
    rows=rows, config=config, tokenizer=run.tokenizer,
  )  # fmt: skip
  errors = host.pop('error')
  batch = loader.globally(host, sharding.of_batch(run.mesh), config.batch_size)

  def look(state, frozen, batch):
    return *train_step.losses_at(run.recipe, state, frozen, batch), batch['weight']

  everywhere = sharding.replicated(run.mesh)
  found = quietly(jax.jit(look, out_shardings=everywhere), state, run.frozen, batch)
  each, draws, weight = jax.device_get(found)
  found = host | {'error': errors, 'rows': rows, 'losses': each} | draws._asdict()
  content = io.BytesIO()
  np.savez_compressed(content, **found)
  name = f'step_{step + 1:08d}_process_{jax.process_index()}.npz'
  file = epath.Path(workdir) / 'failures' / name
  storage.write_bytes(file, content.getvalue())
  badness = np.where(np.isfinite(each), each, np.inf)
  worst = int(np.argmax(np.where(weight > 0, badness, -np.inf)))  # broken rows do not count
  return f' The batch with every example’s loss is in {file} (worst: row {worst}).'


def _check_skipped(run: Run, data: Data, ahead, save, step, values, state, course) -> None:
  """Stops at too many broken examples, saved first. Each is met again in every pass of the data."""
  config, skipped = run.config, values['skipped']
  passes = _passes((step + ahead) * config.batch_size, _rows(data), data.weights)
  if skipped > config.data.max_corrupt * passes:
    save(step, state, course)
    raise InputError(
      f'{int(skipped)} broken examples were met in {passes:.1f} passes of the data, more than'
      f' data.max_corrupt ({config.data.max_corrupt}) in each; ip2p check names them all. Mend'
      ' them, or raise the limit.'
    )


def _passes(seen: int, rows: Sequence[int], weights: Sequence[float]) -> float:
  """How often all rows of a mixture's data set were seen, of the one that comes most often."""
  each = zip(rows, weights, strict=True)
  return max(1.0, *(seen * weight / sum(weights) / count for count, weight in each))


def _describe(data: Data) -> None:
  rows = ' + '.join(f'{len(source):,}' for source in data.train)
  kind = 'latents' if data.is_latents else 'pictures'
  none = (
    '' if len(data.validation) else ' (so no validation loss; previews are of training examples)'
  )
  say(f'data      {rows} training examples ({kind}), {len(data.validation):,} for validation{none}')
