"""Samplers: from noise to latents by a function `denoise(x, sigma)`.

B batch, h w latent height and width, S steps. x [B, h, w, 4] is clean latents + sigma * noise, in
float32, for every sampler. The papers and diffusers write ddim, dpmpp_2m and lcm for latents of
unit variance; here the same methods use the scale above.

A sampler is `make_step(denoise, grid) -> step(state, i, noise) -> state`. The state is (x, denoised
of the previous step); i counts from 0 and may be traced; noise [B, h, w, 4] is standard normal, and
only the samplers in STOCHASTIC read it.

To add a sampler, write such a function and enter it in SAMPLERS, and in STOCHASTIC if it reads
noise. Give it its levels in `noise_levels`, its name in `defaults.SAMPLERS` (for --help), and its
twin of diffusers in tests/diffusion/test_samplers.py. If it predicts twice in a step, count this in
`Sampling.network_calls`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax.diffusion.noise import SPACINGS, Schedule
from ip2p_jax.errors import InputError, check_choice

Array = jax.Array
Denoise = Callable[[Array, Array], Array]
State = tuple[Array, Array]

LCM_STEPS = 50  # latent consistency models are distilled on this many timesteps


class Grid(NamedTuple):
  """The noise levels of a run, float32. All leaves may be traced; only S is static."""

  sigmas: Array  # [S + 1], descending; the last is the end of the run, mostly 0
  timesteps: Array  # [S], the fractional training timesteps of all sigmas but the last
  initial_scale: Array  # [], factor of standard normal noise at the start
  final_scale: Array  # [], factor of x at the end
  first: Array | None = None  # [], the first step; None is 0, known when the program is compiled


def euler_ancestral(denoise: Denoise, grid: Grid):
  """An Euler step and new noise (Song et al. 2021, equation 12, eta = 1).

  The step goes to sigma_next^2 / sigma, which is below sigma_next. The new noise raises the level
  to sigma_next.
  """

  def step(state, i, noise):
    x, sigma, sigma_next = state[0], *_levels(grid, i)
    ratio = sigma_next / sigma
    denoised = denoise(x, sigma)
    x = denoised + ratio**2 * (x - denoised) + sigma_next * jnp.sqrt(1 - ratio**2) * noise
    return x, denoised

  return step


def euler(denoise: Denoise, grid: Grid):
  """The first-order step (Karras et al. 2022, algorithm 1). With DDIM's timesteps it is DDIM."""

  def step(state, i, noise):
    del noise
    x, sigma, sigma_next = state[0], *_levels(grid, i)
    denoised = denoise(x, sigma)
    return denoised + sigma_next / sigma * (x - denoised), denoised

  return step


def heun(denoise: Denoise, grid: Grid):
  """The second-order step (Karras et al. 2022, algorithm 1): 2 S - 1 calls of `denoise`."""

  def step(state, i, noise):
    del noise
    x, sigma, sigma_next = state[0], *_levels(grid, i)
    denoised = denoise(x, sigma)
    slope = (x - denoised) / sigma
    guess = denoised + sigma_next / sigma * (x - denoised)

    def corrected():
      slope_there = (guess - denoise(guess, sigma_next)) / sigma_next
      return x + (sigma_next - sigma) * (slope + slope_there) / 2

    return jax.lax.cond(sigma_next > 0, corrected, lambda: guess), denoised

  return step


def dpmpp_2m(denoise: Denoise, grid: Grid):
  """DPM-Solver++ (2M), midpoint (Lu et al. 2022, algorithm 2), with lambda = -log sigma.

  The first step, and a last step to sigma 0, are of first order.
  """

  def step(state, i, noise):
    del noise
    (x, previous), (sigma, sigma_next) = state, _levels(grid, i)
    sigma_before = jnp.asarray(grid.sigmas)[jnp.maximum(i - 1, 0)]
    denoised = denoise(x, sigma)
    multistep = (i > 0) & (sigma_next > 0)
    h_before = jnp.log(jnp.where(multistep, sigma_before / sigma, 2.0))
    h = jnp.log(jnp.where(multistep, sigma / sigma_next, 1.0))
    aim = denoised + h / (2 * h_before) * (denoised - previous)
    return aim + sigma_next / sigma * (x - aim), denoised

  return step


