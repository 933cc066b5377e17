"""Fine-tuning a language model: PyTorch's numbers, whole runs, and their files."""

import dataclasses
import functools
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import runs
import tiny_llamas
import torch_models as ref
from flax import nnx
from runs import assert_same, metrics, one_device

from ip2p_jax import parameters, sharding
from ip2p_jax.captions import triplets
from ip2p_jax.captions.generate import Language, write
from ip2p_jax.captions.step import Recipe, language_step, network, validation_loss
from ip2p_jax.captions.train import batches, split, tokenized, train_language
from ip2p_jax.captions.workdir import export_language, load_base, read
from ip2p_jax.cli.convert import convert_any
from ip2p_jax.config import (
  LanguageConfig,
  LanguageLogConfig,
  LoraConfig,
  MeshConfig,
  OptimizerConfig,
  TripletsConfig,
)
from ip2p_jax.errors import InputError
from ip2p_jax.models import lora
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.llama import Llama
from ip2p_jax.models.llama_config import LlamaConfig
from ip2p_jax.pipeline.checkpoints import read_part, saved_steps
from ip2p_jax.pipeline.workdir import read_config
from ip2p_jax.training import optimizer
from ip2p_jax.training.step import initial_state, jitted
from ip2p_jax.weights import names
from ip2p_jax.weights.language_folder import read_language

pytestmark = pytest.mark.usefixtures('kept_programs')

torch = peers.module('torch')
transformers = peers.module('transformers')

ROOT = Path(__file__).parents[2]
TARGETS = LanguageConfig().lora.targets
ROWS = [
  ('a photograph of a girl on a horse', 'make it a dragon', 'a photograph of a girl on a dragon'),
  ('mountains at sunset', 'add snow', 'mountains in snow at sunset'),
  ('a girl in a red dress', 'make it winter', 'a girl in a red dress in winter'),
  ('sunflowers in a vase', 'swap sunflowers with roses', 'roses in a vase'),
  ('the sky over a harbour', 'add a rainbow', 'a rainbow in the sky over a harbour'),
  ('a horse', 'turn the horse into a zebra', 'a zebra'),
  ('an old house', 'as an oil painting', 'an oil painting of an old house'),
  ('two dogs on a beach', 'have them wear hats', 'two dogs in hats on a beach'),
]  # fmt: skip


# One step, from weights and batches in memory.


@functools.cache
def torch_model(kind='llama3'):
  return tiny_llamas.build(kind)


def a_config(rank=0, optim=None, alpha=3.0, **settings) -> LanguageConfig:
  defaults = {'batch_size': 8, 'steps': 20, 'dtype': 'float32', 'remat': 'none'}
  return LanguageConfig(
    **defaults | settings,
    optimizer=OptimizerConfig(**{'learning_rate': 1e-3} | (optim or {})),
    lora=LoraConfig(rank=rank, alpha=alpha, targets=TARGETS) if rank else LanguageConfig().lora,
  )


def start(settings, kind='llama3'):
  """(recipe, state on one device, frozen)."""
  made = tiny_llamas.checkpoint(kind)
  llama_config = LlamaConfig.from_json(made.config)
  model_def, shapes = abstract(lambda keys: Llama(llama_config, rngs=keys))
  weights = parameters.flatten(names.to_params(made.tensors, shapes, 'language'))
  trained = weights
  if settings.lora.rank:
    trained = lora.adapters(weights, settings.lora, np.random.default_rng(0))
  transform = optimizer.adamw(settings.optimizer, trained, settings.steps)
  recipe = Recipe(model_def, settings, transform)
  frozen = {name: value for name, value in weights.items() if name not in trained}
  return recipe, initial_state(recipe, jax.device_put(trained)), frozen


