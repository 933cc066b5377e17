"""AdamW, schedules and the moving average, against PyTorch and closed forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import peers
import pytest

from ip2p_jax.config import OptimizerConfig
from ip2p_jax.errors import InputError
from ip2p_jax.training.optimizer import (
  adamw,
  check,
  ema_decay,
  ema_update,
  learning_rate,
  trainable,
)

torch = peers.module('torch')

SHAPES = {
  'conv_in.kernel': (3, 3, 4, 5),
  'conv_in.bias': (5,),
  'mid.attn1.to_q.kernel': (5, 7),
  'mid.norm.scale': (5,),
}
CONFIG = OptimizerConfig(
  learning_rate=3e-2,
  warmup_steps=2,
  rates=(('attn', 0.25), ('', 1.0)),
  decays=((r'\.(bias|scale)$', 0.0), ('', 0.3)),
)
STEPS = 3


def normal(rng, scale=1.0):
  return {name: rng.normal(0, scale, shape).astype(np.float32) for name, shape in SHAPES.items()}


def run(config, params, gradients):
  """Our parameters, moving average and state after a step per gradient, from one program."""
  transform = adamw(config, SHAPES, len(gradients))
  compiled = 0

  @jax.jit
  def step(params, ema, state, n, gradient):
    nonlocal compiled
    compiled += 1
    updates, state = transform.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return params, ema_update(ema, params, ema_decay(config.ema, n)), state

  ema, state = params, transform.init(params)
  for n, gradient in enumerate(gradients, 1):
    params, ema, state = step(params, ema, state, jnp.int32(n), gradient)
  assert compiled == 1
  return params, ema, state


def run_torch(config, params, gradients, rate_of_step):
  """The same with torch.optim.AdamW, a group per parameter, and the original's LitEma."""
  tensors = {name: torch.tensor(array).requires_grad_() for name, array in params.items()}
  shadow = {name: torch.tensor(array) for name, array in params.items()}
  groups = [
    {'params': [tensor], 'weight_decay': 0.0 if name.endswith(('bias', 'scale')) else 0.3}
    for name, tensor in tensors.items()
  ]
  adam = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=config.eps)
  for n, gradient in enumerate(gradients):
    for group, (name, tensor) in zip(adam.param_groups, tensors.items(), strict=True):
      group['lr'] = rate_of_step(n) * (0.25 if 'attn' in name else 1.0)
      tensor.grad = torch.tensor(gradient[name])
    if config.clip_norm:
      torch.nn.utils.clip_grad_norm_(tensors.values(), config.clip_norm)
    adam.step()
    num_updates = n + 1  # counted before it is used
    decay = min(config.ema, (1 + num_updates) / (10 + num_updates))
    for name, tensor in tensors.items():
      shadow[name] -= (1 - decay) * (shadow[name] - tensor.detach())
  return tensors, shadow


def largest_error(ours, theirs):
  """Of any parameter, relative to its norm."""
  return max(
    np.linalg.norm(np.asarray(ours[name]) - theirs[name].detach().numpy())
    / np.linalg.norm(theirs[name].detach().numpy())
    for name in theirs
  )


def moved(after, before):
  """How far parameters went, in double precision."""
  as_double = {name: torch.tensor(np.asarray(array)).double() for name, array in before.items()}
  if isinstance(next(iter(after.values())), torch.Tensor):
    return {name: after[name].detach().double() - as_double[name] for name in after}
  return {name: np.asarray(after[name], np.float64) - as_double[name].numpy() for name in after}


@pytest.mark.parametrize('clip_norm', [0.0, 0.5])
def test_three_steps_and_the_average_equal_pytorchs(clip_norm, rng):
  config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
  params, gradients = normal(rng), [normal(rng, scale) for scale in (1.0, 0.01, 3.0)]
  ours, ema, _ = run(config, params, gradients)
  theirs, shadow = run_torch(config, params, gradients, lambda n: 3e-2 * min((n + 1) / 2, 1))
  assert largest_error(ours, theirs) <= 1e-6
  assert largest_error(ema, shadow) <= 1e-6
  # Three steps move parameters by a few percent; so the way they went, too.
  assert largest_error(moved(ours, params), moved(theirs, params)) <= 3e-5
  assert largest_error(moved(ema, params), moved(shadow, params)) <= 3e-5


@pytest.mark.parametrize('norm', [0.1, 100.0])
def test_clipping_is_pytorchs(norm, rng):
  gradient = normal(rng)
  config = dataclasses.replace(CONFIG, clip_norm=norm)
  _, _, state = run(config, normal(rng), [gradient])
  tensors = [torch.zeros(shape, requires_grad=True) for shape in SHAPES.values()]
  for tensor, array in zip(tensors, gradient.values(), strict=True):
    tensor.grad = torch.tensor(array)
  torch.nn.utils.clip_grad_norm_(tensors, norm)
  clipped = {name: tensor.grad for name, tensor in zip(SHAPES, tensors, strict=True)}
  moments = {name: array / np.float32(0.1) for name, array in adam_state(state).mu.items()}
  assert largest_error(moments, clipped) <= 2e-5  # torch divides by the norm + 1e-6


def adam_state(state):
  return next(part for part in state if hasattr(part, 'mu'))


def test_bfloat16_gradients_are_worked_with_in_float32(rng):
  gradient = {name: array.astype(jnp.bfloat16) for name, array in normal(rng).items()}
  exact = {name: array.astype(np.float32) for name, array in gradient.items()}
  params = normal(rng)
  for ours, expected in zip(
    jax.tree.leaves(run(CONFIG, params, [gradient])),
    jax.tree.leaves(run(CONFIG, params, [exact])),
    strict=True,
  ):
    assert ours.dtype == expected.dtype != jnp.bfloat16
    np.testing.assert_array_equal(ours, expected)


