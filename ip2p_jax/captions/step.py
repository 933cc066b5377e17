"""One optimizer step of a language model that learns to complete prompts.

State and update are those of `training.step`; this module has the loss and its gradients. `params`
is the whole network or adapters, `frozen` the rest: {dotted name: array}. A batch of B rows with N
tokens has:

  tokens     int32 [B, N]
  positions  int32 [B, N]  places in the row, -1 for padding
  weight     float32 [B, N]  1 for a token that the model learns to predict, else 0
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from ip2p_jax import parameters
from ip2p_jax.config import LanguageConfig
from ip2p_jax.models import lora
from ip2p_jax.models.layers import REMATS
from ip2p_jax.models.llama import Llama
from ip2p_jax.training import step
from ip2p_jax.training.step import State

Flat = dict[str, Array]


class Recipe(NamedTuple):
  """The inputs of a step that jit does not trace."""

  model_def: nnx.GraphDef
  config: LanguageConfig
  transform: optax.GradientTransformation


def language_step(
  recipe: Recipe, shardings: State, state: State, frozen: Flat, batch: Flat
) -> tuple[State, Flat]:
  """Like `training.step.train_step`: one update by the mean loss over the predicted tokens."""
  config = recipe.config
  count = batch['weight'][:, 1:].sum()
  total = jnp.maximum(count, 1.0)
  # Adapters stay in float32; devices exchange a whole network in the type of arithmetic.
  is_whole = not config.lora.rank
  copy = step.cast(state['params'], config.dtype) if is_whole else state['params']

  def loss_of(params, part):
    return summed_loss(recipe, params, frozen, part) / total

  loss, grads = step.sum_gradients(loss_of, copy, batch, config.accumulation, shardings)
  new, metrics = step.updated(recipe, shardings, state, loss, grads, count)
  del metrics['skipped']  # triplets are in memory, and none is damaged
  return new, metrics


def validation_loss(recipe: Recipe, params: Flat, frozen: Flat, batch: Flat) -> tuple[Array, Array]:
  """Sum of the losses of a batch's predicted tokens, and their number."""
  return summed_loss(recipe, params, frozen, batch), batch['weight'][:, 1:].sum()


def summed_loss(recipe: Recipe, params: Flat, frozen: Flat, batch: Flat) -> Array:
  """Cross-entropy in nats, summed over the predicted tokens: float32 []."""
  model, remat = network(recipe, params, frozen), REMATS[recipe.config.remat]
  logits = model(batch['tokens'], batch['positions'], remat=remat)[:, :-1]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['tokens'][:, 1:])
  return (losses * batch['weight'][:, 1:]).sum()


def network(recipe: Recipe, params: Flat, frozen: Flat) -> Llama:
  """The network in the type of arithmetic, with adapters beside its layers."""
  config = recipe.config
  weights = frozen if config.lora.rank else {**frozen, **params}
  model = nnx.merge(recipe.model_def, parameters.unflatten(step.cast(weights, config.dtype)))
  if config.lora.rank:
    lora.attach(model, params, config.lora)
  return model