def a_batch(size=8, length=24, seed=0) -> dict[str, np.ndarray]:
  """Rows of several lengths; the model learns to predict their last part."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, tiny_llamas.VOCABULARY, (size, length), np.int32)
  ends = rng.integers(length // 2, length + 1, (size, 1))
  prompts = rng.integers(1, length // 2, (size, 1))
  places = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
  return {
    'tokens': np.where(places < ends, tokens, 0),
    'positions': np.where(places < ends, places, -1),
    'weight': ((places >= prompts) & (places < ends)).astype(np.float32),
  }


def torch_loss(model, batch):
  """The loss of transformers: tokens that are not predicted have the label -100."""
  labels = np.where(batch['weight'] > 0, batch['tokens'], -100)
  as_torch = lambda x: torch.from_numpy(x.astype(np.int64))
  mask = as_torch(batch['positions'] >= 0)
  return model(as_torch(batch['tokens']), attention_mask=mask, labels=as_torch(labels)).loss


def our_loss(recipe):
  """A function: the mean loss and its gradients by the trained parameters."""

  def loss(params, frozen, batch):
    total, count = validation_loss(recipe, params, frozen, batch)
    return total / count

  return jax.jit(jax.value_and_grad(loss))


def run(settings, steps=1, mesh=None, kind='llama3', batch=None):
  """(state, metrics of every step); `mesh` has the devices."""
  mesh = mesh or devices(1)
  recipe, state, frozen = start(settings, kind)
  shardings = sharding.of_state(mesh, state, settings.mesh.zero1)
  step = jitted(recipe, mesh, shardings, language_step)
  state = jax.device_put(state, shardings)
  frozen = {
    name: jax.device_put(x, sharding.split(mesh, x.shape, ('fsdp',))) for name, x in frozen.items()
  }
  batch = jax.device_put(batch or a_batch(settings.batch_size), sharding.of_batch(mesh))
  history = []
  for _ in range(steps):
    state, metrics = step(state, frozen, batch)
    history.append(jax.device_get(metrics))
  assert step._cache_size() == 1, 'compiled more than once'
  return state, history


def devices(count, fsdp=1):
  return sharding.make_mesh(fsdp, jax.devices()[:count])


def losses(history):
  return np.array([metrics['loss'] for metrics in history])


@pytest.mark.long
@pytest.mark.parametrize('kind', list(tiny_llamas.CONFIGS))
def test_loss_and_every_gradient_are_those_of_transformers(kind):
  recipe, state, frozen = start(a_config(), kind)
  batch = a_batch()
  loss, grads = our_loss(recipe)(state['params'], frozen, batch)
  model = tiny_llamas.build(kind)
  theirs = torch_loss(model, batch)
  theirs.backward()
  assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
  ours = names.to_tensors(parameters.unflatten(jax.device_get(grads)))
  expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
  assert ours.keys() == expected.keys()
  for name in ours:
    assert ref.relative_error(ours[name], expected[name]) <= 1e-4, name


def test_three_steps_are_those_of_pytorchs_adamw():
  optim = {'learning_rate': 1e-3, 'clip_norm': 1.0, 'decays': (('', 0.01),)}
  state, history = run(a_config(optim=optim), steps=3)
  model, batch = tiny_llamas.build('llama3'), a_batch()
  adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
  for values in history:
    loss = torch_loss(model, batch)
    adamw.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    assert values['loss'] == pytest.approx(loss.item(), rel=1e-5)
    assert values['grad_norm'] == pytest.approx(norm.item(), rel=1e-4)
  ours = names.to_tensors(parameters.unflatten(jax.device_get(state['params'])))
  for name, parameter in model.named_parameters():
    assert ref.relative_error(ours[name], parameter.detach().numpy()) <= 1e-4, name


def test_only_the_completions_tokens_are_in_the_loss():
  recipe, state, frozen = start(a_config())
  batch = a_batch()
  mean, _ = our_loss(recipe)(state['params'], frozen, batch)
  with torch.no_grad():
    tokens = torch.from_numpy(batch['tokens']).long()
    mask = torch.from_numpy(batch['positions'] >= 0).long()
    logits = torch_model()(tokens, attention_mask=mask).logits.log_softmax(-1)
  each = -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].numpy()
  is_completion = batch['weight'][:, 1:] > 0
  assert float(mean) == pytest.approx(each[is_completion].mean(), rel=1e-5)
  assert abs(each[is_completion].mean() / each.mean() - 1) > 1e-3  # else it would prove nothing


def test_padding_changes_nothing():
  recipe, state, frozen = start(a_config())
  batch = a_batch()
  garbage = np.random.default_rng(1).integers(0, tiny_llamas.VOCABULARY, batch['tokens'].shape)
  padded = {
    'tokens': np.where(batch['positions'] < 0, garbage, batch['tokens']).astype(np.int32),
    'positions': np.pad(batch['positions'], ((0, 0), (0, 9)), constant_values=-1),
    'weight': np.pad(batch['weight'], ((0, 0), (0, 9))),
  }
  padded['tokens'] = np.pad(padded['tokens'], ((0, 0), (0, 9)))
  (loss, grads), (same, same_grads) = (
    our_loss(recipe)(state['params'], frozen, b) for b in (batch, padded)
  )
  assert float(loss) == pytest.approx(float(same), rel=1e-6)
  for name in grads:
    assert ref.relative_error(np.asarray(same_grads[name]), np.asarray(grads[name])) <= 1e-5, name


@pytest.mark.long
@pytest.mark.parametrize('rank', [0, 2], ids=['whole', 'lora'])
@pytest.mark.parametrize(
  'settings, mesh',
  [({}, (8, 1)), ({}, (8, 8)), ({'accumulation': 4}, None), ({'accumulation': 2}, (4, 2))],
  ids=['8 data', '8 fsdp', '4 parts', '2 x 2, 2 parts'],
)
def test_devices_and_accumulation_change_nothing(settings, mesh, rank):
  _, expected = run(a_config(rank), steps=10)
  _, result = run(a_config(rank, **settings), steps=10, mesh=mesh and devices(*mesh))
  assert losses(result)[0] == pytest.approx(losses(expected)[0], rel=1e-6)
  np.testing.assert_allclose(losses(result), losses(expected), rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize('remat', ['convdot', 'full'])
def test_remat_changes_nothing(remat):
  (state, _), (other, _) = (run(a_config(remat=kind)) for kind in ('none', remat))
  for name in state['params']:
    np.testing.assert_allclose(other['params'][name], state['params'][name], atol=1e-5)


def test_the_update_keeps_every_sharding():
  mesh = devices(8, 8)
  state, _ = run(a_config(), steps=2, mesh=mesh)
  sharding.check_placed(state, sharding.of_state(mesh, state, True))


def test_adapters_beside_layers_equal_merged_adapters():
  settings = a_config(rank=3)
  recipe, state, frozen = start(settings)
  rng = np.random.default_rng(1)
  adapters = {
    name: rng.normal(0, 0.2, x.shape).astype(np.float32) for name, x in state['params'].items()
  }
  batch = a_batch()
  apart = network(recipe, adapters, frozen)
  merged = lora.merged(frozen, adapters, settings.lora)
  merged_model = nnx.merge(recipe.model_def, parameters.unflatten(merged))
  logits = [
    np.asarray(model(jnp.asarray(batch['tokens']), jnp.asarray(batch['positions'])))
    for model in (apart, merged_model)
  ]
  is_token = batch['positions'] >= 0
  assert ref.relative_error(logits[0][is_token], logits[1][is_token]) <= 1e-5
  base = nnx.merge(recipe.model_def, parameters.unflatten(frozen))
  moved = np.asarray(base(jnp.asarray(batch['tokens']), jnp.asarray(batch['positions'])))
  assert ref.relative_error(moved[is_token], logits[1][is_token]) > 0.1


def test_lora_starts_at_the_base_and_trains_adapters_only():
  _, plain = run(a_config())
  state, history = run(a_config(rank=2, optim={'learning_rate': 1e-2}), steps=20)
  assert history[0]['loss'] == pytest.approx(plain[0]['loss'], rel=1e-6)
  assert history[-1]['loss'] < 0.9 * history[0]['loss']
  kernels = {name.rpartition('.')[0] for name in state['params']}
  assert len(state['params']) == 2 * len(kernels) == 2 * 7 * 2  # two arrays, seven of two layers
  assert all('.lora_' in name for name in state['params'])
  assert all('.lora_' in name for name in state['ema'])


def test_bfloat16_keeps_float32_masters_and_nearly_the_step():
  _, exact = run(a_config())
  state, history = run(a_config(dtype='bfloat16'))
  assert history[0]['loss'] == pytest.approx(exact[0]['loss'], rel=1e-2)
  assert history[0]['grad_norm'] == pytest.approx(exact[0]['grad_norm'], rel=5e-2)
  assert {str(x.dtype) for x in jax.tree.leaves([state['params'], state['ema']])} == {'float32'}


def test_a_batch_without_predicted_tokens_only_counts():
  recipe, state, frozen = start(a_config())
  mesh = devices(1)
  shardings = sharding.of_state(mesh, state, True)
  step = jitted(recipe, mesh, shardings, language_step)
  state, _ = step(jax.device_put(state, shardings), frozen, a_batch())
  empty = a_batch() | {'weight': np.zeros_like(a_batch()['weight'])}
  after, metrics = step(state, frozen, empty)
  assert metrics['weight'] == 0 and after['step'] == 2
  for name in ('params', 'ema'):
    for new, old in zip(jax.tree.leaves(after[name]), jax.tree.leaves(state[name]), strict=True):
      np.testing.assert_array_equal(new, old)


# Whole runs.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny model, `model`, and eight triplets, `triplets.jsonl`."""
  folder = tmp_path_factory.mktemp('language')
  tiny_llamas.write(folder / 'model', 'smollm2')
  lines = [dict(zip(('input', 'edit', 'output'), row, strict=True)) for row in ROWS]
  (folder / 'triplets.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return folder


def a_run(folder, log=None, data=None, **settings) -> LanguageConfig:
  """The config of a run on the eight triplets, two steps a pass."""
  log = {'every': 2, 'checkpoint_every': 2, 'validate_every': 0} | (log or {})
  data = {'path': str(folder / 'triplets.jsonl'), 'holdout': 0.0} | (data or {})
  settings = {'checkpoint': str(folder / 'model'), 'batch_size': 4, 'steps': 4} | settings
  return dataclasses.replace(
    a_config(**settings), data=TripletsConfig(**data), log=LanguageLogConfig(**log)
  )


def train(settings, workdir):
  return train_language(settings, str(workdir))


def weights_of(workdir, ema=False):
  tensors = read(workdir, ema).tensors
  return {name: np.array(tensors[name]) for name in tensors}


@pytest.fixture(scope='module')
def uninterrupted(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  with one_device():
    assert train(a_run(folder), workdir) == 0
  return workdir


def test_a_run_leaves_checkpoints_metrics_and_its_config(uninterrupted):
  assert saved_steps(uninterrupted) == [2, 4]
  lines = metrics(uninterrupted)
  assert list(lines) == [2, 4]
  assert {'loss', 'grad_norm', 'learning_rate', 'examples_per_second'} <= lines[4].keys()
  assert read_config(uninterrupted)['data']['holdout'] == 0
  assert not list(uninterrupted.rglob('*.tmp'))


@pytest.mark.long
@pytest.mark.parametrize('rank', [0, 2], ids=['whole', 'lora'])
def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path, rank, visible):
  train(a_run(folder, rank=rank), tmp_path / 'whole')
  train(a_run(folder, rank=rank, steps=2), tmp_path / 'parts')
  elsewhere = a_run(folder, rank=rank, checkpoint='/no/longer/there')
  train(elsewhere, tmp_path / 'parts')
  for ema in (False, True):
    assert_same(weights_of(tmp_path / 'parts', ema), weights_of(tmp_path / 'whole', ema))
  assert metrics(tmp_path / 'parts')[4]['loss'] == metrics(tmp_path / 'whole')[4]['loss']


def test_a_finished_run_says_so_and_does_nothing(folder, uninterrupted, visible, capsys):
  before = metrics(uninterrupted)
  assert train(a_run(folder), uninterrupted) == 0
  assert 'already at step 4 of 4' in capsys.readouterr().out
  assert metrics(uninterrupted) == before


def test_a_run_goes_on_on_other_devices(folder, uninterrupted, tmp_path, visible):
  train(a_run(folder, steps=2), tmp_path)
  visible(4)
  train(dataclasses.replace(a_run(folder), mesh=MeshConfig(fsdp=2)), tmp_path)
  ours, theirs = weights_of(tmp_path), weights_of(uninterrupted)
  for name in ours:
    np.testing.assert_allclose(ours[name], theirs[name], atol=2e-4, err_msg=name)


def test_every_pass_has_all_triplets_in_a_new_order(folder):
  checkpoint = read_language(folder / 'model')
  settings = a_run(folder)
  rows = tokenized(triplets.read(settings.data.path), checkpoint, settings)
  mesh = devices(1)

  def some(start, count, seed=0):
    seeded = dataclasses.replace(settings, seed=seed)
    made = batches(rows, seeded, mesh, start)
    return [np.asarray(next(made)['tokens']) for _ in range(count)]

  drawn = some(0, 4)
  for pair in (drawn[:2], drawn[2:]):  # a pass
    assert {row.tobytes() for row in np.concatenate(pair)} == {r.tobytes() for r in rows['tokens']}
  np.testing.assert_array_equal(some(3, 1)[0], drawn[3])
  assert any((a != b).any() for a, b in zip(some(0, 4, seed=1), drawn, strict=True))


def test_a_triplet_becomes_the_originals_format(folder):
  checkpoint = read_language(folder / 'model')
  settings = a_run(folder)
  rows = tokenized(triplets.read(settings.data.path), checkpoint, settings)
  assert rows['tokens'].shape[1] % 32 == 0
  tokenizer = tiny_llamas.tokenizer()
  for (caption, edit, output), tokens, positions, weight in zip(
    ROWS, rows['tokens'], rows['positions'], rows['weight'], strict=True
  ):
    count = (positions >= 0).sum()
    assert positions.tolist() == [*range(count), *[-1] * (len(positions) - count)]
    assert tokenizer.decode(tokens[weight > 0]) == f'{edit}\n%%\n{output}\nEND'
    is_prompt = (weight == 0) & (positions >= 0)
    assert tokenizer.decode(tokens[is_prompt]) == f'{caption}\n##\n'


def test_triplets_of_one_caption_are_on_one_side():
  there = [triplets.Triplet(f'a {i // 2}', 'make it b', f'b {i}') for i in range(20)]
  back = [triplets.Triplet(row.edited, 'undo it', row.caption) for row in there]
  learnt, held_out = split(there + back, 0.2)
  captions = [{text for row in rows for text in (row.caption, row.edited)}
              for rows in (learnt, held_out)]  # fmt: skip
  assert len(held_out) == 8 and len(learnt) == 32 and not captions[0] & captions[1]


def test_held_out_triplets_are_spread_and_only_validated(folder, tmp_path, visible, capsys):
  rows = [triplets.Triplet(f'a {i}', 'make it b', f'b {i}') for i in range(10)]
  learnt, held_out = split(rows, 0.2)
  assert held_out == [rows[4], rows[9]] and len(learnt) == 8
  settings = a_run(folder, data={'holdout': 0.25}, log={'validate_every': 2}, optim={'ema': 0.0})
  train(settings, tmp_path)
  assert '6 triplets, 2 held out' in capsys.readouterr().out
  model = tiny_llamas.build('smollm2')
  tensors = {name: torch.from_numpy(x) for name, x in weights_of(tmp_path).items()}
  model.load_state_dict(tensors, strict=False)  # all but the head, which is the embedding
  rows = [triplet for i, triplet in enumerate(triplets.read(settings.data.path)) if i in (3, 7)]
  checkpoint = read_language(folder / 'model')
  with torch.no_grad():
    expected = torch_loss(model, tokenized(rows, checkpoint, settings))
  assert metrics(tmp_path)[4]['validation_loss'] == pytest.approx(expected.item(), rel=1e-4)


def test_transformers_reads_the_exported_model(folder, uninterrupted, tmp_path):
  messages = []
  convert_any(uninterrupted, tmp_path / 'out', say=messages.append)
  assert 'step 4' in messages[-1]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', dtype='float32')
  average = weights_of(uninterrupted, ema=True)
  result = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
  assert_same(average, result)
  assert any((x != result[name]).any() for name, x in weights_of(uninterrupted).items())
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert tokenizer.decode(tokenizer('a girl\n##\n')['input_ids']) == 'a girl\n##\n'
  convert_any(uninterrupted, tmp_path / 'half', dtype='bfloat16', ema=False, say=messages.append)
  half = read_language(tmp_path / 'half').tensors
  live = weights_of(uninterrupted)
  assert_same({name: x.astype(jnp.bfloat16) for name, x in live.items()}, dict(half))


def test_lora_exports_merged_weights(folder, tmp_path, visible):
  settings = a_run(folder, rank=2, optim={'learning_rate': 1e-2})
  train(settings, tmp_path / 'run')
  export_language(tmp_path / 'run', tmp_path / 'out', use_ema=False)
  exported = read_language(tmp_path / 'out').tensors
  start = read_language(folder / 'model').tensors
  moved = {name for name in start if (exported[name] != start[name]).any()}
  assert moved and all('_proj.weight' in name for name in moved)
  _, adapters = read_part(tmp_path / 'run', 'params')
  down, up = (adapters[f'model.layers.1.mlp.up_proj.lora_{half}'] for half in ('down', 'up'))
  name = 'model.layers.1.mlp.up_proj.weight'
  np.testing.assert_allclose(
    exported[name], start[name] + 3.0 / 2 * (down @ up).T, rtol=1e-5, atol=1e-6
  )


def test_a_base_in_bfloat16_is_saved_unchanged(folder, tmp_path, visible):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder / 'model', dtype=torch.bfloat16)
  model.save_pretrained(tmp_path / 'model')
  tiny_llamas.tokenizer().save(str(tmp_path / 'model' / 'tokenizer.json'))
  half = a_run(folder, checkpoint=str(tmp_path / 'model'), rank=2, steps=1, dtype='bfloat16')
  train(half, tmp_path / 'run')
  start = read_language(tmp_path / 'model').tensors
  saved = load_base(tmp_path / 'run').tensors
  assert all(saved[name].dtype == jnp.bfloat16 for name in saved)
  assert_same(dict(saved), dict(start))


