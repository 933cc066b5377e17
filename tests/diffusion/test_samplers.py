"""Every sampler agrees with diffusers and, where it has the method, with k-diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch_models as reference

from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.denoiser import denoiser, sigma_to_timestep
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.diffusion.samplers import SAMPLERS, SPACINGS, STOCHASTIC, Grid, noise_levels, sample
from ip2p_jax.errors import InputError

torch = peers.module('torch')

SHAPE = (2, 4, 4, 4)
LINEAR = {'beta_start': 1e-4, 'beta_end': 0.02, 'beta_schedule': 'linear'}
UNIT_VARIANCE = ('ddim', 'dpmpp_2m', 'lcm')


@pytest.fixture
def init(rng):
  return rng.standard_normal(SHAPE, dtype=np.float32)


def their_scheduler(sampler, steps, schedule=Schedule(), **options):
  scheduler = reference.scheduler(sampler, schedule, **options)
  scheduler.set_timesteps(steps)
  return scheduler


def torch_noise(steps, shape=SHAPE):
  """The noise of a torch generator with seed 0, step by step, [S, *shape]."""
  generator = torch.Generator().manual_seed(0)
  return np.stack([torch.randn(shape, generator=generator).numpy() for _ in range(steps)])


def network(x, t, lib):
  """A function that is not linear in x and depends on the timestep."""
  return 0.8 * lib.tanh(x) + 0.3 * x * lib.cos(t / 200)


def their_sample(scheduler, init, timesteps=None):
  """The loop of a diffusers pipeline; `timesteps` replaces those that the network gets."""
  x, generator = torch.tensor(init) * scheduler.init_noise_sigma, torch.Generator().manual_seed(0)
  random = {'generator': generator} if 'Heun' not in type(scheduler).__name__ else {}
  for i, t in enumerate(scheduler.timesteps):
    asked = torch.tensor(timesteps[i]) if timesteps is not None else t.to(torch.float32)
    predicted = network(scheduler.scale_model_input(x, t), asked, torch)
    x = scheduler.step(predicted, t, x, **random).prev_sample
  return x.numpy()


def our_sample(sampler, schedule, grid, init):
  denoise = denoiser(lambda x, t: network(x, t, jnp), schedule)
  noises = jnp.asarray(torch_noise(len(grid.timesteps), init.shape))
  run = jax.jit(lambda grid, init: sample(sampler, denoise, grid, init, lambda i: noises[i]))
  return run(grid, init)


def assert_relative(ours, expected, tolerance):
  assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


# Grids


def assert_same_grid(grid, theirs, sampler):
  timesteps = theirs.timesteps.numpy()
  if sampler in ('ddim', 'lcm'):  # they keep no sigmas
    alphas = theirs.alphas_cumprod[theirs.timesteps].numpy()
    sigmas = np.sqrt((1 - alphas) / alphas)
  else:
    sigmas = theirs.sigmas.numpy()[:-1]
  if sampler == 'heun':  # they list the calls, we the steps
    timesteps, sigmas = (np.append(a[:1], a[1::2]) for a in (timesteps, sigmas))
  np.testing.assert_allclose(grid.timesteps, timesteps, atol=1e-4)
  np.testing.assert_allclose(grid.sigmas[:-1], sigmas, rtol=1e-6)
  scale = np.sqrt(1 + sigmas[0] ** 2) if sampler in UNIT_VARIANCE else 1
  np.testing.assert_allclose(grid.initial_scale, scale * theirs.init_noise_sigma, rtol=1e-6)


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('sampler', [name for name in SAMPLERS if name != 'lcm'])
def test_grid_agrees_with_diffusers(sampler, spacing):
  every = (1, 2, 3, 7, 20, 30, 50, 100)
  some = (1, 2, 10, 20, 50)  # 1100 / 30 makes their trailing grid one step too long
  for schedule, numbers in ((Schedule(), every), (Schedule(1100, **LINEAR), some)):
    for steps in numbers:
      if steps == 1 and spacing == 'linspace' and sampler != 'dpmpp_2m':
        continue  # theirs is the cleanest level; see the test of one step
      grid = noise_levels(schedule, sampler, steps, spacing)
      theirs = their_scheduler(sampler, steps, schedule, timestep_spacing=spacing)
      assert_same_grid(grid, theirs, sampler)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_the_default_spacing_is_that_of_diffusers(sampler):
  for steps in (2, 4, 8, 20, 50):
    grid = noise_levels(Schedule(), sampler, steps)
    assert_same_grid(grid, their_scheduler(sampler, steps), sampler)


@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('sampler', ['euler', 'heun', 'dpmpp_2m'])
def test_karras_levels_agree_with_diffusers(sampler, spacing):
  for steps in (1, 2, 10, 20, 50):
    if steps == 1 and spacing == 'linspace' and sampler != 'dpmpp_2m':
      continue
    options = {'timestep_spacing': spacing, 'use_karras_sigmas': True}
    theirs = their_scheduler(sampler, steps, **options)
    grid = noise_levels(Schedule(), sampler, steps, spacing, karras=True)
    expected = theirs.sigmas.numpy()
    expected = np.append(expected[:1], expected[1::2]) if sampler == 'heun' else expected
    np.testing.assert_allclose(grid.sigmas[:steps], expected[:steps], rtol=2e-6)
    assert len(grid.sigmas) == steps + 1 and grid.sigmas[-1] == 0
    timesteps = theirs.timesteps.numpy()
    timesteps = np.append(timesteps[:1], timesteps[1::2]) if sampler == 'heun' else timesteps
    # dpmpp_2m rounds there, and all interpolate log sigma between timesteps
    tolerance = 0.55 if sampler == 'dpmpp_2m' else 0.05
    np.testing.assert_allclose(grid.timesteps, timesteps, atol=tolerance)


@pytest.mark.parametrize(
  ('sampler', 'spacing', 'timesteps', 'sigmas', 'initial_scale'),
  [
    (
      'euler_ancestral',
      'linspace',
      [999, 946.4211, 893.8421, 52.5790, 0],
      [14.6146, 10.7469, 8.0815, 0.2322, 0.0292],
      14.614647,
    ),
    (
      'euler',
      'leading',
      [951, 901, 851, 51, 1],
      [11.0283, 8.3907, 6.5064, 0.2281, 0.0413],
      11.073581,
    ),
    (
      'heun',
      'trailing',
      [999, 949, 899, 99, 49],
      [14.6146, 10.9042, 8.3028, 0.3417, 0.2230],
      14.614647,
    ),
    (
      'dpmpp_2m',
      'linspace',
      [999, 949, 899, 100, 50],
      [14.6146, 10.9042, 8.3028, 0.3439, 0.2256],
      14.648819,
    ),
  ],
)
def test_twenty_steps_have_their_known_levels(sampler, spacing, timesteps, sigmas, initial_scale):
  grid, chosen = noise_levels(Schedule(), sampler, 20, spacing), [0, 1, 2, 18, 19]
  np.testing.assert_allclose(grid.timesteps[chosen], timesteps, atol=1e-3)
  np.testing.assert_allclose(grid.sigmas[chosen], sigmas, atol=6e-5)
  np.testing.assert_allclose(grid.initial_scale, initial_scale, rtol=1e-6)
  assert grid.sigmas[-1] == 0 and grid.final_scale == 1


def test_hundred_steps_end_as_the_original_does():
  grid = noise_levels(Schedule(), 'euler_ancestral', 100)
  expected = [14.61464, 13.75249, 12.95243, 0.13862, 0.09869, 0.02917, 0]
  np.testing.assert_allclose(grid.sigmas[[0, 1, 2, -4, -3, -2, -1]], expected, rtol=1e-4, atol=1e-5)


def test_levels_agree_with_k_diffusion_to_1e_4():
  log_sigmas = np.log(Schedule().sigmas.astype(np.float64))  # it interpolates these
  for steps in (2, 20, 50, 100):
    timesteps = np.linspace(999, 0, steps)
    expected = np.exp(np.interp(timesteps, np.arange(1000), log_sigmas))
    grid = noise_levels(Schedule(), 'euler_ancestral', steps)
    np.testing.assert_allclose(grid.sigmas[:-1], expected, rtol=1e-4)


@pytest.mark.parametrize(
  ('steps', 'timesteps'),
  [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])],
)
def test_lcm_takes_timesteps_of_its_distillation(steps, timesteps):
  np.testing.assert_array_equal(noise_levels(Schedule(), 'lcm', steps).timesteps, timesteps)


def timestep_to_sigma(schedule, timestep):
  timesteps = jnp.arange(schedule.num_train_timesteps, dtype=jnp.float32)
  return jnp.interp(timestep, timesteps, jnp.asarray(schedule.sigmas))


def test_sigma_and_timestep_convert_into_each_other():
  timesteps = np.array([0, 0.5, 1, 52.579, 500, 946.4211, 999], np.float32)
  for timestep in timesteps:
    sigma = timestep_to_sigma(Schedule(), timestep)
    np.testing.assert_allclose(sigma_to_timestep(Schedule(), sigma), timestep, atol=2e-4)
  assert sigma_to_timestep(Schedule(), 100.0) == 999
  assert sigma_to_timestep(Schedule(), 0.0) == 0


# Agreement with diffusers


@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_sampler_agrees_with_diffusers_for_equal_noise(init, sampler, prediction_type):
  schedule = Schedule(prediction_type=prediction_type)
  expected = their_sample(their_scheduler(sampler, 20, schedule), init)
  ours = our_sample(sampler, schedule, noise_levels(schedule, sampler, 20), init)
  assert_relative(ours, expected, 1e-5)


@pytest.mark.parametrize('steps', [1, 2, 4])
@pytest.mark.parametrize('sampler', SAMPLERS)
def test_few_steps_agree_with_diffusers(init, sampler, steps):
  spacing = 'trailing' if sampler != 'lcm' else None
  options = {'timestep_spacing': spacing} if spacing else {}
  expected = their_sample(their_scheduler(sampler, steps, **options), init)
  ours = our_sample(sampler, Schedule(), noise_levels(Schedule(), sampler, steps, spacing), init)
  assert_relative(ours, expected, 1e-5)


def test_ddim_may_end_without_noise(init):
  for to_one in (True, False):
    schedule = Schedule(set_alpha_to_one=to_one)
    grid = noise_levels(schedule, 'ddim', 20)
    assert (grid.sigmas[-1] == 0) == to_one
    assert_relative(
      our_sample('ddim', schedule, grid, init),
      their_sample(their_scheduler('ddim', 20, schedule), init),
      1e-5,
    )


@pytest.mark.parametrize('sampler', ['euler', 'dpmpp_2m'])
def test_a_karras_run_agrees_with_diffusers_at_our_timesteps(init, sampler):
  grid = noise_levels(Schedule(), sampler, 20, karras=True)
  theirs = their_scheduler(sampler, 20, use_karras_sigmas=True)
  expected = their_sample(theirs, init, grid.timesteps)
  assert_relative(our_sample(sampler, Schedule(), grid, init), expected, 1e-5)


# Runs from a later step


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_a_later_start_uses_the_rest_of_the_grid(rng, sampler):
  full = noise_levels(Schedule(), sampler, 8)
  rest = full._replace(sigmas=full.sigmas[3:], timesteps=full.timesteps[3:])
  latents, init = rng.standard_normal((2, *SHAPE), np.float32)
  noises = jnp.asarray(rng.standard_normal((8, *SHAPE), np.float32))
  denoise = denoiser(lambda x, t: network(x, t, jnp), Schedule())

  @jax.jit
  def run(grid, state, noises):
    step = SAMPLERS[sampler](denoise, grid)
    return samplers.walk(lambda state, i: step(state, i, noises[i]), grid, state)[0]

  later = samplers.begin_at(full, 3)
  state = samplers.noisy_state(later, latents, init)
  np.testing.assert_allclose(state[0], latents + full.sigmas[3] * init, rtol=1e-6)
  expected = np.asarray(run(rest, state, noises[3:]))
  assert_relative(np.asarray(run(later, state, noises)), expected, 1e-6)
  assert samplers.steps_of(later) == range(3, 8)


def test_a_run_from_the_end_does_nothing(rng):
  grid = samplers.begin_at(noise_levels(Schedule(), 'euler', 4), 4)
  latents, init = rng.standard_normal((2, *SHAPE), np.float32)
  state = samplers.noisy_state(grid, latents, init)
  np.testing.assert_array_equal(
    samplers.walk(lambda state, i: jax.tree.map(jnp.zeros_like, state), grid, state)[0], latents
  )


# Golden numbers: sums of absolute values in diffusers' tests


def golden_start():
  return np.arange(768, dtype=np.float32).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768


def golden_network(x, t):
  return x * t / (t + 1)


def rescaled_run(schedule, sampler, karras=False):
  """10 steps as in those tests: each step continues from the scaled input."""
  grid, noises = noise_levels(schedule, sampler, 10, karras=karras), torch_noise(10, (4, 3, 8, 8))
  x, previous = samplers.initial_state(grid, golden_start())
  for i in range(10):
    scale = lambda sigma: jnp.sqrt(sigma**2 + 1)

    def denoise(x, sigma, here=grid.sigmas[i], scale=scale):
      scaled = jnp.where(sigma == here, x, x / scale(sigma))  # elsewhere: heun's second call
      predict = lambda y, t: golden_network(y * scale(sigma), t)
      return x - (scaled - denoiser(predict, schedule)(scaled, sigma))

    step = SAMPLERS[sampler](denoise, grid)
    x, previous = step((x / scale(grid.sigmas[i]), previous), i, noises[i])
  return np.abs(samplers.finish(grid, (x, previous)))


@pytest.mark.parametrize(
  ('sampler', 'prediction_type', 'karras', 'expected'),
  [
    ('euler', 'epsilon', False, 10.0807),
    ('euler', 'epsilon', True, 124.5230),
    ('euler', 'v_prediction', False, 0.0002),
    ('heun', 'epsilon', False, 0.1233),
    ('euler_ancestral', 'epsilon', False, 152.3192),
    ('euler_ancestral', 'v_prediction', False, 108.4439),
  ],
)
def test_golden_sums_of_euler_and_heun(sampler, prediction_type, karras, expected):
  schedule = Schedule(1100, prediction_type=prediction_type, **LINEAR)
  total = rescaled_run(schedule, sampler, karras).sum()
  assert total == pytest.approx(expected, rel=1e-5, abs=5e-4)


@pytest.mark.parametrize(
  ('prediction_type', 'karras', 'expected'),
  [('epsilon', False, 0.3301), ('v_prediction', False, 0.2251), ('v_prediction', True, 0.2096)],
)
def test_golden_means_of_dpmpp_2m(prediction_type, karras, expected):
  schedule = Schedule(prediction_type=prediction_type, **LINEAR)
  grid, last = noise_levels(schedule, 'dpmpp_2m', 10, karras=karras), schedule.sigmas[0]
  grid = grid._replace(  # those tests end at the lowest level
    sigmas=np.append(grid.sigmas[:-1], last), final_scale=1 / np.sqrt(1 + last**2)
  )
  latents = sample('dpmpp_2m', denoiser(golden_network, schedule), grid, golden_start())
  # with karras they round the timesteps, and test to 1e-3 themselves
  assert np.abs(latents).mean() == pytest.approx(expected, abs=1e-3 if karras else 1e-4)


@pytest.mark.parametrize(('steps', 'expected'), [(1, 18.7097), (10, 197.7616)])
def test_golden_sums_of_lcm(steps, expected):
  schedule, noises = Schedule(), jnp.asarray(torch_noise(steps, (4, 3, 8, 8)))
  grid, denoise = noise_levels(schedule, 'lcm', steps), denoiser(golden_network, schedule)
  latents = sample('lcm', denoise, grid, golden_start(), lambda i: noises[i])
  assert np.abs(latents).sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  ('sampler', 'expected'),
  [
    ('euler_ancestral', [0.626917, -0.741840, 0.057098, 0.784013]),
    ('euler', [1.154906, 0.624077, 0.749469, 2.110363]),
    ('heun', [1.586607, 0.822023, 0.991661, 2.809778]),
    ('dpmpp_2m', [1.645930, 0.847857, 1.027700, 2.773741]),
  ],
)
def test_golden_latents_of_k_diffusion(sampler, expected):
  """Results of k-diffusion 0.1.1, with its eight Karras levels from 14.6 to 0.03."""
  largest, smallest = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
  sigmas = np.append(np.linspace(largest, smallest, 8) ** 7, 0).astype(np.float32)
  grid = Grid(sigmas, np.zeros(8, np.float32), np.float32(14.6), np.float32(1))
  init = np.random.RandomState(0).randn(1, 2, 2, 4).astype(np.float32)
  noises = jnp.asarray(np.random.RandomState(1).randn(8, 1, 2, 2, 4).astype(np.float32))
  denoise = lambda x, s: x / (1 + s**2) + 0.5 * jnp.sin(3 * x) * s / (1 + s)
  latents = sample(sampler, denoise, grid, init, lambda i: noises[i])
  np.testing.assert_allclose(latents.ravel()[:4], expected, atol=1e-5)


# Properties


def shrink(x, sigma):
  """The exact denoiser of standard normal data."""
  return x / (1 + sigma**2)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_scanning_equals_stepping(init, sampler):
  grid, schedule = noise_levels(Schedule(), sampler, 6), Schedule()
  denoise = denoiser(lambda x, t: network(x, t, jnp), schedule)
  noises = jnp.asarray(torch_noise(6))
  scanned = jax.jit(lambda: sample(sampler, denoise, grid, init, lambda i: noises[i]))()
  step = jax.jit(SAMPLERS[sampler](denoise, grid))
  state = samplers.initial_state(grid, init)
  for i in range(6):
    state = step(state, i, noises[i])
    assert [a.dtype for a in state] == [jnp.float32] * 2
  assert_relative(samplers.finish(grid, state), scanned, 1e-6)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_one_step_starts_from_the_noisiest_level(init, sampler):
  grid = noise_levels(Schedule(), sampler, 1)
  assert grid.timesteps == ([1] if sampler == 'ddim' else [999])  # leading: the offset alone
  latents = sample(sampler, shrink, grid, init, lambda i: init)
  assert np.all(np.isfinite(latents))


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_new_levels_do_not_recompile(init, sampler):
  traces = []

  @jax.jit
  def run(grid):
    traces.append(1)
    return sample(sampler, shrink, grid, init, lambda i: init + i)

  grids = [noise_levels(s, sampler, 5) for s in (Schedule(), Schedule(**LINEAR))]
  results = [run(grid) for grid in grids]
  assert len(traces) == 1
  assert np.abs(results[0] - results[1]).max() > 1e-3


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_only_stochastic_samplers_use_noise(init, sampler):
  asked = []
  grid = noise_levels(Schedule(), sampler, 3)
  sample(sampler, shrink, grid, init, lambda i: asked.append(i) or jnp.zeros(SHAPE))
  assert bool(asked) == (sampler in STOCHASTIC)


@pytest.mark.parametrize('sampler', STOCHASTIC)
def test_only_the_noise_of_the_last_step_has_no_effect(init, sampler):
  grid, noises = noise_levels(Schedule(), sampler, 4), torch_noise(4)
  run = jax.jit(lambda noises: sample(sampler, shrink, grid, init, lambda i: noises[i]))
  for i in range(4):
    changed = noises.copy()
    changed[i] += 1
    assert np.array_equal(run(changed), run(noises)) == (i == 3)


@pytest.mark.parametrize(('sampler', 'expected'), [('heun', 39), ('dpmpp_2m', 20), ('euler', 20)])
def test_the_number_of_network_calls_is_as_stated(init, sampler, expected):
  calls = []
  denoise = lambda x, sigma: calls.append(1) or shrink(x, sigma)
  with jax.disable_jit():
    sample(sampler, denoise, noise_levels(Schedule(), sampler, 20), init)
  assert len(calls) == expected


def test_ancestral_sampling_of_normal_data_is_normal(rng):
  """The noise restores the variance: without it, the spread would shrink to 0.07."""
  init = rng.standard_normal((1, 64, 64, 4), dtype=np.float32)
  noises = jnp.asarray(rng.standard_normal((200, *init.shape), dtype=np.float32))
  grid = noise_levels(Schedule(), 'euler_ancestral', 200)
  latents = sample('euler_ancestral', shrink, grid, init, lambda i: noises[i])
  assert float(latents.std()) == pytest.approx(1, abs=0.05)


# Mistakes


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('euler_a', 20), 'euler_ancestral, euler, heun, ddim, dpmpp_2m, lcm'),
    (('euler', 20, 'even'), 'linspace, leading, trailing'),
    (('euler', 0), '1 to 1000'),
    (('euler', 1001), '1 to 1000'),
    (('lcm', 51), '1 to 50'),
    (('lcm', 4, 'leading'), 'lcm'),
    (('lcm', 4, None, True), 'karras'),
    (('ddim', 20, None, True), 'karras'),
    (('dpmpp_2m', 1000), 'use fewer'),
    (('euler', 1000, 'leading'), 'use fewer'),
  ],
)
def test_mistakes_are_named_with_the_choices(arguments, message):
  with pytest.raises(InputError, match=message):
    noise_levels(Schedule(), *arguments)


def test_sampling_names_an_unknown_sampler():
  with pytest.raises(InputError, match='euler_ancestral, euler'):
    sample('plms', shrink, noise_levels(Schedule(), 'euler', 2), jnp.zeros(SHAPE))


@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
def test_half_precision_errors_of_lcm_are_near_those_of_others(prediction_type, rng):
  """The exact network of normal data, with bfloat16 input and output as ours."""
  schedule = Schedule(prediction_type=prediction_type)
  shape, spread = (2, 16, 16, 4), 0.3
  mean, start = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
  noise = jnp.asarray(rng.standard_normal((20, *shape)), jnp.float32)

  def network(dtype):
    def predict(x, timestep):
      x = x.astype(dtype).astype(jnp.float32)
      sigma = timestep_to_sigma(schedule, timestep)
      signal = 1 / jnp.sqrt(1 + sigma**2)
      level = sigma * signal
      share = signal * spread**2 / ((signal * spread) ** 2 + level**2)
      clean = mean + share * (x - signal * mean)
      eps = (x - signal * clean) / level
      return (eps if prediction_type == 'epsilon' else signal * eps - level * clean).astype(dtype)

    return predict

  def error(sampler, steps):
    grid = noise_levels(schedule, sampler, steps)
    runs = [
      sample(sampler, denoiser(network(dtype), schedule), grid, start, lambda i: noise[i])
      for dtype in (jnp.float32, jnp.bfloat16)
    ]
    return float(jnp.sqrt(jnp.mean((runs[0] - runs[1]) ** 2)))

  others = max(error(sampler, 10) for sampler in ('euler', 'dpmpp_2m'))
  assert error('lcm', 4) < 2 * others < 0.005  # of latents whose spread is about one
  assert error('lcm', 8) < 1.5 * others
