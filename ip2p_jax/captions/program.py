"""Jitted programs over a mesh that write many rows at once.

S slots, R prompts read at once, P tokens of a prompt, V vocabulary, M places of the cache. Slots
are split over `data`, weights over `fsdp`. Devices that share the weights do not communicate with
others.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ip2p_jax import sharding
from ip2p_jax.models import llama
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig

STEPS = 8  # until the host looks again; a row that ends waits for half of them on average


class Knobs(NamedTuple):
  """Traced scalars: other values run the same program."""

  temperature: np.float32
  top_p: np.float32
  frequency_penalty: np.float32


class TextRows(NamedTuple):
  """The state of each slot, int32 [S] except `seeds`.

  Attributes:
    token: the last one, which the model has not read.
    position: its place in the row; -1 in a free slot.
    last: the last place that the row may fill.
    seeds: uint32 [S, 2], high and low half.
  """

  token: np.ndarray
  position: np.ndarray
  last: np.ndarray
  seeds: np.ndarray


class Programs(NamedTuple):
  """The jitted programs of `Slots`; cache and counts are donated."""

  begin: Callable
  read: Callable
  step: Callable
  resized: Callable


@functools.lru_cache(maxsize=4)
def text_programs(definition: nnx.GraphDef, config: LlamaConfig, mesh: Mesh) -> Programs:
  """The programs for a model whose weights and rows are split over a mesh."""
  is_split = mesh.shape['fsdp'] > 1
  head_spec = P(None, 'fsdp') if config.vocab_size % mesh.shape['fsdp'] == 0 else P()

  begin = functools.partial(_begin, config)
  read = functools.partial(_read, definition)
  step = functools.partial(_step, definition, config, head_spec if is_split else None)
  replicated, rows = sharding.replicated(mesh), NamedSharding(mesh, P('data'))
  heads = config.num_key_value_heads % mesh.shape['fsdp'] == 0
  cache = NamedSharding(mesh, P('data', 'fsdp') if heads else P('data'))
  counts = sharding.of_batch(mesh)
  weights = sharding.of_language(mesh, abstract(lambda keys: Llama(config, rngs=keys))[1])
  split, shared = P('data'), P()

  def per_group(f, in_specs, out_specs):
    return jax.shard_map(
      f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={'data'}, check_vma=False
    )

  inputs = weights, cache, counts
  return Programs(
    jax.jit(begin, static_argnums=(0, 1, 2), out_shardings=(cache, counts)),
    jax.jit(
      per_group(read, (shared, *[split] * 5), (split, split)),
      in_shardings=(*inputs, rows, rows, rows),
      out_shardings=(cache, counts),
      donate_argnums=(1, 2),
    ),
    jax.jit(
      per_group(step, (shared, split, split, split, shared, shared), (split, split, split)),
      in_shardings=(*inputs, rows, replicated, replicated),
      out_shardings=(cache, counts, rows),
      donate_argnums=(1, 2),
    ),
    jax.jit(llama.resized, static_argnums=1, out_shardings=cache),
  )


def _begin(config, count, length, dtype):
  """An empty cache, and counts of each row's tokens, int16 [S, V], all 0."""
  cache = llama.empty_cache(config, count, length, dtype)
  return cache, jnp.zeros((count, config.vocab_size), jnp.int16)


def _read(definition, params, cache, counts, slots, tokens, positions):
  """Fills the caches of `slots` [R] from tokens and positions [R, P]."""
  model = nnx.merge(definition, params)
  _, part = model.model(tokens, positions, jax.tree.map(lambda x: x[slots], cache))
  put = lambda old, new: old.at[slots].set(new, mode='drop')
  return jax.tree.map(put, cache, part), counts.at[slots].set(0, mode='drop')


