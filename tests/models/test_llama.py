"""The language model against transformers: random normal weights, float32, largest difference."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny_llamas
import torch_models as reference
from flax import nnx

from ip2p_jax.errors import InputError
from ip2p_jax.models import llama
from ip2p_jax.models.layers import REMATS, abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig

torch = peers.module('torch')
transformers = peers.module('transformers')

TOLERANCE = 1e-4
KINDS = list(tiny_llamas.CONFIGS)
B, N = 3, 70  # over llama3's original length of 48 tokens


class Pair:
  """transformers' model and ours with the same weights."""

  def __init__(self, kind):
    self.kind = kind
    source = tiny_llamas.checkpoint(kind)
    self.config = LlamaConfig.from_json(source.config)
    make = lambda keys: Llama(self.config, rngs=keys)
    definition, shapes = abstract(make)
    self.params = jax.device_put(reference.names.to_params(source.tensors, shapes, 'language'))
    self.run = jax.jit(lambda params, *inputs: nnx.merge(definition, params)(*inputs))

  @functools.cached_property
  def theirs(self):
    return tiny_llamas.build(self.kind)

  def logits(self, tokens):
    with torch.no_grad():
      return self.theirs(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.fixture(scope='module', params=KINDS)
def pair(request):
  return Pair(request.param)


@pytest.fixture(scope='module')
def small():
  return Pair('llama3')


@pytest.fixture
def tokens(rng):
  return rng.integers(0, tiny_llamas.VOCABULARY, (B, N), np.int32)


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_logits_are_those_of_transformers(pair, tokens):
  logits = pair.run(pair.params, tokens)
  assert logits.dtype == np.float32
  close(logits, pair.logits(tokens))


def test_logits_with_a_cache_are_the_same(pair, tokens):
  expected = pair.logits(tokens)
  cache = llama.empty_cache(pair.config, B, N + 10, jnp.float32)
  places = np.broadcast_to(np.arange(N, dtype=np.int32), (B, N))
  logits, cache = pair.run(pair.params, tokens[:, :50], places[:, :50], cache)
  close(logits, expected[:, :50])
  for n in range(50, N):
    logits, cache = pair.run(pair.params, tokens[:, n : n + 1], places[:, n : n + 1], cache)
    close(logits[:, 0], expected[:, n])


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_changes_nothing(small, tokens, side, rng):
  lengths, padding = [70, 41, 1], 6
  padded = rng.integers(0, tiny_llamas.VOCABULARY, (B, N + padding), np.int32)
  positions = np.full(padded.shape, -1, np.int32)
  for b, length in enumerate(lengths):
    begin = padded.shape[1] - length if side == 'left' else 0
    padded[b, begin : begin + length] = tokens[b, :length]
    positions[b, begin : begin + length] = np.arange(length)
  cache = llama.empty_cache(small.config, B, 80, jnp.float32)
  for logits in (
    small.run(small.params, padded, positions),
    small.run(small.params, padded, positions, cache)[0],
  ):
    assert np.isfinite(logits).all()
    for b, length in enumerate(lengths):
      close(logits[b][positions[b] >= 0], small.logits(tokens[b : b + 1, :length])[0])


def test_padding_leaves_the_cache_alone(small, tokens):
  cache = llama.empty_cache(small.config, B, 80, jnp.float32)
  _, after = small.run(small.params, tokens, np.full((B, N), -1, np.int32), cache)
  jax.tree.map(np.testing.assert_array_equal, after, cache)


def test_old_entries_of_the_cache_have_no_effect(small, tokens):
  cache = llama.empty_cache(small.config, B, N, jnp.float32)
  places = np.broadcast_to(np.arange(N, dtype=np.int32), (B, N))
  _, used = small.run(small.params, tokens[:, ::-1], places, cache)
  fresh, _ = small.run(small.params, tokens[:, :9], places[:, :9], cache)
  again, _ = small.run(small.params, tokens[:, :9], places[:, :9], used)
  np.testing.assert_array_equal(again, fresh)


def test_later_tokens_do_not_change_earlier_logits(small, tokens):
  changed = tokens.copy()
  changed[:, 40:] = 7
  np.testing.assert_array_equal(
    small.run(small.params, tokens)[:, :40], small.run(small.params, changed)[:, :40]
  )


def test_gradients_are_those_of_transformers(small, tokens):
  definition, _ = abstract(lambda keys: Llama(small.config, rngs=keys))

  def loss(params, remat):
    logits = nnx.merge(definition, params)(tokens[:, :-1], remat=remat)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    return -picked.mean()

  labels = torch.from_numpy(tokens).long()
  small.theirs.zero_grad()
  small.theirs(labels, labels=labels).loss.backward()
  theirs = {name: p.grad.numpy() for name, p in small.theirs.named_parameters()}
  for remat in (REMATS['none'], REMATS['full']):
    ours = reference.names.to_tensors(
      jax.jit(jax.grad(loss), static_argnums=1)(small.params, remat)
    )
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
      assert reference.relative_error(gradient, theirs[name]) <= TOLERANCE, name


def test_half_precision_weights_give_float32_logits(small, tokens):
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.params)
  cache = llama.empty_cache(small.config, B, N, jnp.bfloat16)
  logits, cache = small.run(half, tokens, None, cache)
  assert logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
  assert reference.relative_error(logits, small.logits(tokens)) < 0.05


