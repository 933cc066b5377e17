"""Checks of settings: each value alone, and in combination."""

import copy
import math
from collections.abc import Collection
from typing import Any

from ip2p_jax.config import LanguageConfig, TrainConfig, knobs, set_knob
from ip2p_jax.defaults import MAX_SEED, MIN_SIDE
from ip2p_jax.errors import InputError, check_choice

CHOICES = {
  'task': ('edit', 'text_to_image'),
  'checkpoint_weights': ('', 'average', 'live'),
  'prediction_type': ('', 'epsilon', 'v_prediction'),
  'dtype': ('bfloat16', 'float32'),
  'remat': ('none', 'convdot', 'full'),
  'attention': ('auto', 'xla', 'splash', 'cudnn'),
  'data.resize': ('crop', 'squash'),
}
AT_LEAST_ONE = ('resolution', 'batch_size', 'accumulation', 'steps', 'data.prefetch',
                'data.max_tokens', 'log.every', 'log.checkpoint_every', 'log.keep',
                'log.preview_steps')  # fmt: skip
AT_LEAST_ZERO = ('seed', 'min_snr_gamma', 'lora.rank', 'data.workers', 'data.max_corrupt',
                 'data.largest_resize', 'log.validate_every', 'log.validation_examples',
                 'log.previews')  # fmt: skip


# (setting, the setting that it needs to have an effect)
NEEDS = (
  ('lora.alpha', 'lora.rank'),
  ('lora.targets', 'lora.rank'),
  ('optimizer.final_rate', 'optimizer.schedule'),
  ('log.validate_every', 'log.validation_examples'),
  ('log.validation_examples', 'log.validate_every'),
  ('log.preview_steps', 'log.previews'),
)


def check_config(config: TrainConfig) -> None:
  """Raises an InputError that names the first setting with a wrong value."""
  check_values(config)
  _check_paths(config)


def check_values(config: TrainConfig) -> None:
  """`check_config` without the check that checkpoint and data are named."""
  _check_common(config)
  if config.attention == 'cudnn' and config.dtype == 'float32':
    raise InputError(
      "attention is 'cudnn', which does not compute in dtype='float32'; use attention='auto' or"
      " dtype='bfloat16'."
    )
  if not 0 <= config.conditioning_dropout <= 1 / 3:
    raise InputError(
      f'conditioning_dropout is {config.conditioning_dropout}; it is the rate of each of three'
      ' kinds of dropout, 0 to 0.33.'
    )
  data = config.data
  check_framing(config.resolution, config.task, data.resize, data.largest_resize, data.flip_rate)


def check_framing(
  resolution: int, task: str, resize: str, largest_resize: int, flip_rate: float
) -> None:
  """Raises an InputError that names the first setting of a framing with a wrong value."""
  check_choice('task', task, CHOICES['task'])
  check_choice('data.resize', resize, CHOICES['data.resize'])
  if resolution < MIN_SIDE:
    raise InputError(f'resolution is {resolution}; use {MIN_SIDE} or more.')
  if largest_resize and largest_resize < resolution:
    raise InputError(
      f'data.largest_resize is {largest_resize}, smaller than the resolution {resolution}; use 0'
      ' for no random crop.'
    )
  if not 0 <= flip_rate <= 1:
    raise InputError(f'data.flip_rate is {flip_rate}; use 0 to 1.')


def check_language(config: LanguageConfig) -> None:
  """`check_config` for a run of a language model."""
  _check_common(config)
  if not 0 <= config.data.holdout < 1:
    raise InputError(f'data.holdout is {config.data.holdout}; use 0 to below 1.')
  _check_paths(config)


def _check_common(config):
  values = dict(knobs(config))
  for name, choices in CHOICES.items():
    if name in values:
      check_choice(name, values[name], choices)
  for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
    for name in names:
      if name in values and not least <= values[name] < math.inf:  # and not nan
        raise InputError(f'{name} is {values[name]}; use {least} or more.')
  if config.seed > MAX_SEED:
    raise InputError(f'seed is {config.seed}; use at most {MAX_SEED}.')
  if config.lora.rank and not 0 < config.lora.alpha < math.inf:
    raise InputError(f'lora.alpha is {config.lora.alpha}; use a number above 0.')
  _check_acting(config, values)


def _check_acting(config, values):
  """Refuses a setting that was changed and has no effect."""
  usual = dict(knobs(type(config)()))
  for name, needed in NEEDS:
    is_set = name in values and values[name] and values[name] != usual[name]
    if is_set and _is_off(values, needed):
      raise InputError(
        f'{name} is {values[name]!r}, which does nothing while {needed} is {values[needed]!r};'
        f' change {needed}, or leave {name} at {usual[name]!r}.'
      )
  window = config.log.profile
  if len(window) != 2 or not all(isinstance(x, int) and x >= 0 for x in window):
    raise InputError(f'log.profile is {window!r}; give the first step and how many, as in 100,5.')
  first, count = window
  if first and not count:
    raise InputError(f'log.profile is {window!r}, no step; give how many, as in {first},5.')
  if count and max(first, 2) > config.steps:
    raise InputError(
      f'log.profile begins at step {max(first, 2)}, and the run ends at step {config.steps}; name'
      ' earlier steps.'
    )


def _is_off(values, name) -> bool:
  return values.get(name, 1) in (0, 'constant')


def without_idle(config: Any, changed: Collection[str]) -> Any:
  """The config, with defaults for settings without effect because one of `changed` is off.

  For example, a config file sets `lora.alpha`, and a run switches `lora.rank` off. Settings in
  `changed` themselves stay; `check_config` refuses those without effect.
  """
  config = copy.deepcopy(config)
  usual, values = dict(knobs(type(config)())), dict(knobs(config))
  for name, needed in NEEDS:
    if name in values and name not in changed and needed in changed and _is_off(values, needed):
      set_knob(config, name, usual[name])
  return config


def _check_paths(config):
  for name, path in (('checkpoint', config.checkpoint), ('data.path', config.data.path)):
    if not path:
      raise InputError(f'{name} is empty; say where it is: --config.{name}=PATH.')
