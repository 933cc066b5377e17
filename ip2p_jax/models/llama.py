"""Decoder-only language models of the Llama family (transformers' Llama, Qwen2 and Qwen3).

B rows, N tokens, M places of a cache (or N), V vocabulary, D width, H query heads, K key heads, C
channels of one head, G = H / K. Attribute names are transformers'. The position of a token in its
row rotates queries and keys (RoFormer, Su et al. 2021), defines the causal mask, and is the token's
place in a cache. Padding has position -1: it attends to nothing, no token attends to it, no cache
stores it, and its logits are meaningless.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.models.layers import Linear, Remat
from ip2p_jax.models.llama_config import LlamaConfig


class Entry(NamedTuple):
  """Keys and values of one layer; place m is position m.

  Places are the minor axis of the keys. So scores are a product without a transposition, in a tenth
  of the time on a CPU, and heads of 64 channels leave no lanes of a TPU idle.
  """

  keys: Array  # [B, K, C, M]
  values: Array  # [B, K, M, C]


Cache = tuple[Entry, ...]  # one per layer


def empty_cache(config: LlamaConfig, batch: int, length: int, dtype: Any) -> Cache:
  """A cache for `length` tokens of `batch` rows.

  A row attends to places up to its token's position. So old entries need no cleaning if positions
  start at 0 and go up by one.
  """
  B, K, C, M = batch, config.num_key_value_heads, config.head_dim, length
  entry = lambda: Entry(jnp.zeros((B, K, C, M), dtype), jnp.zeros((B, K, M, C), dtype))
  return tuple(entry() for _ in range(config.num_hidden_layers))


def cache_length(cache: Cache) -> int:
  """M."""
  return cache[0].values.shape[2]


def resized(cache: Cache, length: int) -> Cache:
  """The cache with places for `length` tokens; later places are dropped."""
  more = (0, max(0, length - cache_length(cache)))
  none = (0, 0)
  keys = lambda x: jnp.pad(x[..., :length], (none, none, none, more))
  values = lambda x: jnp.pad(x[:, :, :length], (none, none, more, none))
  return tuple(Entry(keys(entry.keys), values(entry.values)) for entry in cache)


class Llama(nnx.Module):
  """The network with its head; `logits(model(...))` gives the same in two steps."""

  def __init__(self, config: LlamaConfig, *, rngs):
    self.config = config
    self.model = Decoder(config, rngs=rngs)
    is_tied = config.tie_word_embeddings
    head = lambda: Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)
    self.lm_head = None if is_tied else head()

  def __call__(
    self,
    tokens: Array,
    positions: Array | None = None,
    cache: Cache | None = None,
    *,
    remat: Remat = lambda layer: layer,
  ) -> Array | tuple[Array, Cache]:
    """int32 [B, N] -> logits float32 [B, N, V] of the next token; with a cache, (logits, cache).

    Args:
      tokens: the new tokens; a cache holds the tokens before them.
      positions: int32 [B, N], -1 for padding; None counts from 0.
      cache: longer than any position; its places of `positions` are written.
      remat: wraps every layer, one of `layers.REMATS` in training.
    """
    states, cache = self.model(tokens, positions, cache, remat=remat)
    logits = self.logits(states)
    return logits if cache is None else (logits, cache)

  def logits(self, states: Array) -> Array:
    """[B, N, D] -> float32 [B, N, V]."""
    rows = states.reshape(-1, states.shape[-1])
    if self.lm_head is None:
      table, axis = self.model.embed_tokens.embedding[...], 1
    else:
      table, axis = self.lm_head.kernel[...], 0
    out = jax.lax.dot_general(
      rows, table, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
    return out.reshape(*states.shape[:-1], -1)


class Decoder(nnx.Module):
  def __init__(self, config, *, rngs):
    self.rope = config.rope
    self.head_dim = config.head_dim
    self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
    self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
    self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

  def __call__(self, tokens, positions=None, cache=None, *, remat=lambda layer: layer):
    """[B, N] -> states [B, N, D] after the last norm, and the cache."""
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    x = self.embed_tokens.embedding[...][tokens]
    angles = (
      positions[..., None].astype(jnp.float32) * self.rope.frequencies(self.head_dim)[None, None]
    )
    places = positions if cache is None else jnp.arange(cache_length(cache))[None]
    seen = (places[:, None] <= positions[..., None]) & (places[:, None] >= 0)  # [B, N, M]
    entries = []
    for i, layer in enumerate(self.layers):
      entry = None if cache is None else cache[i]
      x, entry = remat(layer)(x, angles, seen, positions, entry)
      entries.append(entry)
    return self.norm(x), None if cache is None else tuple(entries)


class Layer(nnx.Module):
  def __init__(self, config, *, rngs):
    width, eps = config.hidden_size, config.rms_norm_eps
    self.input_layernorm = RMSNorm(width, eps)
    self.self_attn = SelfAttention(config, rngs=rngs)
    self.post_attention_layernorm = RMSNorm(width, eps)
    self.mlp = MLP(width, config.intermediate_size, config.mlp_bias, rngs=rngs)

  def __call__(self, x, angles, seen, positions, entry):
    out, entry = self.self_attn(self.input_layernorm(x), angles, seen, positions, entry)
    x = x + out
    return x + self.mlp(self.post_attention_layernorm(x)), entry


class SelfAttention(nnx.Module):
  """Attention in which G query heads share one head of keys and values (Ainslie et al. 2023)."""

  def __init__(self, config, *, rngs):
    width, C = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * C, config.num_key_value_heads * C
    self.head_dim = C
    bias, qkv_bias = config.attention_bias, config.attention_bias or config.model_type == 'qwen2'
    self.q_proj = Linear(width, queries, use_bias=qkv_bias, rngs=rngs)
    self.k_proj = Linear(width, keys, use_bias=qkv_bias, rngs=rngs)
    self.v_proj = Linear(width, keys, use_bias=qkv_bias, rngs=rngs)
    self.o_proj = Linear(queries, width, use_bias=bias, rngs=rngs)
    has_norms = config.model_type == 'qwen3'
    self.q_norm = RMSNorm(C, config.rms_norm_eps) if has_norms else None
    self.k_norm = RMSNorm(C, config.rms_norm_eps) if has_norms else None

  def __call__(self, x, angles, seen, positions, entry):
    B, N, _ = x.shape
    split = lambda y: y.reshape(B, N, -1, self.head_dim)
    q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, angles), rotate(k, angles)
    if entry is None:
      keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    else:
      keys, values = entry = _put(entry, k, v, positions)
    out = attend(q, keys, values, seen)
    return self.o_proj(out.reshape(B, N, -1)), entry


class MLP(nnx.Module):
  def __init__(self, width, inner_width, use_bias, *, rngs):
    linear = lambda *widths: Linear(*widths, use_bias=use_bias, rngs=rngs)
    self.gate_proj = linear(width, inner_width)
    self.up_proj = linear(width, inner_width)
    self.down_proj = linear(inner_width, width)

  def __call__(self, x):
    return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nnx.Module):
  """x over its root mean square along the last axis (Zhang and Sennrich 2019); in float32."""

  def __init__(self, width: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,)))

  def __call__(self, x):
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
    scale = self.scale[...].astype(jnp.float32)
    return (normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(x: Array, angles: Array) -> Array:
  """[B, N, heads, C]: rotates channels c and c + C / 2 by angles [B, N, C / 2]; in float32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attend(q: Array, keys: Array, values: Array, seen: Array) -> Array:
  """q [B, N, H, C], keys [B, K, C, M], values [B, K, M, C], seen [B, N, M] -> [B, N, H, C].

  Scores and softmax in float32. A query without keys gets the mean of all values, not NaN.
  """
  B, N, H, C = q.shape
  K = keys.shape[1]
  q = q.reshape(B, N, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)  # [B, K, G N, C]
  scores = jnp.einsum('bkqc,bkcm->bkqm', q, keys, preferred_element_type=jnp.float32)
  scores = (scores * C**-0.5).reshape(B, K, H // K, N, -1)
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores).astype(values.dtype).reshape(B, K, H // K * N, -1)
  out = jnp.einsum('bkqm,bkmc->bkqc', weights, values)
  return out.reshape(B, K, H // K, N, C).transpose(0, 3, 1, 2, 4).reshape(B, N, H, C)


def _put(entry, k, v, positions):
  """The entry with k and v [B, N, K, C] at the places `positions` [B, N]."""
  # Padding gets a place outside, and is dropped.
  places = jnp.where(positions < 0, entry.values.shape[2], positions)
  rows = jnp.arange(len(places))[:, None]
  k, v = k.astype(entry.keys.dtype), v.astype(entry.values.dtype)
  return Entry(
    entry.keys.at[rows, :, :, places].set(k, mode='drop'),
    entry.values.at[rows, :, places].set(v, mode='drop'),
  )