def test_configs_of_transformers_4_and_5_are_equal():
  new = {**tiny_llamas.SIZES, **tiny_llamas.CONFIGS['llama3']}
  rope = dict(new['rope_parameters'])
  old = {key: value for key, value in new.items() if key != 'rope_parameters'}
  old['rope_theta'] = rope.pop('rope_theta')
  oldest = {**rope, 'type': rope['rope_type']}
  del oldest['rope_type']
  expected = LlamaConfig.from_json(new)
  assert expected.rope.factor == 8
  assert LlamaConfig.from_json({**old, 'rope_scaling': rope}) == expected
  assert LlamaConfig.from_json({**old, 'rope_scaling': oldest}) == expected


@pytest.mark.parametrize('kind', KINDS)
def test_transformers_reads_a_written_config_as_we_do(kind, tmp_path):
  config = LlamaConfig.from_json({**tiny_llamas.SIZES, **tiny_llamas.CONFIGS[kind]})
  assert LlamaConfig.from_json(config.to_json()) == config
  (tmp_path / 'config.json').write_text(json.dumps(config.to_json()))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  assert LlamaConfig.from_json(theirs.to_dict()) == config


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type='gpt2' is not supported"),
    ({'model_type': None}, 'model_type=None is not supported'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported, only 'silu'"),
    ({'vocab_size': None}, 'lacks vocab_size'),
    ({'hidden_size': 48.5}, 'hidden_size=48.5 is not a whole number'),
    ({'num_key_value_heads': 4}, 'not a multiple of num_key_value_heads=4'),
    ({'head_dim': 7}, 'head_dim=7 is odd'),
    ({'rms_norm_eps': 0}, 'rms_norm_eps=0 is not a number above 0'),
    ({'use_sliding_window': True}, 'use_sliding_window=True is not supported'),
    ({'layer_types': ['sliding_attention']}, 'layer_types='),
    ({'quantization_config': {'bits': 4}}, 'quantization_config='),
    ({'attention_bias': 'yes'}, "attention_bias='yes' is neither true nor false"),
    ({'eos_token_id': 'end'}, "eos_token_id='end'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_scaling.rope_type='dynamic'"),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_parameters.rope_type='yarn'"),
    ({'rope_scaling': {'rope_type': 'linear'}}, 'rope_scaling: lacks factor'),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': -1}}, 'factor=-1 is not a number above'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    ({'rope_scaling': 'linear'}, "rope_scaling='linear' is not an object"),
  ],
)
def test_an_unsupported_value_names_the_key(change, message):
  config = {**tiny_llamas.SIZES, 'model_type': 'llama', **change}
  with pytest.raises(InputError, match=r'^folder/config.json: ') as error:
    LlamaConfig.from_json(config, 'folder/config.json')
  assert message in str(error.value)
