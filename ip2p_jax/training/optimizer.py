"""AdamW and the moving average, over a flat dict of parameters.

`params`, gradients, moments and the average are {dotted name: float32 array}. A parameter's name
decides its weight decay and its learning rate (`config.OptimizerConfig`).
"""

import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ip2p_jax.config import OptimizerConfig, Rules
from ip2p_jax.errors import InputError, check_choice
from ip2p_jax.parameters import check_order, check_rules, first_match

SCHEDULES = ('constant', 'cosine')


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Array | int], Array]:
  """The learning rate of each step, as a function of the steps taken before it (from 0).

  In a warm-up of w steps it is learning_rate * (step + 1) / w, so that no step has rate 0 and step
  w - 1 has the full rate. After it, 'cosine' goes from learning_rate at step w to final_rate *
  learning_rate at `steps`, one step after the last (Loshchilov and Hutter 2017, equation 5). The
  function maps scalars to float32 scalars, also under jit.

  Args:
    steps: optimizer steps of the whole run.

  Raises:
    InputError: a setting has a wrong value.
  """
  check(config)
  warmup = config.warmup_steps
  if config.schedule == 'constant':
    after_warmup = optax.constant_schedule(config.learning_rate)
  elif warmup < steps:
    after_warmup = optax.cosine_decay_schedule(
      config.learning_rate, steps - warmup, config.final_rate
    )
  else:
    raise InputError(
      f'optimizer.warmup_steps is {warmup}, which leaves none of {steps} steps for the cosine;'
      ' give fewer, or more steps.'
    )

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    growth = jnp.minimum((step + 1) / max(warmup, 1), 1)
    return growth * after_warmup(jnp.maximum(step - warmup, 0))

  return schedule


def adamw(
  config: OptimizerConfig, names: Collection[str], steps: int
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter 2019, algorithm 2) over a flat dict, in float32.

  Clips the gradient's global norm, if configured; then Adam; adds the decay; scales by the learning
  rates of the step and of the parameter. Both rates scale the decay, too, as in PyTorch. The state
  has the same structure for every config, so a run may resume with another.

  Args:
    names: of all parameters, also of frozen ones, so that a rule for these is not an error;
      gradients and parameters may be any part of them.
    steps: optimizer steps of the whole run.

  Raises:
    InputError: a setting has a wrong value, a rule is the first match of no name, or a name matches
      no rule.
  """
  schedule = learning_rate(config, steps)
  check_rules(config.decays, names, 'optimizer.decays')
  check_order(config.decays, names, 'optimizer.decays')
  decays = _values(config.decays, names, 'optimizer.decays')
  rates = _values(config.rates, names, 'optimizer.rates')

  def with_decay(updates, params):
    return {
      name: update + decays[name] * params[name] if decays[name] else update
      for name, update in updates.items()
    }

  def with_rates(updates, _):
    return {name: rates[name] * update for name, update in updates.items()}

  return optax.chain(
    optax.stateless(lambda gradients, _: optax.tree.cast(gradients, jnp.float32)),
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    optax.scale_by_adam(config.b1, config.b2, config.eps),
    optax.stateless(with_decay),
    optax.stateless(with_rates),
    optax.scale_by_learning_rate(schedule),
  )


def only_scheduled(old: optax.OptState, new: optax.OptState) -> optax.OptState:
  """The state of `adamw` after a step without a gradient: `old` moments, `new` schedule count.

  So the run still ends at its final rate.
  """
  return (*old[:-1], new[-1])


def trainable(names: Collection[str], rates: Rules) -> set[str]:
  """The names that learn; names with rate 0 are frozen, and must not be in `params`.

  Raises:
    InputError: a rule is the first match of no name, a name matches no rule, a rate is negative, or
      all are 0.
  """
  check_rules(rates, names, 'optimizer.rates')
  check_order(rates, names, 'optimizer.rates')
  trained = {name for name, rate in _values(rates, names, 'optimizer.rates').items() if rate}
  if not trained:
    raise InputError('optimizer.rates: every parameter has rate 0, so nothing would learn.')
  return trained


def ema_decay(largest: float, step: Array | int) -> Array:
  """The decay of the moving average after `step` optimizer steps, this one included: float32 [].

  min(largest, (1 + step) / (10 + step)): 2/11 at the first update, as in the original code.
  """
  step = jnp.asarray(step, jnp.float32)
  return jnp.minimum(largest, (1 + step) / (10 + step))


def ema_update(ema: Mapping, params: Mapping, decay: Array | float) -> dict:
  """The next moving average: decay * ema + (1 - decay) * params, for trees of float32."""
  return jax.tree.map(lambda average, new: average - (1 - decay) * (average - new), ema, params)


def check(config: OptimizerConfig) -> None:
  """Raises an InputError that names the first setting with a value out of its range."""
  check_choice('optimizer.schedule', config.schedule, SCHEDULES)
  _check_range('learning_rate', config.learning_rate, 0)
  _check_range('warmup_steps', config.warmup_steps, 0)
  _check_range('clip_norm', config.clip_norm, 0)
  if not 0 <= config.final_rate <= 1:
    raise InputError(f'optimizer.final_rate is {config.final_rate}; give a number from 0 to 1.')
  for knob in ('b1', 'b2', 'ema'):
    _check_range(knob, getattr(config, knob), 0, 1)
    if np.float32(getattr(config, knob)) == 1:  # as it is used
      raise InputError(f'optimizer.{knob} is {getattr(config, knob)}, which float32 rounds to 1.')
  if not 0 < np.float32(config.eps) < math.inf:
    raise InputError(f'optimizer.eps is {config.eps}; give a number of float32 above 0.')


def _values(rules, names, what):
  values = {name: first_match(rules, name, what) for name in names}
  for name, value in values.items():
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
      raise InputError(f'{what}: {name} gets {value!r}; give a number from 0 on.')
  return values


def _check_range(knob, value, low, high=math.inf):
  if not low <= value < high:
    upwards = 'on' if high == math.inf else f'to below {high}'
    raise InputError(f'optimizer.{knob} is {value}; give a number from {low} {upwards}.')
