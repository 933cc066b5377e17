"""One optimizer step: PyTorch's numbers, for any number of devices and parts."""

import functools
import math

import jax
import numpy as np
import peers
import pytest
import tiny_training as tiny
import torch_models as ref
from torch_losses import torch_losses

from ip2p_jax import parameters, sharding
from ip2p_jax.training import loss
from ip2p_jax.training.step import jitted, losses_at, validation_loss
from ip2p_jax.weights import names

torch = peers.module('torch')

STEPS = {}


def run(config, steps=1, mesh=None, batch=None):
  """(state, metrics of every step); `mesh` has the devices."""
  mesh = mesh or devices(1)
  step, state, frozen = start(config, mesh)
  batch = jax.device_put(batch or tiny.batch(config.batch_size), sharding.of_batch(mesh))
  history = []
  for _ in range(steps):
    state, metrics = step(state, frozen, batch)
    history.append(jax.device_get(metrics))
  assert step._cache_size() == 1, 'compiled more than once'
  return state, history


def start(config, mesh):
  """The jitted step (one per config and mesh), the state and the frozen parameters on the mesh."""
  recipe, state, frozen = tiny.start(config)
  shardings = sharding.of_state(mesh, state, config.mesh.zero1)
  key = repr(config), mesh
  STEPS[key] = STEPS.get(key) or jitted(recipe, mesh, shardings)
  frozen = jax.device_put(frozen, sharding.replicated(mesh))
  return STEPS[key], jax.device_put(state, shardings), frozen


def devices(count, fsdp=1):
  return sharding.make_mesh(fsdp, jax.devices()[:count])


@pytest.fixture(scope='module')
def one_device():
  return run(tiny.config(), steps=20)


def losses(history):
  return np.array([metrics['loss'] for metrics in history])


@pytest.mark.long
def test_three_steps_equal_pytorchs_adamw_and_the_originals_average():
  errors = errors_of_three_steps()
  assert errors['loss'] < 1e-5 and errors['gradient norm'] < 1e-4
  assert errors['parameters'] < 1e-4 and errors['average'] < 1e-4
  assert errors['way walked'] < 2e-3  # of the steps themselves, small beside the weights


def errors_of_three_steps():
  """Relative errors against a torch loop with AdamW and the original's rule for the average."""
  state, history = run(tiny.config(), steps=3)
  models, batch = ref.models_of(tiny.checkpoint()), tiny.batch()
  unet = models['unet']
  adamw = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=0.01)
  average = {name: p.detach().clone() for name, p in unet.named_parameters()}
  errors = {'loss': 0.0, 'gradient norm': 0.0}
  for n in range(1, 4):
    shape = (tiny.LATENT_SIDE, tiny.LATENT_SIDE, 4)
    draws = loss.draw(0, n - 1, batch['index'], shape, tiny.networks().schedule)
    theirs = torch_losses(models, batch, draws).mean()
    adamw.zero_grad()
    theirs.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in unet.parameters()))
    adamw.step()
    decay = min(0.9999, (1 + n) / (10 + n))
    for name, p in unet.named_parameters():
      average[name] = decay * average[name] + (1 - decay) * p.detach()
    for name, key, value in (('loss', 'loss', theirs.item()), ('gradient norm', 'grad_norm', norm)):
      errors[name] = max(errors[name], abs(history[n - 1][key] / value - 1))

  start = tiny.checkpoint().tensors['unet']
  to_tensors = lambda part: names.to_tensors(parameters.unflatten(state[part]))
  after = ref.tensors(unet)
  worst = lambda ours, theirs: max(
    ref.relative_error(ours[name], np.asarray(theirs[name])) for name in start
  )
  moved = lambda tensors: np.concatenate([(tensors[n] - start[n]).ravel() for n in sorted(start)])
  return errors | {
    'parameters': worst(to_tensors('params'), after),
    'average': worst(to_tensors('ema'), average),
    'way walked': ref.relative_error(moved(to_tensors('params')), moved(after)),
  }


