"""One optimizer step as one jitted program, and its state.

  state = {'step', 'params', 'ema', 'opt_state', 'skipped', 'bad_step'}

`params` and `ema` are {dotted name: float32} of the trained parameters: the UNet, the parts of it
that the rules train, or LoRA adapters. `frozen` is the rest: {'unet': {dotted name: array}, 'vae',
'text_encoder', 'null_ids'}. B examples of the global batch, A accumulation steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from ip2p_jax import parameters, sharding
from ip2p_jax.config import TrainConfig
from ip2p_jax.models import lora
from ip2p_jax.models.layers import REMATS, Params
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.training import optimizer
from ip2p_jax.training.loss import Batch, Draws, draw, encode, example_losses, latents_shape

State = dict[str, Any]


class Recipe(NamedTuple):
  """The inputs of a step that jit does not trace."""

  networks: Networks
  config: TrainConfig
  transform: optax.GradientTransformation


def initial_state(recipe: Any, params: dict[str, Array]) -> State:
  """The state before the first step."""
  return {
    'step': jnp.int32(0),
    'params': params,
    'ema': jax.tree.map(jnp.array, params),
    'opt_state': recipe.transform.init(params),
    'skipped': jnp.int32(0),  # broken examples so far
    'bad_step': jnp.int32(-1),  # the step whose loss was not finite
  }


def unet_params(recipe: Recipe, fixed: dict[str, Array], trained: dict[str, Array]) -> Params:
  """The UNet's complete parameter tree in the dtype of arithmetic."""
  rank = recipe.config.lora.rank
  flat = lora.merged(fixed, trained, recipe.config.lora) if rank else {**fixed, **trained}
  return parameters.unflatten(cast(flat, recipe.config.dtype))


def train_step(
  recipe: Recipe, shardings: State, state: State, frozen: Params, batch: Batch
) -> tuple[State, dict[str, Array]]:
  """One optimizer step on a global batch.

  A step whose loss or gradients are not finite changes only `bad_step`, and later steps change
  nothing. So the host may look some steps later and still find the state from before the bad step.
  A step whose examples are all broken keeps weights, average and moments; it only counts as a step
  of the schedule, and counts the broken examples.

  Args:
    shardings: of the state; the update is sharded like the optimizer state.

  Returns the new state and {'loss', 'weight', 'grad_norm', 'learning_rate', 'skipped', 'bad_step'};
  `weight` is the number of examples in the mean; if it is 0, `loss` and `grad_norm` are 0, too.
  """
  loss, grads = mean_gradients(recipe, shardings, state['params'], frozen, batch, state['step'])
  skipped = (batch['weight'] == 0).sum(dtype=jnp.int32)
  return updated(recipe, shardings, state, loss, grads, batch['weight'].sum(), skipped)


def jitted(recipe: Any, mesh: Mesh, shardings: State, step: Callable = train_step) -> Callable:
  """`step(state, frozen, batch)`, compiled once; it donates the old state, except on CPUs."""
  return jax.jit(
    functools.partial(step, recipe, shardings),
    out_shardings=(shardings, sharding.replicated(mesh)),
    donate_argnums=(0,) if is_donated(mesh) else (),
  )


def is_donated(mesh: Mesh) -> bool:
  """Not on CPUs: there XLA first copies all donated arrays, which takes a third of the time."""
  return mesh.devices.flat[0].platform != 'cpu'


def updated(
  recipe: Any,
  shardings: State,
  state: State,
  loss: Array,
  grads: Params,
  weight: Array,
  skipped: Array | int = 0,
) -> tuple[State, dict[str, Array]]:
  """The update of `train_step` by loss and gradients, and its results; adds `skipped` examples.

  Args:
    recipe: anything with `config.optimizer`, `config.steps` and `transform`.
    grads: {dotted name: float32}, like the state's `params`.
    weight: total weight of the mean loss, float32 []; with 0 there is nothing to learn from.
  """
  config, step = recipe.config, state['step']
  # ZeRO: each device updates its part, then the parts are gathered.
  grads, params = (
    jax.lax.with_sharding_constraint(tree, shardings['ema']) for tree in (grads, state['params'])
  )
  grad_norm = optax.global_norm(grads)
  updates, opt_state = recipe.transform.update(grads, state['opt_state'], params)
  params = optax.apply_updates(params, updates)
  decay = optimizer.ema_decay(config.optimizer.ema, step + 1)
  new = {
    'step': step + 1,
    'params': params,
    'ema': optimizer.ema_update(state['ema'], params, decay),
    'opt_state': opt_state,
    'skipped': state['skipped'] + skipped,
    'bad_step': state['bad_step'],
  }
  # Without examples the gradient is 0, but decay and momentum would still change the weights.
  unlearnt = new | {
    'params': state['params'],
    'ema': state['ema'],
    'opt_state': optimizer.only_scheduled(state['opt_state'], opt_state),
  }
  new = jax.tree.map(lambda new, old: jnp.where(weight > 0, new, old), new, unlearnt)
  is_fine = (state['bad_step'] < 0) & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  old = state | {'bad_step': jnp.where(state['bad_step'] < 0, step, state['bad_step'])}
  new = jax.tree.map(lambda new, old: jnp.where(is_fine, new, old), new, old)
  metrics = {
    'loss': loss,
    'weight': weight,
    'grad_norm': grad_norm,
    'learning_rate': optimizer.learning_rate(config.optimizer, config.steps)(step),
    'skipped': new['skipped'],
    'bad_step': new['bad_step'],
  }
  return new, metrics


