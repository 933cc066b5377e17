"""Writing many rows at once, as jitted programs over a mesh.

S slots, R prompts read at once, P tokens of a prompt, V vocabulary, M places of the cache. Slots
are split over `data`, weights over `fsdp`: devices that share the weights never talk to others.
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

STEPS = 8  # between two looks of the host; a row that ended waits for half of them


class Knobs(NamedTuple):
  """Scalars, traced: other values run the same program."""

  temperature: np.float32
  top_p: np.float32
  frequency_penalty: np.float32


class TextRows(NamedTuple):
  """What each slot is at, int32 [S] but for `seeds`.

  Attributes:
    token: the last one, which the model has not read.
    position: its place in the row; -1 in a free slot.
    last: the place of the last token that the row may have.
    seeds: uint32 [S, 2], high and low half.
  """

  token: np.ndarray
  position: np.ndarray
  last: np.ndarray
  seeds: np.ndarray


class Programs(NamedTuple):
  """What `Slots` runs, jitted; cache and counts are donated."""

  begin: Callable
  read: Callable
  step: Callable
  resized: Callable


@functools.lru_cache(maxsize=4)
def text_programs(definition: nnx.GraphDef, config: LlamaConfig, mesh: Mesh) -> Programs:
  """For a model whose weights and rows are split over a mesh."""
  is_split = mesh.shape['fsdp'] > 1
  of_head = P(None, 'fsdp') if config.vocab_size % mesh.shape['fsdp'] == 0 else P()

  begin = functools.partial(_begin, config)
  read = functools.partial(_read, definition)
  step = functools.partial(_step, definition, config, of_head if is_split else None)
  whole, rows = sharding.replicated(mesh), NamedSharding(mesh, P('data'))
  heads = config.num_key_value_heads % mesh.shape['fsdp'] == 0
  cache = NamedSharding(mesh, P('data', 'fsdp') if heads else P('data'))
  counts = sharding.of_batch(mesh)
  weights = sharding.of_language(mesh, abstract(lambda keys: Llama(config, rngs=keys))[1])
  each, all_of = P('data'), P()

  def apart(f, in_specs, out_specs):
    return jax.shard_map(
      f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={'data'}, check_vma=False
    )

  held = weights, cache, counts
  return Programs(
    jax.jit(begin, static_argnums=(0, 1, 2), out_shardings=(cache, counts)),
    jax.jit(
      apart(read, (all_of, *[each] * 5), (each, each)),
      in_shardings=(*held, rows, rows, rows),
      out_shardings=(cache, counts),
      donate_argnums=(1, 2),
    ),
    jax.jit(
      apart(step, (all_of, each, each, each, all_of, all_of), (each, each, each)),
      in_shardings=(*held, rows, whole, whole),
      out_shardings=(cache, counts, rows),
      donate_argnums=(1, 2),
    ),
    jax.jit(llama.resized, static_argnums=1, out_shardings=cache),
  )


def _begin(config, count, length, dtype):
  """An empty cache, and how often each row has each token, int16 [S, V]: never."""
  cache = llama.empty_cache(config, count, length, dtype)
  return cache, jnp.zeros((count, config.vocab_size), jnp.int16)


def _read(definition, params, cache, counts, slots, tokens, positions):
  """Fills the caches of `slots` [R] from tokens and positions [R, P]."""
  model = nnx.merge(definition, params)
  _, part = model.model(tokens, positions, jax.tree.map(lambda x: x[slots], cache))
  put = lambda old, new: old.at[slots].set(new, mode='drop')
  return jax.tree.map(put, cache, part), counts.at[slots].set(0, mode='drop')


def _step(definition, config, of_head, params, cache, counts, rows, steps, knobs):
  """`steps` tokens of each row, fewer at its end -> cache, counts, int32 [S, STEPS].

  `of_head` is how the head's products lie where weights are split, else None.
  """
  model = nnx.merge(definition, params)
  seeds = jax.random.wrap_key_data(rows.seeds, impl='threefry2x32')
  ends = jnp.array(config.eos_token_id, jnp.int32)[None]

  def go_on(i, state):
    cache, counts, token, position, new = state
    states, cache = model.model(token[:, None], position[:, None], cache)
    logits = model.logits(states)[:, 0]
    if of_head is not None:
      # Parts of the vocabulary, which the head's parts give, become parts of the rows, which choose
      # alone. Not told of the first, XLA would put the head together in every step.
      logits = jax.lax.with_sharding_constraint(logits, of_head)
      logits = jax.lax.with_sharding_constraint(logits, P('fsdp'))
    token = choose(logits, counts, jax.vmap(jax.random.fold_in)(seeds, position), knobs)
    is_row = position >= 0
    counts = counts.at[jnp.arange(len(token)), token].add(is_row.astype(counts.dtype))
    new = new.at[:, i].set(jnp.where(is_row, token, -1))
    goes_on = is_row & (position + 1 < rows.last) & ~(token[:, None] == ends).any(-1)
    return cache, counts, token, jnp.where(goes_on, position + 1, -1), new

  new = jnp.full((len(rows.token), STEPS), -1, jnp.int32)
  state = cache, counts, rows.token, rows.position, new
  state = jax.lax.fori_loop(0, steps, go_on, state)  # as often for every group of devices
  return state[0], state[1], state[4]


def choose(logits: Array, counts: Array, keys: Array, knobs: Knobs) -> Array:
  """The next token of each row, int32 [S].

  Args:
    logits: float32 [S, V].
    counts: int [S, V], how often each row has each token already.
    keys: [S].
    knobs: float32 scalars.
  """
  logits = logits - knobs.frequency_penalty * counts.astype(jnp.float32)

  def sample():
    scaled = logits / knobs.temperature
    kept = jax.lax.cond(knobs.top_p < 1, nucleus, lambda logits, _: logits, scaled, knobs.top_p)
    return draw(kept, jax.vmap(jax.random.uniform)(keys))

  greedy = lambda: logits.argmax(-1).astype(jnp.int32)
  return jax.lax.cond(knobs.temperature > 0, sample, greedy)


def nucleus(logits: Array, top_p: Array) -> Array:
  """[S, V] with -inf for all but the fewest likeliest that have `top_p` (Holtzman et al. 2020)."""
  probabilities = jax.nn.softmax(logits)
  falling = -jnp.sort(-probabilities)
  is_kept = falling.cumsum(-1) - falling < top_p
  least = jnp.where(is_kept, falling, jnp.inf).min(-1, keepdims=True)
  return jnp.where(probabilities >= least, logits, -jnp.inf)


def draw(logits: Array, uniform: Array) -> Array:
  """Indices int32 [S] with the probabilities softmax(logits) [S, V]; `uniform` [S] is in [0, 1).

  Finds where the sum of probabilities passes that number. jax.random.categorical would need V
  numbers for each row, which can take longer than all the rest of a small model.
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
  # A sum in another order may end just short of the target.
  place = jnp.where(is_past.any(-1), is_past.argmax(-1), inside.argmax(-1))
  return (128 * block + place).astype(jnp.int32)