@pytest.mark.long
@pytest.mark.parametrize(
  'settings, mesh',
  [
    ({}, (8, 1)),
    ({}, (8, 8)),
    ({'accumulation': 4}, None),
    ({'accumulation': 2}, (4, 2)),
  ],
  ids=['8 data', '8 fsdp', '4 parts', '2 x 2, 2 parts'],
)
def test_devices_and_accumulation_change_nothing(one_device, settings, mesh):
  _, expected = one_device
  _, history = run(tiny.config(**settings), steps=20, mesh=mesh and devices(*mesh))
  assert losses(history)[0] == pytest.approx(losses(expected)[0], rel=1e-6)
  np.testing.assert_allclose(losses(history), losses(expected), rtol=1e-4)


def test_the_state_is_sharded_as_configured():
  def held(fsdp, zero1):
    mesh = devices(8, fsdp)
    _, state, _ = tiny.start(tiny.config())
    shardings = sharding.of_state(mesh, state, zero1)
    part = lambda name: sharding.bytes_per_device(state[name], shardings[name])
    total = sharding.bytes_per_device(
      state['params'], jax.tree.map(lambda _: sharding.replicated(mesh), state['params'])
    )
    return part('params') / total, part('ema') / total, part('opt_state') / total

  eighth = pytest.approx(0.3, abs=0.01)  # not 0.125: small parameters, here a fifth, stay whole
  assert held(fsdp=1, zero1=False) == (1, 1, pytest.approx(2, abs=1e-3))
  params, ema, moments = held(fsdp=1, zero1=True)
  assert params == 1 and ema == eighth and moments / 2 == eighth
  params, ema, moments = held(fsdp=8, zero1=True)
  assert params == eighth and ema == eighth and moments / 2 == eighth


def test_the_update_keeps_every_sharding():
  mesh = devices(8, 8)
  state, _ = run(tiny.config(), steps=2, mesh=mesh)
  expected = sharding.of_state(mesh, state, True)
  wrong = [
    jax.tree_util.keystr(path)
    for (path, leaf), want in zip(
      jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    )
    if not leaf.sharding.is_equivalent_to(want, leaf.ndim)
  ]
  assert not wrong


def test_a_non_finite_loss_only_records_its_step():
  step, state, frozen = start(tiny.config(), devices(1))
  fine = jax.device_put(tiny.batch(), sharding.of_batch(devices(1)))
  state, _ = step(state, frozen, fine)
  before = jax.device_get(state)
  poisoned = fine | {'weight': fine['weight'].at[0].set(np.nan)}
  state, metrics = step(state, frozen, poisoned)
  later, _ = step(state, frozen, fine)
  assert metrics['bad_step'] == 1 and not np.isfinite(metrics['loss'])
  assert later['bad_step'] == 1 and later['step'] == 1
  for name in ('params', 'ema', 'opt_state'):
    for new, old in zip(jax.tree.leaves(later[name]), jax.tree.leaves(before[name]), strict=True):
      np.testing.assert_array_equal(new, old)


@pytest.mark.long
def test_a_batch_of_broken_examples_only_counts():
  config = tiny.config(optim={'warmup_steps': 10, 'decays': (('', 0.5),)})
  step, state, frozen = start(config, devices(1))
  fine = jax.device_put(tiny.batch(), sharding.of_batch(devices(1)))
  empty = fine | {'weight': fine['weight'] * 0}
  state, first = step(state, frozen, fine)
  after, values = step(state, frozen, empty)
  assert first['weight'] == 8 and values['weight'] == 0 and values['bad_step'] == -1
  assert after['step'] == 2 and after['skipped'] == 8
  adam = lambda state: next(part for part in state['opt_state'] if hasattr(part, 'mu'))
  trees = lambda state: (state['params'], state['ema'], adam(state))
  for new, old in zip(jax.tree.leaves(trees(after)), jax.tree.leaves(trees(state)), strict=True):
    np.testing.assert_array_equal(new, old)
  # The schedule goes on, so that the rate that is logged is the one that is used.
  _, later = step(after, frozen, fine)
  assert later['learning_rate'] == pytest.approx(3e-5)
  assert jax.tree.leaves(after['opt_state'][-1]) == [2]


