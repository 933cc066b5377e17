"""Training of an editor: its batches, validation, previews, and reports of bad batches."""

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ip2p_jax import parameters, sharding, storage
from ip2p_jax.config import TrainConfig
from ip2p_jax.config_check import check_config
from ip2p_jax.data import examples, loader
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.errors import InputError
from ip2p_jax.models import attention
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline.networks import networks_of, tokenizer_of
from ip2p_jax.pipeline.workdir import load_base, read_unet, save_base
from ip2p_jax.training import flops, previews, run
from ip2p_jax.training.run import Kind, Run, Task
from ip2p_jax.training.start import (
  Data,
  check_latents,
  check_resolution,
  framing_of,
  frozen_parts,
  open_data,
  starting_checkpoint,
  with_prediction_type,
)
from ip2p_jax.training.step import Recipe, losses_at, train_step, unet_params, validation_loss
from ip2p_jax.weights import Checkpoint
from ip2p_jax.xla_alarms import quietly


class Editing(NamedTuple):
  """Data, tokenizer and workdir of an editor's run."""

  data: Data
  tokenizer: ClipTokenizer
  workdir: str


def train(config: TrainConfig, workdir: str) -> int:
  """Trains until `config.steps`, or until a signal; a second call continues from the checkpoint.

  Returns the exit status: 0 when done, 143 when stopped by a signal, after writing a checkpoint.
  Raises InputError for mistakes in config, data, checkpoint or workdir; for a loss that is not
  finite; and for more broken examples than `data.max_corrupt`.
  """
  check_config(config)
  data = open_data(config)
  kind = Kind(
    fixed=('task', 'lora.rank', 'lora.alpha'),
    read_start=starting_checkpoint,
    load_start=load_base,
    describe=functools.partial(_describe, data),
  )
  return run.train(kind, config, workdir)


def _describe(
  data: Data, config: TrainConfig, checkpoint: Checkpoint, mesh: Mesh, workdir: str
) -> Task:
  networks = networks_of(checkpoint)
  networks = networks._replace(attention=attention.dispatch(config.attention, mesh))
  config = with_prediction_type(config, networks, workdir)
  check_resolution(config, networks)
  tokenizer = tokenizer_of(checkpoint, networks)
  check_latents(config, checkpoint, tokenizer)
  shapes, editing = parameters.flatten(networks.shapes['unet']), Editing(data, tokenizer, workdir)
  bind = lambda function: functools.partial(function, editing)
  return Task(
    config=config,
    shapes=shapes,
    recipe=functools.partial(Recipe, networks, config),
    step=train_step,
    values=lambda names: read_unet(checkpoint, {name: shapes[name] for name in names}),
    frozen=functools.partial(frozen_parts, config, checkpoint, networks, tokenizer, mesh),
    save_start=functools.partial(save_base, workdir, checkpoint),
    size=f'at {config.resolution} px',
    data=_about(data),
    rows=_rows(data),
    batches=bind(_batches),
    flops=bind(_flops),
    validation=bind(_validation),
    validation_loss=validation_loss,
    preview=bind(_preview),
    look=bind(_save_batch),
    check=bind(_check_skipped),
  )


def _about(data: Data) -> str:
  rows = ' + '.join(f'{len(source):,}' for source in data.train)
  kind = 'latents' if data.is_latents else 'images'
  none = (
    '' if len(data.validation) else ' (so no validation loss; previews are of training examples)'
  )
  return f'{rows} training examples ({kind}), {len(data.validation):,} for validation{none}'


def _rows(data: Data) -> list[int]:
  return [len(source) for source in data.train]


def _batches(editing: Editing, run: Run, start: int) -> Iterator[dict[str, jax.Array]]:
  config, data = run.config, editing.data
  host = loader.batches(
    data.train, data.weights, seed=config.seed, batch_size=config.batch_size, start_step=start,
    rows=sharding.local_rows(run.mesh, config.batch_size), framing=framing_of(config),
    tokenizer=editing.tokenizer,
    workers=0 if data.is_latents else config.data.workers,  # nothing to decode: threads are faster
  )  # fmt: skip
  placement = sharding.of_batch(run.mesh)
  return loader.to_device(host, placement, config.batch_size, config.data.prefetch, _report_broken)


def _report_broken(errors: list[str]) -> None:
  for error in errors:  # of all processes
    print(f'skipped a broken example: {error}', file=sys.stderr, flush=True)