def lcm(denoise: Denoise, grid: Grid):
  """A jump to clean latents, then new noise (Luo et al. 2023, algorithm 1 and appendix)."""
  data_spread, timestep_scaling = 0.5, 10.0

  def step(state, i, noise):
    x, sigma, sigma_next = state[0], *_levels(grid, i)
    time = jnp.asarray(grid.timesteps)[i] * timestep_scaling
    c_skip = data_spread**2 / (time**2 + data_spread**2)
    c_out = time / jnp.sqrt(time**2 + data_spread**2)
    denoised = c_skip * x / jnp.sqrt(sigma**2 + 1) + c_out * denoise(x, sigma)
    return denoised + sigma_next * noise, denoised

  return step


def _levels(grid, i):
  sigmas = jnp.asarray(grid.sigmas)
  return sigmas[i], sigmas[i + 1]


SAMPLERS = {
  'euler_ancestral': euler_ancestral,
  'euler': euler,
  'heun': heun,
  'ddim': euler,
  'dpmpp_2m': dpmpp_2m,
  'lcm': lcm,
}
STOCHASTIC = ('euler_ancestral', 'lcm')


def sample(
  sampler: str,
  denoise: Denoise,
  grid: Grid,
  init_noise: Array,
  noise_at: Callable[[Array], Array] | None = None,
) -> Array:
  """Runs all steps in one loop; returns latents [B, h, w, 4] float32.

  `init_noise` [B, h, w, 4] and `noise_at(i)` are standard normal. `noise_at` is called once a step,
  with a traced i, and only if the sampler is in STOCHASTIC. InputError for an unknown sampler.
  """
  check_choice('sampler', sampler, SAMPLERS)
  take_step = SAMPLERS[sampler](denoise, grid)
  noise = lambda i: noise_at(i) if sampler in STOCHASTIC else None
  step = lambda state, i: take_step(state, i, noise(i))
  return finish(grid, walk(step, grid, initial_state(grid, init_noise)))


def walk(step: Callable[[State, Array], State], grid: Grid, state: State) -> State:
  """All steps of the grid by `step(state, i)`."""
  first = 0 if grid.first is None else grid.first
  return jax.lax.fori_loop(first, len(grid.timesteps), lambda i, state: step(state, i), state)


def initial_state(grid: Grid, init_noise: Array) -> State:
  """The state before step 0, from standard normal noise [B, h, w, 4]."""
  x = init_noise.astype(jnp.float32) * grid.initial_scale
  return x, jnp.zeros_like(x)


def noisy_state(grid: Grid, latents: Array, noise: Array) -> State:
  """The state before step `grid.first`, from clean latents and standard normal noise.

  Both are [B, h, w, 4].
  """
  x = latents + jnp.asarray(grid.sigmas)[grid.first] * noise
  return x, jnp.zeros_like(x)


def finish(grid: Grid, state: State) -> Array:
  """The latents [B, h, w, 4] in the state after the last step."""
  return state[0] * grid.final_scale


def begin_at(grid: Grid, first: int) -> Grid:
  """The grid of a run that begins at step `first`; at S there are no steps.

  Levels before `first` are infinite, so that a sampler with memory gives the step before weight 0.
  """
  sigmas = np.where(np.arange(len(grid.sigmas)) < first, np.float32(np.inf), grid.sigmas)
  return grid._replace(sigmas=sigmas, first=np.int32(first))


def steps_of(grid: Grid) -> range:
  """The numbers of a grid's steps, on the host."""
  return range(0 if grid.first is None else int(grid.first), len(grid.timesteps))