def losses_at(recipe: Recipe, state: State, frozen: Params, batch: Batch) -> tuple[Array, Draws]:
  """The loss of every example [B] in the next step of `state`, and its draws."""
  unet = unet_params(recipe, frozen['unet'], state['params'])

  def losses_of(part):  # in parts, like the step itself, since the whole batch may not fit
    draws = _draws(recipe, part, state['step'])
    return _losses(recipe, unet, frozen, part, draws, recipe.config.conditioning_dropout), draws

  parts = jax.lax.map(losses_of, _parts(batch, recipe.config.accumulation))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def validation_loss(
  recipe: Recipe, params: dict[str, Array], frozen: Params, batch: Batch
) -> tuple[Array, Array]:
  """Sum of the losses of a batch, and of its weights.

  Noise and timesteps are the same each time, so that differences come from the model; no condition
  is dropped. The timesteps of consecutive examples advance by the golden ratio, which spreads any
  number of them evenly over the schedule.
  """
  draws = draw(0, jnp.int32(-1), batch['index'], *_shape(recipe, batch))
  spread = jnp.mod((batch['index'] + 0.5) * 0.6180339887, 1.0)
  count = recipe.networks.schedule.num_train_timesteps
  draws = draws._replace(timesteps=(spread * count).astype(jnp.int32))
  unet = unet_params(recipe, frozen['unet'], params)
  losses = _losses(recipe, unet, frozen, batch, draws, 0.0)
  return (losses * batch['weight']).sum(), batch['weight'].sum()


def mean_gradients(recipe, shardings, params, frozen, batch, step):
  """Weighted mean loss over the batch, and its float32 gradients by `params`.

  `shardings` are the state's.
  """
  config = recipe.config
  total = jnp.maximum(batch['weight'].sum(), 1.0)
  # Cast once, and differentiated by the copy, so devices exchange gradients in the smaller type,
  # too. Adapters are small, and their product is computed in float32.
  copy = params if config.lora.rank else cast(params, config.dtype)

  def loss_of(params, part):
    unet = unet_params(recipe, frozen['unet'], params)
    draws = _draws(recipe, part, step)
    losses = _losses(recipe, unet, frozen, part, draws, config.conditioning_dropout)
    return (losses * part['weight']).sum() / total

  return sum_gradients(loss_of, copy, batch, config.accumulation, shardings)


def sum_gradients(
  loss_of: Callable[[Params, Batch], Array],
  params: Params,
  batch: Batch,
  count: int,
  shardings: State,
) -> tuple[Array, Params]:
  """Sum of `loss_of(params, part)` over `count` parts of the batch, and its float32 gradients.

  `shardings` are the state's; the sums have the sharding of the average.
  """
  sum_shardings = shardings['ema']

  def value_and_grad(params, part):
    loss, grads = jax.value_and_grad(loss_of)(params, part)
    # Gathered as the weights, then split. With the split alone, XLA for TPU computes the gradients'
    # products in as many pieces as there are devices, which takes twice the time.
    return loss, jax.lax.with_sharding_constraint(grads, shardings['params'])

  if count == 1:
    loss, grads = value_and_grad(params, batch)
    return loss, cast(grads, jnp.float32)

  def accumulate(sums, part):
    loss, grads = sums
    more_loss, more_grads = value_and_grad(params, part)
    grads = jax.tree.map(lambda total, x: total + x.astype(jnp.float32), grads, more_grads)
    return (loss + more_loss, jax.lax.with_sharding_constraint(grads, sum_shardings)), None

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  zeros = jnp.float32(0), jax.lax.with_sharding_constraint(zeros, sum_shardings)
  return jax.lax.scan(accumulate, zeros, _parts(batch, count))[0]


def _parts(batch, count):
  # Every count-th row: each device holds consecutive rows, so no row has to move.
  split = lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)  # [B, ...] -> [A, B / A, ...]
  return jax.tree.map(split, batch)


def _losses(recipe, unet, frozen, batch, draws, dropout):
  config, networks = recipe.config, recipe.networks
  inputs = encode(networks, frozen, batch, draws, dropout)
  return example_losses(
    networks, unet, inputs, draws,
    min_snr_gamma=config.min_snr_gamma, remat=REMATS[config.remat],
  )  # fmt: skip


def _draws(recipe, batch, step):
  return draw(recipe.config.seed, step, batch['index'], *_shape(recipe, batch))


def _shape(recipe, batch):
  return latents_shape(recipe.networks, batch), recipe.networks.schedule


def cast(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(dtype), tree)
