"""The config.json of a language model of transformers (Llama, Qwen2 or Qwen3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ip2p_jax.errors import InputError

MODEL_TYPES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
}
ROPE_TYPES = ('default', 'linear', 'llama3')
# Keys that would change the arithmetic, with the only values the modules implement.
_FIXED = {
  'hidden_act': ('silu',),
  'layer_types': (),  # or a list of 'full_attention'
  'partial_rotary_factor': (1,),
  'quantization_config': (),
  'rope_interleaved': (False,),
  'use_sliding_window': (False,),
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """The rotation of queries and keys by position; names are transformers'.

  Attributes:
    rope_type: 'default'; 'linear' divides all frequencies by `factor`; 'llama3' only those of waves
      that are long compared with `original_max_position_embeddings` tokens (Llama 3.1).
    rope_theta: the longest wave has nearly 2 pi rope_theta tokens.
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
      weight = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
      weight = np.clip(weight, 0, 1)
      frequencies = weight * frequencies + (1 - weight) * frequencies / self.factor
    return frequencies.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """The architecture in transformers' config.json; field names are its keys.

  Attributes:
    num_key_value_heads: heads of keys and values; each serves equally many query heads.
    attention_bias: whether all four products of the attention have a bias; Qwen2's first three
      always have one.
    eos_token_id: tokens that end a text; may be empty.
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
    """Reads a config.json of transformers 4 or 5; InputError names a key that is wrong."""
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
    raise InputError(f'{name}: lacks {key}, which a language model needs.')
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
      f'{name}: eos_token_id={value!r} is neither one of the {size} tokens nor a list of them (a'
      ' generation_config.json replaces that of config.json).'
    )
  return tuple(ends)


def _rope(config, name):
  # transformers 5 has all in rope_parameters; 4 has rope_theta, and the rest in rope_scaling.
  key = 'rope_scaling' if config.get('rope_scaling') else 'rope_parameters'
  values = config.get(key) or {}
  where = f'{name}: {key}'
  if not isinstance(values, Mapping):
    raise InputError(f'{where}={values!r} is not an object.')
  rope_type = values.get('rope_type', values.get('type', 'default'))
  if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
    raise InputError(f'{where}.rope_type={rope_type!r} is not supported, only '
                     f'{", ".join(ROPE_TYPES)}.')  # fmt: skip
  _check_fixed(values, where)
  both = [config.get(key) or {} for key in ('rope_parameters', 'rope_scaling')]
  if not all(isinstance(value, Mapping) for value in both):
    raise InputError(f'{name}: rope_parameters and rope_scaling have to be objects.')
  theta = (config.get('rope_parameters') or values).get('rope_theta') or config.get('rope_theta')
  rope = {
    'rope_type': rope_type,
    'rope_theta': _positive({'rope_theta': theta}, 'rope_theta', 10000.0, name),
  }
  for each in _SCALING_KEYS[rope_type]:
    is_count = each == 'original_max_position_embeddings'
    if is_count:  # the default of transformers
      rope[each] = _number(values, each, config.get('max_position_embeddings'), where)
    elif values.get(each) is None:
      raise InputError(f'{where}: lacks {each}, which rope_type {rope_type!r} needs.')
    else:
      rope[each] = _positive(values, each, None, where)
  if rope_type == 'llama3' and rope['low_freq_factor'] >= rope['high_freq_factor']:
    raise InputError(f'{where}: low_freq_factor has to be less than high_freq_factor.')
  return Rope(**rope)
