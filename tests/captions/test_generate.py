"""Folders of tiny random language models, and texts from them, against transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny_llamas
import torch_models as reference
from flax import nnx
from safetensors.numpy import load_file, save_file

from ip2p_jax import sharding
from ip2p_jax.captions import generate, program
from ip2p_jax.captions.generate import Language, write
from ip2p_jax.errors import InputError
from ip2p_jax.weights.language_folder import read_language, write_language

torch = peers.module('torch')
transformers = peers.module('transformers')

PROMPTS = [
  'a photograph of a girl',
  'oil painting of mountains at sunset; add a rainbow to the sky. swap sunflowers with roses',
  'dragon',
  'ä',
  'winter, snow, winter, snow, winter',
  'make it a dragon, have her ride a dragon',
]
SEEDS = [3, 1, 4, 2**32 + 4, 5, 2**64 - 1]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('language')
  return tiny_llamas.write(folder, 'llama3')


@pytest.fixture(scope='module')
def model(saved):
  return Language.load(saved)


@pytest.fixture(scope='module')
def endless(model):
  """A model whose texts only end at the limit."""
  return model._replace(config=dataclasses.replace(model.config, eos_token_id=()))


def texts(model, prompts=PROMPTS, seeds=SEEDS, **settings):
  """Completions in the order of the prompts."""
  settings = {'temperature': 1.0, 'max_tokens': 30, 'slots': 4, 'stop': None, **settings}
  return sorted(write(model, prompts, seeds=seeds, **settings))


@pytest.fixture(scope='module')
def next_logits(model):
  """A function: tokens -> logits [V] of the next token, by the network alone, without cache."""
  run = jax.jit(lambda params, *inputs: nnx.merge(model.definition, params)(*inputs))

  def after(tokens):
    padding = 64 - len(tokens)
    rows = np.pad(np.int32(tokens), (0, padding))[None]
    places = np.pad(np.arange(len(tokens), dtype=np.int32), (0, padding), constant_values=-1)[None]
    return np.asarray(run(model.params, rows, places)[0, len(tokens) - 1])

  return after


# Folders.


@pytest.mark.parametrize('kind', ['smollm2', 'qwen2'])
def test_shards_are_read_like_one_file(tmp_path, kind):
  theirs = tiny_llamas.build(kind)
  theirs.save_pretrained(tmp_path, max_shard_size='30KB')
  tiny_llamas.tokenizer().save(str(tmp_path / 'tokenizer.json'))
  assert not (tmp_path / 'model.safetensors').exists()
  result = reference.names.to_tensors(Language.load(tmp_path).params)
  expected = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
  assert result.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(result[name], array)


@pytest.mark.parametrize('kind', list(tiny_llamas.CONFIGS))
def test_transformers_reads_what_is_written(tmp_path, kind, rng):
  theirs = tiny_llamas.build(kind)
  theirs.save_pretrained(tmp_path / 'a')
  tiny_llamas.tokenizer().save(str(tmp_path / 'a' / 'tokenizer.json'))
  write_language(read_language(tmp_path / 'a'), tmp_path / 'b')
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'b', attn_implementation='eager'
  )
  tokens = torch.from_numpy(rng.integers(0, tiny_llamas.VOCABULARY, (2, 20)))
  with torch.no_grad():
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
  for file in ('tokenizer.json', 'generation_config.json'):
    assert (tmp_path / 'b' / file).read_bytes() == (tmp_path / 'a' / file).read_bytes()


def test_half_precision_is_written_as_such(saved, tmp_path):
  write_language(read_language(saved), tmp_path / 'b', 'bfloat16')
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b', dtype='auto')
  assert again.dtype == torch.bfloat16


def test_tied_heads_and_old_buffers_are_left_out(tmp_path):
  tiny_llamas.write(tmp_path, 'smollm2')
  tensors = load_file(tmp_path / 'model.safetensors')
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
  save_file(tensors, tmp_path / 'model.safetensors')
  names = set(read_language(tmp_path).tensors)
  assert names == tensors.keys() - {
    'lm_head.weight',
    'model.layers.0.self_attn.rotary_emb.inv_freq',
  }
  Language.load(tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop('lm_head.weight'), 'lacks 1 tensor: lm_head.weight'),
    (lambda t: t.update(extra=t['model.norm.weight']), 'has unknown 1 tensor: extra'),
    (
      lambda t: t.update({'model.norm.weight': np.ones(7, np.float32)}),
      r'model.norm.weight is \(7,\) and should be \(48,\)',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
  tiny_llamas.write(tmp_path, 'qwen2')
  tensors = load_file(tmp_path / 'model.safetensors')
  change(tensors)
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(InputError, match=message):
    Language.load(tmp_path)


@pytest.mark.parametrize(
  ('file', 'content', 'message'),
  [
    ('config.json', None, r'has no config\.json'),
    ('tokenizer.json', None, r'tokenizer\.json: no such file; .*save_pretrained'),
    ('model.safetensors', None, r'has no weights; expected model\.safetensors or'),
    ('config.json', b'{', r'config\.json: not valid JSON'),
    ('config.json', b'{"model_type": "gpt2"}', r"config\.json: model_type='gpt2' is not"),
    ('tokenizer.json', b'{}', r'tokenizer\.json: cannot be read'),
    ('tokenizer.json', b'\xff', r'tokenizer\.json: cannot be read'),
    ('model.safetensors', b'short', r'model\.safetensors: damaged'),
  ],
)
def test_files_that_are_missing_or_damaged_are_named(tmp_path, file, content, message):
  tiny_llamas.write(tmp_path)
  (tmp_path / file).unlink()
  if content is not None:
    (tmp_path / file).write_bytes(content)
  with pytest.raises(InputError, match=message):
    Language.load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
  tiny_llamas.write(tmp_path, vocab_size=tiny_llamas.VOCABULARY - 1)
  with pytest.raises(InputError, match=r'has 320 tokens, but the model has 319'):
    Language.load(tmp_path)


def test_only_a_language_model_is_overwritten(saved, tmp_path):
  checkpoint = read_language(saved)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes.txt').write_text('mine')
  with pytest.raises(InputError, match='already exists'):
    write_language(checkpoint, tmp_path / 'mine')
  with pytest.raises(InputError, match='not a language model'):
    write_language(checkpoint, tmp_path / 'mine', overwrite=True)
  write_language(checkpoint, tmp_path / 'free')
  write_language(checkpoint, tmp_path / 'free', overwrite=True)
  assert json.loads((tmp_path / 'free' / 'config.json').read_text())['model_type'] == 'llama'
  with pytest.raises(InputError, match=r'free/none: no such folder'):
    read_language(tmp_path / 'free' / 'none')


# Texts.


def test_temperature_0_is_greedy_search_of_transformers(saved, model):
  result = texts(model, temperature=0, max_tokens=37, slots=2)
  assert [completion.index for completion in result] == list(range(len(PROMPTS)))
  for prompt, completion in zip(PROMPTS, result, strict=True):
    ids = torch.tensor([model.tokenizer.encode(prompt).ids])
    theirs = tiny_llamas.build('llama3').generate(
      ids, max_new_tokens=37, do_sample=False, pad_token_id=0
    )
    assert completion.tokens == tuple(theirs[0, ids.shape[1] :].tolist())
    is_ended = completion.tokens[-1] == 0
    assert completion.is_finished == is_ended
    assert completion.text == model.tokenizer.decode(completion.tokens)


def test_a_text_depends_on_its_prompt_and_seed_only(model):
  expected = {c.index: c for c in texts(model)}
  assert len({c.tokens for c in expected.values()}) == len(PROMPTS)
  for order, slots in (([5, 3, 1, 0, 2, 4], 4), ([2, 4], 2), ([3], 1), (list(range(6)) * 3, 8)):
    result = texts(model, [PROMPTS[i] for i in order], [SEEDS[i] for i in order], slots=slots)
    for i, completion in zip(order, result, strict=True):
      assert completion[1:] == expected[i][1:]


@pytest.mark.long
@pytest.mark.parametrize('kind', ['qwen2', 'smollm2'])  # the heads of smollm2 cannot be split
def test_many_devices_write_the_same_texts(kind, tmp_path, monkeypatch):
  changes = {'num_attention_heads': 8, 'num_key_value_heads': 4, 'hidden_size': 64}
  tiny_llamas.write(tmp_path, kind, **(changes if kind == 'qwen2' else {}))
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda: jax.devices()[:1])
    lone = Language.load(tmp_path)
  settings = {'temperature': 1.0, 'top_p': 0.95, 'frequency_penalty': 0.3, 'max_tokens': 30}
  prompts, seeds = PROMPTS * 3, range(3 * len(PROMPTS))
  expected = texts(lone, prompts, seeds, **settings)
  assert lone.mesh.size == 1
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(lone.params))
  full = sum(leaf.nbytes for leaf in jax.tree.leaves(lone.params) if leaf.ndim == 1)
  for split in (1, 4):
    model = Language.load(tmp_path, split=split)
    held = sharding.bytes_per_device(model.params, jax.tree.map(lambda x: x.sharding, model.params))
    assert total / split <= held <= full + (total - full) / split
    assert texts(model, prompts, seeds, **settings) == expected


def test_weights_use_the_fewest_devices_with_room():
  assert [sharding.fewest(15, memory, 8) for memory in (30, 29, 10, 7, 1)] == [1, 2, 4, 8, 8]
  assert sharding.fewest(15, float('inf'), 8) == 1
  with pytest.raises(InputError, match='over 3 of 8 devices; use a divisor of 8'):
    sharding.mesh_for(15, 3)


def test_all_64_bits_of_a_seed_matter(model):
  seeds = [0, 1, 2**31, 2**32, 2**63]
  assert len({c.tokens for c in texts(model, ['snow'] * 5, seeds)}) == 5


def test_a_longer_limit_only_goes_on(model):
  # Lengths that need a longer cache, and a row that is still short beside them.
  short, long = texts(model), texts(model, max_tokens=200)
  assert max(len(c.tokens) for c in long) > 150
  for few, many in zip(short, long, strict=True):
    assert many.tokens[: len(few.tokens)] == few.tokens


def test_the_frequency_penalty_counts_every_earlier_token(model, next_logits):
  prompt, penalty = PROMPTS[0], 1.5
  tokens = list(model.tokenizer.encode(prompt).ids)
  begin = len(tokens)
  for _ in range(24):
    counts = np.bincount(tokens[begin:], minlength=tiny_llamas.VOCABULARY)
    tokens.append(int((next_logits(tokens) - penalty * counts).argmax()))
  # A slot that another row has used before.
  result = texts(
    model,
    ['snow', prompt],
    [0, 0],
    temperature=0,
    frequency_penalty=penalty,
    max_tokens=24,
    slots=1,
  )
  expected = tokens[begin:]
  assert result[1].tokens == tuple(expected[: expected.index(0) + 1] if 0 in expected else expected)


def test_a_stop_is_found_across_tokens(endless):
  full = texts(endless, ['a rainbow'], [13], max_tokens=60)[0]
  stops = [full.text[begin : begin + 3] for begin in range(4, len(full.text) - 3)]
  stops = [stop for stop in stops if '\ufffd' not in stop][::5]  # no halves of characters
  lengths = set()
  for stop in stops:
    result = texts(endless, ['a rainbow'], [13], max_tokens=60, stop=stop)[0]
    assert result.is_finished
    assert result.text == full.text[: full.text.index(stop)]
    assert result.tokens == full.tokens[: len(result.tokens)]
    assert stop in endless.tokenizer.decode(result.tokens)
    assert stop not in endless.tokenizer.decode(result.tokens[:-1])
    lengths.add(len(result.tokens))
  assert len(stops) >= 5
  assert len({length % generate.STEPS for length in lengths}) > 2  # anywhere in the host's steps


def test_a_text_ends_at_any_end_token(model):
  full = texts(model, temperature=0, max_tokens=20)[0].tokens
  end = full[11]
  ends = (tiny_llamas.VOCABULARY - 1, end)
  ending = model._replace(config=dataclasses.replace(model.config, eos_token_id=ends))
  result = texts(ending, temperature=0, max_tokens=20)[0]
  assert result.is_finished
  assert result.tokens == full[: full.index(end) + 1]
  assert result.text == model.tokenizer.decode(result.tokens[:-1])


def test_end_tokens_of_the_generation_config_count(saved, tmp_path):
  write_language(read_language(saved), tmp_path / 'chat')
  (tmp_path / 'chat' / 'generation_config.json').write_text('{"eos_token_id": [5, 7]}')
  assert generate.Language.load(tmp_path / 'chat').config.eos_token_id == (5, 7)


def test_a_text_ends_where_the_context_does(endless):
  prompt = 'snow' * 120
  read = len(endless.tokenizer.encode(prompt).ids)
  result = texts(endless, [prompt], [0], max_tokens=1000)[0]
  assert len(result.tokens) == endless.config.max_position_embeddings - read
  assert not result.is_finished


def test_other_settings_run_the_same_program(model, caplog):
  settings = {'prompts': PROMPTS[:1], 'seeds': [0], 'max_tokens': 9}
  texts(model, **settings)
  with jax.log_compiles():
    texts(model, temperature=0, **settings)
    texts(model, temperature=0.3, top_p=0.9, frequency_penalty=0.1, **{**settings, 'seeds': [8]})
    texts(model, **{**settings, 'prompts': ['dragon'], 'stop': 'x', 'max_tokens': 21})
  assert not [record for record in caplog.records if 'Compiling' in record.getMessage()]


def test_drawing_follows_the_probabilities(rng):
  scores = np.float32(3 * rng.standard_normal((1, 300)))
  scores[0, 7:140] = -np.inf  # more than a block of impossible ones
  uniform = ((np.arange(4096) + 0.5) / 4096).astype(np.float32)
  result = program.draw(jnp.repeat(jnp.array(scores), 4096, 0), uniform)
  expected = np.exp(scores[0]) / np.exp(scores[0]).sum()
  np.testing.assert_allclose(np.bincount(result, minlength=300) / 4096, expected, atol=2 / 4096)
  assert np.all(np.diff(result) >= 0)


def test_impossible_tokens_are_never_drawn(rng):
  scores = np.full((4, 300), -np.inf, np.float32)
  scores[np.arange(4), [0, 127, 128, 299]] = [1, -50, 80, 0]
  for uniform in (0.0, 0.5, 1 - 2**-24):
    result = program.draw(scores, np.full(4, uniform, np.float32))
    np.testing.assert_array_equal(result, [0, 127, 128, 299])


@pytest.mark.parametrize('top_p', [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_tokens_that_transformers_keeps(rng, top_p):
  scores = np.float32(2 * rng.standard_normal((5, 200)))
  warper = transformers.TopPLogitsWarper(top_p)
  theirs = torch.isfinite(warper(None, torch.from_numpy(scores))).numpy()
  result = np.asarray(program.nucleus(jnp.array(scores), jnp.float32(top_p)))
  np.testing.assert_array_equal(np.isfinite(result), theirs)
  np.testing.assert_array_equal(result[theirs], scores[theirs])


def test_temperature_divides_the_logits(model, next_logits):
  prompt, draws = 'snow', 2000
  ids = model.tokenizer.encode(prompt).ids
  result = texts(model, [prompt] * draws, range(draws), temperature=0.6, max_tokens=1, slots=64)
  expected = np.array(jax.nn.softmax(next_logits(ids) / 0.6), np.float64)
  counts = np.bincount([c.tokens[0] for c in result], minlength=len(expected))
  # Chi-squared over tokens that are expected more than 5 times; it is about their number.
  often = expected * draws > 5
  statistic = (np.square(counts - draws * expected) / (draws * expected))[often].sum()
  assert often.sum() > 10
  assert statistic < often.sum() + 4 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'temperature': -1}, 'temperature is -1; it has to be 0 or more'),
    ({'temperature': float('nan')}, 'temperature is nan'),
    ({'top_p': 0}, 'top_p is 0; it has to be above 0 and at most 1'),
    ({'frequency_penalty': 3}, 'frequency_penalty is 3'),
    ({'max_tokens': 0}, 'max_tokens is 0'),
    ({'slots': 0}, 'slots is 0'),
    ({'stop': ''}, 'stop is empty'),
    ({'seeds': [1]}, 'seeds: 1 for 2 prompts'),
    ({'seeds': [1, -1]}, 'seeds: each has to be'),
    ({'prompts': ['a', '']}, "prompt 1 is empty: ''"),
    (
      {'prompts': ['a', 'snow' * 300]},
      'prompt 1 has .* tokens, and the model reads fewer than 256',
    ),
  ],
)
def test_wrong_arguments_are_refused_at_once(model, change, message):
  arguments = {'prompts': ['a', 'b'], 'seeds': [1, 2], **change}
  with pytest.raises(InputError, match=message):
    write(model, arguments.pop('prompts'), **arguments)


def test_no_prompts_no_texts(model):
  assert list(write(model, [], seeds=[])) == []
