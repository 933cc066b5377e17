"""Decoder-only language models of the Llama family (transformers' Llama, Qwen2 and Qwen3).

B rows, N tokens, M places of a cache (or N), V vocabulary, D width, H query heads, K key heads, C
channels of one head, G = H / K. Attribute names are transformers'. A token's position is its place
in its row: it turns queries and keys (RoFormer, Su et al. 2021), says who sees whom, and where a
cache keeps the token. Padding has position -1: it sees nothing, nobody sees it, no cache keeps it,
and its logits mean nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.errors import InputError
from ip2p_jax.models.layers import Linear, Remat

MODEL_TYPES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
}
ROPE_TYPES = ('default', 'linear', 'llama3')
# Keys that would change the arithmetic, with the only values the modules implement.
_FIXED = {
  'hidden_act': ('silu',),
  'layer_types': (),  # but for a list of 'full_attention'
  'partial_rotary_factor': (1,),
  'quantization_config': (),
  'rope_interleaved': (False,),
  'use_sliding_window': (False,),
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """How positions turn queries and keys; names are transformers'.

  Attributes:
    rope_type: 'default'; 'linear' divides all frequencies by `factor`; 'llama3' only those of
      waves that are long for `original_max_position_embeddings` tokens (Llama 3.1).
    rope_theta: the longest wave is 2 pi rope_theta tokens long, nearly.
  """

  rope_type: str = 'default'
  rope_theta: float = 10000.0
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def frequencies(self, width: int) -> np.ndarray:
    """float32 [width / 2]: radians per token."""
    frequencies = self.rope_theta ** -(np.arange(0, width, 2) / width)
    if self.rope_type == 'linear':
      frequencies = frequencies / self.factor
    elif self.rope_type == 'llama3':
      waves = self.original_max_position_embeddings * frequencies / (2 * np.pi)
      kept = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
      kept = np.clip(kept, 0, 1)
      frequencies = kept * frequencies + (1 - kept) * frequencies / self.factor
    return frequencies.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """What transformers' config.json says of the architecture; field names are its keys.

  Attributes:
    num_key_value_heads: heads of keys and values; each serves as many query heads.
    attention_bias: whether all four products of the attention have a bias; Qwen2's first three
      always have one.
    eos_token_id: any of these ends a text; may be empty.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  model_type: str = 'llama'
  rms_norm_eps: float = 1e-6
  rope: Rope = Rope()
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  bos_token_id: int | None = None
  eos_token_id: tuple[int, ...] = ()

  @classmethod
  def from_json(cls, config: Mapping[str, Any], name: str = 'config.json') -> Self:
    """Reads a config.json of transformers 4 or 5; an InputError names the key that is amiss."""
    model_type = config.get('model_type')
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
      allowed = ', '.join(MODEL_TYPES)
      raise InputError(f'{name}: model_type={model_type!r} is not supported, only {allowed}.')
    _check_fixed(config, name)
    number = lambda key, default=None: _number(config, key, default, name)
    heads, width = number('num_attention_heads'), number('hidden_size')
    has_flag = lambda key: _flag(config, key, name)
    result = cls(
      vocab_size=number('vocab_size'),
      hidden_size=width,
      intermediate_size=number('intermediate_size'),
      num_hidden_layers=number('num_hidden_layers'),
      num_attention_heads=heads,
      num_key_value_heads=number('num_key_value_heads', heads),
      head_dim=number('head_dim', 128 if model_type == 'qwen3' else width // heads),
      max_position_embeddings=number('max_position_embeddings'),
      model_type=model_type,
      rms_norm_eps=_positive(config, 'rms_norm_eps', 1e-6, name),
      rope=_rope(config, name),
      tie_word_embeddings=has_flag('tie_word_embeddings'),
      attention_bias=has_flag('attention_bias') and model_type != 'qwen2',
      mlp_bias=has_flag('mlp_bias') and model_type == 'llama',
      bos_token_id=config.get('bos_token_id'),
      eos_token_id=_ends(config, name),
    )
    if heads % result.num_key_value_heads:
      raise InputError(f'{name}: num_attention_heads={heads} is not a multiple of '
                       f'num_key_value_heads={result.num_key_value_heads}.')  # fmt: skip
    if result.head_dim % 2:
      raise InputError(f'{name}: head_dim={result.head_dim} is odd; rotary positions need pairs.')
    return result

  def to_json(self) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read."""
    result = dataclasses.asdict(self)
    rope = result.pop('rope')
    scaling = {key: rope[key] for key in _SCALING_KEYS[self.rope.rope_type]}
    return result | {
      'architectures': [MODEL_TYPES[self.model_type]],
      'eos_token_id': list(self.eos_token_id) or None,
      'hidden_act': 'silu',
      'rope_theta': self.rope.rope_theta,
      'rope_scaling': {'rope_type': self.rope.rope_type, **scaling} if scaling else None,
    }


_SCALING_KEYS = {
  'default': (),
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
}


def _check_fixed(config, name):
  for key, allowed in _FIXED.items():
    value = config.get(key)
    if value is None or value in allowed:
      continue
    if (
      key == 'layer_types'
      and isinstance(value, list)
      and all(kind == 'full_attention' for kind in value)
    ):
      continue
    only = ' or '.join(map(repr, allowed)) or 'null'
    raise InputError(f'{name}: {key}={value!r} is not supported, only {only}.')


def _number(config, key, default, name):
  value = config.get(key)
  value = default if value is None else value
  if value is None:
    raise InputError(f'{name}: lacks {key}, which a language model has to tell.')
  if type(value) is not int or value < 1:
    raise InputError(f'{name}: {key}={value!r} is not a whole number above 0.')
  return value


def _positive(config, key, default, name):
  value = config.get(key)
  value = default if value is None else value
  if type(value) not in (int, float) or not 0 < value < 1e38:
    raise InputError(f'{name}: {key}={value!r} is not a number above 0.')
  return float(value)


def _flag(config, key, name):
  value = config.get(key)
  if value not in (None, True, False):
    raise InputError(f'{name}: {key}={value!r} is neither true nor false.')
  return bool(value)


def _ends(config, name):
  value, size = config.get('eos_token_id'), config['vocab_size']
  ends = value if isinstance(value, list) else [] if value is None else [value]
  if any(type(end) is not int or not 0 <= end < size for end in ends):
    raise InputError(
      f'{name}: eos_token_id={value!r} is neither one of the {size} tokens nor a list of them (that'
      ' of generation_config.json counts, if there is one).'
    )
  return tuple(ends)


def _rope(config, name):
  # transformers 5 has all of it in rope_parameters; 4 has rope_theta, and the rest in rope_scaling.
  key = 'rope_scaling' if config.get('rope_scaling') else 'rope_parameters'
  given = config.get(key) or {}
  where = f'{name}: {key}'
  if not isinstance(given, Mapping):
    raise InputError(f'{where}={given!r} is not an object.')
  rope_type = given.get('rope_type', given.get('type', 'default'))
  if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
    raise InputError(f'{where}.rope_type={rope_type!r} is not supported, only '
                     f'{", ".join(ROPE_TYPES)}.')  # fmt: skip
  _check_fixed(given, where)
  both = [config.get(key) or {} for key in ('rope_parameters', 'rope_scaling')]
  if not all(isinstance(one, Mapping) for one in both):
    raise InputError(f'{name}: rope_parameters and rope_scaling have to be objects.')
  theta = (config.get('rope_parameters') or given).get('rope_theta') or config.get('rope_theta')
  rope = {
    'rope_type': rope_type,
    'rope_theta': _positive({'rope_theta': theta}, 'rope_theta', 10000.0, name),
  }
  for each in _SCALING_KEYS[rope_type]:
    is_count = each == 'original_max_position_embeddings'
    if is_count:  # transformers' default, too
      rope[each] = _number(given, each, config.get('max_position_embeddings'), where)
    elif given.get(each) is None:
      raise InputError(f'{where}: lacks {each}, which rope_type {rope_type!r} needs.')
    else:
      rope[each] = _positive(given, each, None, where)
  if rope_type == 'llama3' and rope['low_freq_factor'] >= rope['high_freq_factor']:
    raise InputError(f'{where}: low_freq_factor has to be less than high_freq_factor.')
  return Rope(**rope)


class Entry(NamedTuple):
  """What one layer has seen; place m is position m.

  Places are the minor axis of the keys: then scores are a product without a transposition, which on
  a CPU takes a tenth of the time, and no lanes of a TPU lie idle for heads of 64 channels.
  """

  keys: Array  # [B, K, C, M]
  values: Array  # [B, K, M, C]


Cache = tuple[Entry, ...]  # one per layer


def empty_cache(config: LlamaConfig, batch: int, length: int, dtype: Any) -> Cache:
  """Room for `length` tokens of `batch` rows.

  A row sees the places up to its token's position, so what an older row left behind needs no
  cleaning as long as positions start at 0 and go up by one.
  """
  B, K, C, M = batch, config.num_key_value_heads, config.head_dim, length
  entry = lambda: Entry(jnp.zeros((B, K, C, M), dtype), jnp.zeros((B, K, M, C), dtype))
  return tuple(entry() for _ in range(config.num_hidden_layers))


def cache_length(cache: Cache) -> int:
  """M."""
  return cache[0].values.shape[2]


def resized(cache: Cache, length: int) -> Cache:
  """The same with room for `length` tokens; places beyond are lost."""
  more = (0, max(0, length - cache_length(cache)))
  none = (0, 0)
  keys = lambda x: jnp.pad(x[..., :length], (none, none, none, more))
  values = lambda x: jnp.pad(x[:, :, :length], (none, none, more, none))
  return tuple(Entry(keys(entry.keys), values(entry.values)) for entry in cache)


class Llama(nnx.Module):
  """The network with its head. `logits(model(...))` is the same in two steps."""

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
    """int32 [B, N] -> logits float32 [B, N, V] of the token after each; with a cache, both.

    Args:
      tokens: what is read now; with a cache, its places before are read before.
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
  """[B, N, heads, C]: channels c and c + C / 2 turned by angles [B, N, C / 2]; in float32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attend(q: Array, keys: Array, values: Array, seen: Array) -> Array:
  """q [B, N, H, C], keys [B, K, C, M], values [B, K, M, C], seen [B, N, M] -> [B, N, H, C].

  Scores and softmax in float32. A query that sees nothing gets a mean of all values, not NaN.
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
  # Padding falls outside, and is dropped.
  places = jnp.where(positions < 0, entry.values.shape[2], positions)
  rows = jnp.arange(len(places))[:, None]
  k, v = k.astype(entry.keys.dtype), v.astype(entry.values.dtype)
  return Entry(
    entry.keys.at[rows, :, :, places].set(k, mode='drop'),
    entry.values.at[rows, :, places].set(v, mode='drop'),
  )