@pytest.mark.long
def test_a_model_memorizes_its_triplets(folder, tmp_path, visible):
  torch.manual_seed(0)
  sizes = tiny_llamas.SIZES | {'hidden_size': 96, 'intermediate_size': 192}
  shape = transformers.AutoConfig.for_model(**sizes, **tiny_llamas.CONFIGS['qwen2'])
  transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / 'model')
  tiny_llamas.tokenizer().save(str(tmp_path / 'model' / 'tokenizer.json'))
  optim = {'learning_rate': 5e-3, 'warmup_steps': 20, 'schedule': 'cosine', 'ema': 0.9}
  settings = a_run(
    folder, optim=optim, checkpoint=str(tmp_path / 'model'), batch_size=8, steps=300,
    log={'every': 100, 'checkpoint_every': 300},
  )  # fmt: skip
  train(settings, tmp_path / 'run')
  assert metrics(tmp_path / 'run')[300]['loss'] < 0.05
  learnt = Language.of(read(tmp_path / 'run'))
  prompts = [triplets.prompt(caption) for caption, _, _ in ROWS]
  written = list(write(learnt, prompts, seeds=[0] * len(ROWS), temperature=0.0, max_tokens=120))
  assert all(completion.is_finished for completion in written)
  result = {completion.index: triplets.parse(completion.text) for completion in written}
  assert result == {i: (edit, output) for i, (_, edit, output) in enumerate(ROWS)}