def noise_levels(
  schedule: Schedule, sampler: str, steps: int, spacing: str | None = None, karras: bool = False
) -> Grid:
  """The grid of a run, computed on the host: timesteps, sigmas and scales are diffusers'.

  Three differences are deliberate: with steps=1 and linspace the run starts at the noisiest level,
  not the cleanest; ddim goes to its next timestep, which diffusers' equal strides can miss; with
  `karras` the timesteps are those of the sigmas, not rounded or interpolated differently.

  `spacing` None is diffusers' default for the sampler: 'leading' for ddim, the schedule's for
  euler_ancestral, else 'linspace'; lcm has its own grid. `karras` spaces the levels as Karras et
  al. (2022, equation 5) do, with rho = 7. InputError for an unknown name, a combination that does
  not exist, or too many steps.
  """
  check_choice('sampler', sampler, SAMPLERS)
  if spacing is not None:
    check_choice('spacing', spacing, SPACINGS)
  if sampler == 'lcm' and spacing is not None:
    raise InputError('spacing does not apply to the sampler lcm, which has its own; leave it out.')
  if karras and sampler in ('ddim', 'lcm'):
    raise InputError(f'karras does not apply to the sampler {sampler}; use euler or dpmpp_2m.')
  if spacing is None and sampler == 'euler_ancestral':
    spacing = schedule.timestep_spacing
  spacing = spacing or ('leading' if sampler == 'ddim' else 'linspace')
  timesteps = _timesteps(schedule, sampler, steps, spacing)
  every = np.arange(schedule.num_train_timesteps)
  sigmas = np.interp(timesteps, every, schedule.sigmas)
  if karras:
    ends = schedule.sigmas[[-1, 0]] if sampler == 'dpmpp_2m' else sigmas[[0, -1]]
    sigmas = _karras(*ends.astype(np.float64), steps)
    timesteps = np.interp(sigmas, schedule.sigmas, every)
  last = _last_sigma(schedule, timesteps[-1], steps) if sampler == 'ddim' else 0.0
  unit_variance = sampler in ('ddim', 'dpmpp_2m', 'lcm') or spacing == 'leading'
  initial_scale = np.sqrt(sigmas[0] ** 2 + 1) if unit_variance else sigmas[0]
  return Grid(
    sigmas=np.append(sigmas, last).astype(np.float32),
    timesteps=timesteps.astype(np.float32),
    initial_scale=np.float32(initial_scale),
    final_scale=np.float32(1 / np.sqrt(last**2 + 1)),
  )


def _timesteps(schedule, sampler, steps, spacing):
  """[S] float64, descending, within the schedule; InputError if there are too many steps."""
  num = schedule.num_train_timesteps
  limit = LCM_STEPS if sampler == 'lcm' else num
  if not 1 <= steps <= limit:
    raise InputError(f'steps is {steps}; the sampler {sampler} takes 1 to {limit}.')
  points = steps + 1 if sampler == 'dpmpp_2m' else steps  # it drops the last point
  if sampler == 'lcm':
    chosen = LCM_STEPS - np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False))
    timesteps = chosen * (num // LCM_STEPS) - 1
  elif spacing == 'linspace':
    timesteps = np.linspace(0, num - 1, max(points, 2))[::-1][:steps]
  elif spacing == 'leading':
    timesteps = np.arange(points)[::-1][:steps] * (num // points) + schedule.steps_offset
  else:
    timesteps = np.round(num - np.arange(steps) * (num / steps)) - 1
  if sampler in ('ddim', 'dpmpp_2m'):
    timesteps = np.round(timesteps)
  if timesteps[0] >= num or timesteps[-1] < 0 or np.any(np.diff(timesteps) >= 0):
    raise InputError(
      f'steps is {steps}, too many for the sampler {sampler} with spacing {spacing} over {num}'
      ' training timesteps; use fewer.'
    )
  return timesteps.astype(np.float64)


def _karras(largest, smallest, steps, rho=7.0):
  ramp = np.linspace(0, 1, steps)
  return (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho


def _last_sigma(schedule, last_timestep, steps):
  """The last level of DDIM: one stride below its last timestep, or as `set_alpha_to_one` says."""
  below = int(last_timestep) - schedule.num_train_timesteps // steps
  if below >= 0:
    return schedule.sigmas[below]
  return 0.0 if schedule.set_alpha_to_one else schedule.sigmas[0]