def test_a_broken_example_is_left_out_and_counted():
  batch = tiny.batch()
  batch['weight'][3] = 0
  garbage = batch | {'edited_mean': batch['edited_mean'].copy()}
  garbage['edited_mean'][3] = 0
  (one, first), (other, second) = (run(tiny.config(), batch=b) for b in (batch, garbage))
  assert first[0]['loss'] == second[0]['loss'] and first[0]['skipped'] == 1
  for a, b in zip(jax.tree.leaves(one['params']), jax.tree.leaves(other['params']), strict=True):
    np.testing.assert_array_equal(a, b)

  recipe, state, frozen = tiny.start(tiny.config())
  each, _ = jax.jit(functools.partial(losses_at, recipe))(state, frozen, batch)
  assert first[0]['loss'] == pytest.approx(np.delete(np.asarray(each), 3).mean(), rel=1e-5)


def test_frozen_parameters_are_not_in_the_state():
  _, state, frozen = tiny.start(tiny.config(optim={'rates': ((r'attn', 1.0), ('', 0.0))}))
  for part in ('params', 'ema'):
    assert state[part] and all('attn' in name for name in state[part])
  assert frozen['unet'] and not any('attn' in name for name in frozen['unet'])


@pytest.mark.long
def test_lora_starts_at_the_base_and_trains_adapters_only():
  config = tiny.config(rank=2, optim={'learning_rate': 1e-2})
  _, plain = run(tiny.config())
  recipe, state, frozen = tiny.start(config)
  validate = jax.jit(functools.partial(validation_loss, recipe))
  before, _ = validate(state['params'], frozen, tiny.batch())
  state, history = run(config, steps=20)
  after, _ = validate(state['params'], frozen, tiny.batch())
  assert history[0]['loss'] == pytest.approx(plain[0]['loss'], rel=1e-5)
  assert all('lora' in name for name in state['params'])
  assert after < 0.98 * before


@pytest.mark.long
def test_losses_in_parts_equal_losses_of_the_batch():
  results = []
  for accumulation in (1, 2):
    recipe, state, frozen = tiny.start(tiny.config(accumulation=accumulation))
    look = jax.jit(functools.partial(losses_at, recipe))
    results.append(look(state, frozen, tiny.batch()))
  for one, other in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.long
def test_bfloat16_keeps_float32_masters_and_nearly_the_step():
  _, exact = run(tiny.config())
  state, history = run(tiny.config(dtype='bfloat16'))
  assert history[0]['loss'] == pytest.approx(exact[0]['loss'], rel=1e-2)
  assert history[0]['grad_norm'] == pytest.approx(exact[0]['grad_norm'], rel=2e-2)
  assert {str(x.dtype) for x in jax.tree.leaves([state['params'], state['ema']])} == {'float32'}


@pytest.mark.long
def test_it_learns():
  """Twenty steps on the same images, at a high rate."""
  config = tiny.config(optim={'learning_rate': 3e-3})
  recipe, state, frozen = tiny.start(config)
  validate = jax.jit(functools.partial(validation_loss, recipe))
  before, count = validate(state['params'], frozen, tiny.batch())
  state, _ = run(config, steps=20)
  after, _ = validate(state['params'], frozen, tiny.batch())
  assert count == 8 and after < 0.8 * before


def test_validation_is_the_same_for_any_batches():
  recipe, state, frozen = tiny.start(tiny.config())
  loss_of = jax.jit(functools.partial(validation_loss, recipe))
  validate = functools.partial(loss_of, state['params'], frozen)
  batch = tiny.batch()
  total, count = map(float, validate(batch))
  again, _ = map(float, validate(batch))
  halves = [
    validate({name: value[part] for name, value in batch.items()})
    for part in (slice(0, 4), slice(4, 8))
  ]
  assert total == again
  assert sum(float(part) for part, _ in halves) == pytest.approx(total, rel=1e-5)
  assert sum(float(n) for _, n in halves) == count == 8


def test_on_a_cpu_the_old_state_stays():
  step, state, frozen = start(tiny.config(), devices(1))
  step(state, frozen, jax.device_put(tiny.batch(), sharding.of_batch(devices(1))))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