def test_a_non_finite_loss_stops_the_run_with_the_old_state(folder, tmp_path, visible):
  wild = a_run(folder, optim={'learning_rate': 1e38}, steps=10, log={'every': 10})
  with pytest.raises(InputError, match='the loss or a gradient is not finite'):
    train(wild, tmp_path)
  (step,) = saved_steps(tmp_path)
  assert step < 10
  with pytest.raises(InputError, match=f'step {step + 1}: the loss'):  # takes that very step first
    train(wild, tmp_path)


def test_a_diverged_run_resumes_from_the_last_good_checkpoint(folder, tmp_path, visible):
  at_rate = lambda rate, steps: a_run(
    folder,
    optim={'learning_rate': rate},
    steps=steps,
    log={'every': 1, 'checkpoint_every': 1, 'keep': 1},
  )
  train(at_rate(1e-3, 3), tmp_path)
  with pytest.raises(InputError, match=r'remove 4 from .*/checkpoints to go on from step 3,'):
    train(at_rate(1e38, 10), tmp_path)
  assert saved_steps(tmp_path) == [3, 4]
  with pytest.raises(InputError, match='remove 4 from'):  # a lower rate does not repair the weights
    train(at_rate(1e-3, 5), tmp_path)
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  assert train(at_rate(1e-3, 5), tmp_path) == 0
  assert metrics(tmp_path)[5]['loss'] < 2 * metrics(tmp_path)[1]['loss']


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'checkpoint': '/no/such'}, '/no/such: no such folder'),
    ({'checkpoint': ''}, 'checkpoint is empty'),
    ({'data': {'path': '/no/such.jsonl'}}, '/no/such.jsonl: no such file'),
    ({'data': {'path': ''}}, 'data.path is empty'),
    ({'data': {'holdout': 1.0}}, 'data.holdout is 1.0; use 0 to below 1'),
    ({'data': {'max_tokens': 30}}, "the triplet of 'a photograph.*takes .* tokens, more than 30"),
    ({'batch_size': 5, 'accumulation': 2}, 'batch_size is 5'),
    ({'remat': 'some'}, 'remat is .some.; use one of none, convdot, full'),
    ({'optim': {'rates': (('atn', 1.0), ('', 0.0))}}, 'optimizer.rates'),
    ({'steps': 0}, 'steps is 0; use 1 or more'),
    ({'rank': 2, 'alpha': 0.0}, 'lora.alpha is 0.0'),
  ],
)
def test_mistakes_are_one_sentence_and_leave_nothing_behind(
  folder, tmp_path, visible, settings, message
):
  with pytest.raises(InputError, match=message):
    train(a_run(folder, **settings), tmp_path / 'run')
  assert not list((tmp_path / 'run').rglob('*.json*'))