def test_any_part_of_the_parameters_may_be_trained(rng):
  params = {'mid.attn1.to_q.kernel': normal(rng)['mid.attn1.to_q.kernel']}
  gradient = jax.tree.map(np.ones_like, params)
  ours, _, state = run(CONFIG, params, [gradient])
  assert ours.keys() == adam_state(state).mu.keys() == params.keys()


def test_the_warm_up_ends_at_the_full_rate():
  rate = learning_rate(OptimizerConfig(learning_rate=2e-4, warmup_steps=4), 100)
  np.testing.assert_allclose(
    [rate(step) for step in (0, 1, 3, 4, 99)], [5e-5, 1e-4, 2e-4, 2e-4, 2e-4], rtol=1e-6
  )


def test_without_warm_up_the_first_step_has_the_full_rate():
  for schedule in ('constant', 'cosine'):
    rate = learning_rate(OptimizerConfig(learning_rate=2e-4, schedule=schedule), 100)
    np.testing.assert_allclose(rate(0), 2e-4, rtol=1e-6)


def test_cosine_is_the_closed_form():
  config = OptimizerConfig(learning_rate=2e-4, schedule='cosine', warmup_steps=10, final_rate=0.1)
  rate = jax.jit(learning_rate(config, 60))
  for step in range(70):
    done = min(max(step - 10, 0), 50) / 50
    expected = 2e-5 + 1.8e-4 * (1 + math.cos(math.pi * done)) / 2
    expected *= min((step + 1) / 10, 1)
    np.testing.assert_allclose(rate(jnp.int32(step)), expected, rtol=2e-6)
  assert rate(jnp.int32(3)).dtype == jnp.float32


def test_the_decay_grows_from_two_elevenths_to_its_maximum():
  decays = [ema_decay(0.9999, step) for step in (1, 90, 10**6)]
  np.testing.assert_allclose(decays, [2 / 11, 91 / 100, 0.9999], rtol=1e-6)


def test_the_average_of_constant_parameters_is_constant(rng):
  params = normal(rng)
  ema = ema_update(params, params, ema_decay(0.9999, 7))
  for name in params:
    np.testing.assert_array_equal(ema[name], params[name])


def test_orbax_restores_the_state(tmp_path, rng):
  params = normal(rng)
  state = run(CONFIG, params, [normal(rng)])[2]
  counts = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  assert counts and all(leaf.dtype == jnp.int32 for leaf in counts)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    # A resumed run may clip where the first did not.
    transform = adamw(dataclasses.replace(CONFIG, clip_norm=1.0), SHAPES, STEPS)
    restored = checkpointer.restore(tmp_path / 'state', jax.eval_shape(transform.init, params))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_rate_of_zero_freezes():
  assert trainable(SHAPES, (('attn', 0.5), ('', 0.0))) == {'mid.attn1.to_q.kernel'}
  assert trainable(SHAPES, (('', 1.0),)) == set(SHAPES)


def test_decay_rules_for_frozen_parameters_are_no_typos(rng):
  config = dataclasses.replace(CONFIG, rates=(('attn', 1.0), ('', 0.0)))
  adamw(config, SHAPES, STEPS)


@pytest.mark.parametrize('rates, message', [
  ((('', 0.0),), 'nothing would learn'),
  ((('attn', -1.0), ('', 1.0)), 'mid.attn1.to_q.kernel gets -1.0'),
  ((('attn', math.nan), ('', 1.0)), 'gets nan'),
  ((('', 'high'),), "gets 'high'"),
  ((('attn', 1.0),), 'no rule matches parameter conv_in.kernel'),
  ((('atn', 1.0), ('', 1.0)), "rule 'atn' matches no parameter"),
])  # fmt: skip
def test_wrong_rates_are_named(rates, message):
  with pytest.raises(InputError, match=f'^optimizer.rates.*{message}'):
    trainable(SHAPES, rates)


@pytest.mark.parametrize('decays, message', [
  ((('', -0.1),), 'conv_in.kernel gets -0.1'),
  ((('atn', 1.0), ('', 1.0)), "rule 'atn' matches no parameter"),
  ((('bias', 1.0),), 'no rule matches parameter conv_in.kernel'),
])  # fmt: skip
def test_wrong_decays_are_named(decays, message):
  with pytest.raises(InputError, match=f'^optimizer.decays.*{message}'):
    adamw(dataclasses.replace(CONFIG, decays=decays), SHAPES, STEPS)


@pytest.mark.parametrize('knob, value', [
  ('learning_rate', -1e-4),
  ('learning_rate', math.nan),
  ('learning_rate', math.inf),
  ('schedule', 'linear'),
  ('warmup_steps', -1),
  ('final_rate', 1.5),
  ('b1', 1.0),
  ('b2', -0.1),
  ('eps', 0.0),
  ('clip_norm', -1.0),
  ('ema', 1.0),
  ('b2', 0.99999999),  # 1 in float32, by which Adam would divide by 0
  ('eps', 1e-50),
])  # fmt: skip
def test_a_knob_out_of_range_is_named(knob, value):
  with pytest.raises(InputError, match=f'^optimizer.{knob} is .*{value}'):
    adamw(dataclasses.replace(CONFIG, **{knob: value}), SHAPES, STEPS)


def test_the_defaults_are_in_range():
  check(OptimizerConfig())


def test_a_cosine_needs_steps_after_the_warm_up():
  config = OptimizerConfig(schedule='cosine', warmup_steps=100)
  with pytest.raises(InputError, match=r'optimizer\.warmup_steps is 100.*of 100 steps'):
    learning_rate(config, 100)
