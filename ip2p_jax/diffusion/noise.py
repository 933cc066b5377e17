"""The noise schedule of training, and the noise of each image.

B batch, h w latent height and width, T training timesteps. Latents are [B, h, w, 4]; schedule
arithmetic is float32. Two forms of the same noise (Karras et al. 2022, table 1):

  training   noisy = sqrt(alphas_cumprod) * latents + sqrt(1 - alphas_cumprod) * noise
  sampling   x = latents + sigma * noise,   sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)
"""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax.errors import InputError, check_choice

Array = jax.Array

BETA_SCHEDULES = ('scaled_linear', 'linear', 'squaredcos_cap_v2')
PREDICTION_TYPES = ('epsilon', 'v_prediction')
SPACINGS = ('linspace', 'leading', 'trailing')


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The growth of noise over the training timesteps; the defaults are Stable Diffusion 1.5's.

  Hashable, so it may be a static argument of jit. InputError names a field with a wrong value.
  """

  num_train_timesteps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  beta_schedule: str = 'scaled_linear'  # one of BETA_SCHEDULES
  prediction_type: str = 'epsilon'  # what the network predicts, one of PREDICTION_TYPES
  set_alpha_to_one: bool = False  # whether DDIM ends without noise, or with that of timestep 0
  steps_offset: int = 1  # added to the timesteps of 'leading' spacing
  timestep_spacing: str = 'linspace'  # one of SPACINGS, the default of Euler ancestral

  def __post_init__(self):
    all_choices = {
      'beta_schedule': BETA_SCHEDULES,
      'prediction_type': PREDICTION_TYPES,
      'timestep_spacing': SPACINGS,
    }
    for key, choices in all_choices.items():
      check_choice(key, getattr(self, key), choices)
    for key, least in (('num_train_timesteps', 1), ('steps_offset', 0)):
      value = getattr(self, key)
      if not isinstance(value, numbers.Integral) or value < least:
        raise InputError(f'{key} is {value!r}; use a whole number of at least {least}.')
    for key in ('beta_start', 'beta_end'):
      value = getattr(self, key)
      if not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise InputError(f'{key} is {value!r}; use a number between 0 and 1.')

  @classmethod
  def from_json(cls, config: dict, name: str = 'scheduler_config.json') -> 'Schedule':
    """The schedule of a diffusers scheduler config; `name` is its file, for messages.

    It may be any scheduler of the Stable Diffusion family. Keys for sampling only (Karras,
    clipping, solver options) are ignored: the caller chooses them. The exception is the spacing of
    an Euler ancestral scheduler, so that its checkpoint samples as in diffusers. A missing key has
    diffusers' default. InputError for a schedule that is not supported.
    """
    if not isinstance(config, dict):
      raise InputError(f'{name} holds no dictionary of settings.')
    for key in ('beta_start', 'beta_end', 'beta_schedule'):
      if key not in config:
        raise InputError(f'{name} lacks {key}; it is not a Stable Diffusion scheduler config.')
    for key in ('trained_betas', 'rescale_betas_zero_snr', 'thresholding'):
      if config.get(key):
        raise InputError(f'{name}: {key} is set, which is not supported; remove it.')
    fields = dataclasses.asdict(cls(steps_offset=0, set_alpha_to_one=True))
    fields.update((key, config[key]) for key in fields if key in config)
    if config.get('_class_name') != 'EulerAncestralDiscreteScheduler':
      fields['timestep_spacing'] = 'linspace'
    try:
      return cls(**fields)
    except InputError as error:
      raise InputError(f'{name}: {error}') from None

  def to_json(self) -> dict:
    """The config of diffusers' EulerAncestralDiscreteScheduler with this schedule.

    It also has the keys of related schedulers, so that a switch of scheduler keeps them: by default
    DDIM would clip latents to [-1, 1].
    """
    return {
      '_class_name': 'EulerAncestralDiscreteScheduler',
      '_diffusers_version': '0.30.0',
      **dataclasses.asdict(self),
      'clip_sample': False,
      'rescale_betas_zero_snr': False,
      'skip_prk_steps': True,
      'trained_betas': None,
    }

  @functools.cached_property
  def alphas_cumprod(self) -> np.ndarray:
    """[T] float32, descending: the fraction of signal in the variance at each timestep."""
    alphas = np.float32(1) - self._betas()
    return _read_only(np.cumprod(alphas, dtype=np.float64).astype(np.float32))

  @functools.cached_property
  def sigmas(self) -> np.ndarray:
    """[T] float32, ascending: the noise level of each timestep, relative to clean latents."""
    return _read_only(np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod))

  def _betas(self):
    start, end, num = self.beta_start, self.beta_end, self.num_train_timesteps
    if self.beta_schedule == 'linear':
      return _linspace(start, end, num)
    if self.beta_schedule == 'scaled_linear':
      return _linspace(start**0.5, end**0.5, num) ** 2
    times = np.arange(num + 1) / num  # (Nichol and Dhariwal 2021, section 3.2)
    signal = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999).astype(np.float32)


def _linspace(start, end, num):
  # From both ends, rounded once, as in torch: this decides the last digits of a thousand products.
  start, end = np.float32(start), np.float32(end)
  step, i = np.float64((end - start) / np.float32(max(num - 1, 1))), np.arange(num)
  points = np.where(i < num // 2, start + step * i, end - step * (num - 1 - i))
  return (points if num > 1 else np.array([start])).astype(np.float32)


def _read_only(array):
  array.flags.writeable = False
  return array


def add_noise(schedule: Schedule, latents: Array, noise: Array, timesteps: Array) -> Array:
  """The noisy latents [B, h, w, 4] float32 that a network sees in training.

  `timesteps` [B] are whole numbers in 0..T-1 (Ho et al. 2020, equation 4). Always computed in
  float32: in bfloat16 the first timesteps would get no noise at all.
  """
  signal, spread = _signal_and_spread(schedule, timesteps)
  return signal * latents.astype(jnp.float32) + spread * noise.astype(jnp.float32)


def velocity(schedule: Schedule, latents: Array, noise: Array, timesteps: Array) -> Array:
  """The target of a v-prediction network, [B, h, w, 4] float32 (Salimans and Ho 2022, appendix D).

  Arguments as in `add_noise`.
  """
  signal, spread = _signal_and_spread(schedule, timesteps)
  return signal * noise.astype(jnp.float32) - spread * latents.astype(jnp.float32)


def _signal_and_spread(schedule, timesteps):
  alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)[timesteps][:, None, None, None]
  return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)  # [B, 1, 1, 1]


def image_keys(seeds: Array, indices: Array) -> Array:
  """One key per image, [B], from its seed and its index, both [B] uint32.

  All noise of an image depends on these two numbers, never on its batch or on the devices. The
  generator is named because TPU users often change jax's default to one whose numbers depend on the
  batch.
  """

  def key_of(seed, index):
    return jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), index)

  return jax.vmap(key_of)(jnp.asarray(seeds, jnp.uint32), jnp.asarray(indices, jnp.uint32))


def initial_noise(keys: Array, shape: tuple[int, int, int]) -> Array:
  """Standard normal noise to start from, [B, *shape] float32; `shape` is (h, w, 4)."""
  return _normal(keys, 0, shape)


def step_noise(keys: Array, i: Array, shape: tuple[int, int, int]) -> Array:
  """Standard normal noise for step `i` (from 0, may be traced), [B, *shape] float32."""
  return _normal(keys, i + 1, shape)


def _normal(keys, purpose, shape):
  draw = lambda key: jax.random.normal(jax.random.fold_in(key, purpose), shape, jnp.float32)
  return jax.vmap(draw)(keys)