def test_settings_that_saved_weights_depend_on_are_fixed(folder, tmp_path, visible):
  train(a_run(folder, rank=2, steps=1), tmp_path)
  with pytest.raises(InputError, match=r'lora\.alpha was 3'):
    train(a_run(folder, rank=2, alpha=30.0, steps=2), tmp_path)
  with pytest.raises(InputError, match=r'lora\.rank'):
    train(a_run(folder, rank=0, steps=2), tmp_path)
  with pytest.raises(InputError, match='leave out to='):
    convert_any(tmp_path, tmp_path / 'out', 'diffusers')


def command(folder, workdir, **settings):
  flags = {'checkpoint': folder / 'model', 'data.path': folder / 'triplets.jsonl', 'batch_size': 4,
           'dtype': 'float32', 'log.every': 1} | settings  # fmt: skip
  return runs.command('captions.py', workdir, **flags)


@pytest.mark.long
def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(folder, tmp_path):
  argv = command(folder, tmp_path, steps=100_000, **{'log.checkpoint_every': 10**6})
  output = runs.stopped_by_sigterm(argv, runs.environment(folder))
  assert 'and saved; run the same command to go on' in output
  (step,) = saved_steps(tmp_path)
  assert step >= 3
  done = subprocess.run(
    command(folder, tmp_path, steps=step + 10), env=runs.environment(folder), capture_output=True
  )
  assert done.returncode == 0 and saved_steps(tmp_path)[-1] == step + 10


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(folder, tmp_path):
  settings = {'steps': 120, 'log.checkpoint_every': 4, 'log.keep': 2}
  argv = lambda name: command(folder, tmp_path / name, **settings)
  env = runs.environment(folder, devices=2)
  subprocess.run(argv('whole'), env=env, check=True, capture_output=True)
  runs.kill_often(argv('killed'), env, times=6)
  subprocess.run(argv('killed'), env=env, check=True, capture_output=True)
  for ema in (False, True):
    assert_same(weights_of(tmp_path / 'killed', ema), weights_of(tmp_path / 'whole', ema))