def _step(definition, config, head_spec, params, cache, counts, rows, steps, knobs):
  """`steps` tokens of each row, fewer at its end -> cache, counts, int32 [S, STEPS].

  `head_spec` is the sharding of the head's products if weights are split, else None.
  """
  model = nnx.merge(definition, params)
  seeds = jax.random.wrap_key_data(rows.seeds, impl='threefry2x32')
  ends = jnp.array(config.eos_token_id, jnp.int32)[None]

  def go_on(i, state):
    cache, counts, token, position, new = state
    states, cache = model.model(token[:, None], position[:, None], cache)
    logits = model.logits(states)[:, 0]
    if head_spec is not None:
      # The head's parts give parts of the vocabulary. Each device then chooses for a part of the
      # rows. Without the first constraint, XLA would gather the head in every step.
      logits = jax.lax.with_sharding_constraint(logits, head_spec)
      logits = jax.lax.with_sharding_constraint(logits, P('fsdp'))
    token = choose(logits, counts, jax.vmap(jax.random.fold_in)(seeds, position), knobs)
    is_row = position >= 0
    counts = counts.at[jnp.arange(len(token)), token].add(is_row.astype(counts.dtype))
    new = new.at[:, i].set(jnp.where(is_row, token, -1))
    goes_on = is_row & (position + 1 < rows.last) & ~(token[:, None] == ends).any(-1)
    return cache, counts, token, jnp.where(goes_on, position + 1, -1), new

  new = jnp.full((len(rows.token), STEPS), -1, jnp.int32)
  state = cache, counts, rows.token, rows.position, new
  state = jax.lax.fori_loop(0, steps, go_on, state)  # as many for every group of devices
  return state[0], state[1], state[4]


def choose(logits: Array, counts: Array, keys: Array, knobs: Knobs) -> Array:
  """The next token of each row, int32 [S].

  Args:
    logits: float32 [S, V].
    counts: int [S, V], how often each row has each token so far.
    keys: [S].
    knobs: float32 scalars.
  """
  logits = logits - knobs.frequency_penalty * counts.astype(jnp.float32)

  def sample():
    scaled = logits / knobs.temperature
    likely = jax.lax.cond(knobs.top_p < 1, nucleus, lambda logits, _: logits, scaled, knobs.top_p)
    return draw(likely, jax.vmap(jax.random.uniform)(keys))

  greedy = lambda: logits.argmax(-1).astype(jnp.int32)
  return jax.lax.cond(knobs.temperature > 0, sample, greedy)


def nucleus(logits: Array, top_p: Array) -> Array:
  """Logits [S, V], -inf outside the smallest set that has `top_p` (Holtzman et al. 2020)."""
  probabilities = jax.nn.softmax(logits)
  falling = -jnp.sort(-probabilities)
  is_kept = falling.cumsum(-1) - falling < top_p
  least = jnp.where(is_kept, falling, jnp.inf).min(-1, keepdims=True)
  return jnp.where(probabilities >= least, logits, -jnp.inf)


def draw(logits: Array, uniform: Array) -> Array:
  """Indices int32 [S] with the probabilities softmax(logits) [S, V]; `uniform` [S] is in [0, 1).

  Finds where the sum of probabilities passes `uniform`. jax.random.categorical would need V random
  numbers for each row, which can take longer than the rest of a small model.
  """
  S, V = logits.shape
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  blocks = jnp.pad(weights, ((0, 0), (0, -V % 128))).reshape(S, -1, 128)
  sums = blocks.sum(-1)
  passed = sums.cumsum(-1)
  target = uniform * passed[:, -1]
  block = (passed <= target[:, None]).sum(-1)
  rows = jnp.arange(S)
  before = jnp.where(block > 0, passed[rows, block - 1], 0)
  inside = blocks[rows, block]
  is_past = before[:, None] + inside.cumsum(-1) > target[:, None]
  # This sum has another order, and rounding may keep it just below the target.
  place = jnp.where(is_past.any(-1), is_past.argmax(-1), inside.argmax(-1))
  return (128 * block + place).astype(jnp.int32)