def _validation(editing: Editing, run: Run) -> Callable[[], Iterator[dict[str, jax.Array]]] | None:
  """`batches()` of the first good validation examples; None without any."""
  count, source = run.config.log.validation_examples, editing.data.validation
  if not (count and len(source)):
    return None
  size = run.microbatch * run.mesh.size

  def batches():
    host = loader.validation_batches(
      source, batch_size=size, examples=count, rows=sharding.local_rows(run.mesh, size),
      framing=framing_of(run.config), tokenizer=editing.tokenizer,
    )  # fmt: skip
    return loader.to_device(host, sharding.of_batch(run.mesh), size, on_error=_report_broken)

  return batches


def _preview(editing: Editing, run: Run) -> Callable[[Any], Any] | None:
  """`preview(ema)`: an image of edits of the first validation (or else training) examples."""
  count, data, tokenizer = run.config.log.previews, editing.data, editing.tokenizer
  networks = run.recipe.networks
  source = data.validation if len(data.validation) else data.train[0]
  shown, latents = [], []
  for i in range(min(len(source), 10 * count)):
    if len(shown) + len(latents) == count:
      break
    with contextlib.suppress(InputError):  # training reports broken rows; previews leave them out
      row = source[i]
      if isinstance(row, LatentRow):
        latents.append(row)
        continue
      example = examples.example(row, None, framing_of(run.config), tokenizer)
      keys = [key for key in ('input', 'edited') if f'{key}_image' in example]
      images = {key: example[f'{key}_image'] for key in keys}
      shown.append(images | {'instruction': row.instructions[0]})
  if latents:
    shown = previews.latent_examples(networks, run.frozen['vae'], tokenizer, latents)
  if not shown:
    return None
  preview = previews.make_preview(
    networks, tokenizer, shown, steps=run.config.log.preview_steps, mesh=run.mesh
  )
  gather = jax.jit(
    functools.partial(unet_params, run.recipe),
    out_shardings=sharding.replicated(run.mesh),
  )

  def show(ema):
    params = {'unet': gather(run.frozen['unet'], ema)}
    return preview(params | {part: run.frozen[part] for part in ('vae', 'text_encoder')})

  return show


def _flops(editing: Editing, run: Run) -> float:
  networks = run.recipe.networks
  return flops.training_flops(
    networks, run.config.resolution, latents=editing.data.is_latents,
    trained_fraction=flops.trained_fraction(networks, run.frozen['unet']),
  )  # fmt: skip


def _save_batch(editing: Editing, run: Run, place: int, state: Any, step: int) -> str:
  """Writes the batch of the step after `step` to W/failures, and returns a sentence that says so.

  The file has each example's loss and draws, too. `state` is that after `step`, and `place` that of
  the batch.
  """
  config, data = run.config, editing.data
  rows = sharding.local_rows(run.mesh, config.batch_size)
  host = loader.batch_at(
    data.train, data.weights, seed=config.seed, batch_size=config.batch_size, step=place,
    rows=rows, framing=framing_of(config), tokenizer=editing.tokenizer,
  )  # fmt: skip
  errors = host.pop('error')
  batch = loader.globally(host, sharding.of_batch(run.mesh), config.batch_size)

  def look(state, frozen, batch):
    return *losses_at(run.recipe, state, frozen, batch), batch['weight']

  everywhere = sharding.replicated(run.mesh)
  results = quietly(jax.jit(look, out_shardings=everywhere), state, run.frozen, batch)
  losses, draws, weight = jax.device_get(results)
  arrays = host | {'error': errors, 'rows': rows, 'losses': losses} | draws._asdict()
  content = io.BytesIO()
  np.savez_compressed(content, **arrays)
  name = f'step_{step + 1:08d}_process_{jax.process_index()}.npz'
  file = epath.Path(editing.workdir) / 'failures' / name
  storage.write_bytes(file, content.getvalue())
  badness = np.where(np.isfinite(losses), losses, np.inf)
  worst = int(np.argmax(np.where(weight > 0, badness, -np.inf)))  # broken rows do not count
  return f' {file} has the batch and the loss of every example (worst: row {worst}).'


def _check_skipped(editing: Editing, run: Run, place: int, values: dict[str, float]) -> str | None:
  """A sentence about too many broken examples, or None. Each pass of the data counts them again."""
  config, data, skipped = run.config, editing.data, values['skipped']
  passes = _passes(place * config.batch_size, _rows(data), data.weights)
  if skipped > config.data.max_corrupt * passes:
    return (
      f'{passes:.1f} passes of the data had {int(skipped)} broken examples, more than'
      f' data.max_corrupt ({config.data.max_corrupt}) in each; ip2p check lists them all. Repair'
      ' them, or raise the limit.'
    )
  return None


def _passes(seen: int, rows: Sequence[int], weights: Sequence[float]) -> float:
  """Passes over the data set of a mixture that is seen most often."""
  each = zip(rows, weights, strict=True)
  return max(1.0, *(seen * weight / sum(weights) / count for count, weight in each))
