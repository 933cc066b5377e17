"""The schedule agrees with diffusers; an image's noise depends on its seed and index only."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ip2p_jax.diffusion import noise
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError

diffusers = peers.module('diffusers')
torch = peers.module('torch')

SHAPE = (8, 8, 4)
SCHEDULES = {
  'stable diffusion 1.5': Schedule(),
  'linear': Schedule(1100, 1e-4, 0.02, 'linear'),
  'cosine': Schedule(beta_schedule='squaredcos_cap_v2'),
  'short': Schedule(200),
}


@pytest.mark.parametrize('schedule', SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_agrees_with_diffusers(schedule):
  theirs = diffusers.EulerAncestralDiscreteScheduler.from_config(schedule.to_json())
  np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-7)
  expected = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5
  np.testing.assert_allclose(schedule.sigmas, expected.numpy(), rtol=1e-6)
  assert schedule.sigmas.dtype == schedule.alphas_cumprod.dtype == np.float32


def test_stable_diffusion_has_its_known_noise_levels():
  schedule = Schedule()
  chosen = [0, 1, 500, 998, 999]
  np.testing.assert_allclose(
    schedule.alphas_cumprod[chosen],
    [0.99914998, 0.99829602, 0.27633247, 0.00471670, 0.00466010],
    rtol=2e-6,
  )
  np.testing.assert_allclose(
    schedule.sigmas[chosen], [0.02916753, 0.04131448, 1.61827970, 14.5262814, 14.6146469], rtol=5e-7
  )


def test_the_config_of_any_related_scheduler_is_read():
  options = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
  options |= {'prediction_type': 'v_prediction', 'steps_offset': 1}
  sisters = ('DDIM', 'PNDM', 'EulerAncestralDiscrete', 'EulerDiscrete', 'HeunDiscrete', 'LCM')
  for name in (*sisters, 'DPMSolverMultistep', 'LMSDiscrete', 'DDPM', 'UniPCMultistep'):
    scheduler = getattr(diffusers, f'{name}Scheduler')(**options)
    schedule = Schedule.from_json(dict(scheduler.config))
    expected = scheduler.config.get('set_alpha_to_one', True)
    assert schedule == Schedule(prediction_type='v_prediction', set_alpha_to_one=expected), name


def test_schedule_survives_being_written_and_read():
  for schedule in SCHEDULES.values():
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_every_scheduler_of_diffusers_reads_the_written_config():
  config = Schedule(prediction_type='v_prediction').to_json()
  for name in ('EulerAncestralDiscrete', 'DDIM', 'PNDM', 'DPMSolverMultistep', 'LCM'):
    theirs = getattr(diffusers, f'{name}Scheduler').from_config(config)
    np.testing.assert_allclose(theirs.alphas_cumprod, Schedule().alphas_cumprod, rtol=3e-7)
    assert theirs.config.prediction_type == 'v_prediction'
    assert theirs.config.get('clip_sample', False) is False
    assert theirs.config.steps_offset == 1


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('prediction_type', 'sample'),
    ('beta_schedule', 'exp'),
    ('trained_betas', [0.1, 0.2]),
    ('rescale_betas_zero_snr', True),
    ('thresholding', True),
    ('beta_start', '0.1'),
    ('num_train_timesteps', 0),
    ('steps_offset', 0.5),
  ],
)
def test_an_unsupported_schedule_names_the_file_and_the_key(key, value):
  config = Schedule().to_json() | {key: value}
  with pytest.raises(InputError, match=rf'scheduler/config.json.*{key}'):
    Schedule.from_json(config, name='scheduler/config.json')


def test_config_of_another_family_is_refused():
  with pytest.raises(InputError, match='beta_start'):
    Schedule.from_json(dict(diffusers.FlowMatchEulerDiscreteScheduler().config))
  with pytest.raises(InputError, match='dictionary'):
    Schedule.from_json([])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_noisy_latents_and_velocity_agree_with_diffusers(rng, dtype):
  schedule, theirs = Schedule(), diffusers.DDPMScheduler.from_config(Schedule().to_json())
  latents, random = (jnp.asarray(rng.standard_normal((4, *SHAPE)), dtype) for _ in range(2))
  timesteps = np.array([0, 1, 500, 999])
  tensors = [torch.tensor(np.array(a, np.float32)) for a in (latents, random)]
  tensors.append(torch.tensor(timesteps))
  for ours, expected in (
    (noise.add_noise(schedule, latents, random, timesteps), theirs.add_noise(*tensors)),
    (noise.velocity(schedule, latents, random, timesteps), theirs.get_velocity(*tensors)),
  ):
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)


def _noise(seeds, indices):
  keys = noise.image_keys(np.asarray(seeds, np.uint32), np.asarray(indices, np.uint32))
  steps = [noise.step_noise(keys, i, SHAPE) for i in (0, 7)]
  return np.stack([noise.initial_noise(keys, SHAPE), *steps], 1)  # [B, 3, h, w, 4]


def test_an_image_has_the_same_noise_alone_and_batched():
  seeds, indices = [5, 5, 9, 2**32 - 1, 0, 1, 2, 3], [0, 1, 0, 3, 2**32 - 1, 1, 2, 3]
  together = _noise(seeds, indices)
  for i in range(8):
    np.testing.assert_array_equal(together[i : i + 1], _noise(seeds[i : i + 1], indices[i : i + 1]))


def test_noise_differs_between_seeds_indices_and_steps():
  every = _noise([0, 0, 1, 1, 2], [0, 1, 0, 1, 0]).reshape(15, -1)
  apart = np.abs(every[:, None] - every[None]).mean(-1) + np.eye(15)
  assert apart.min() > 0.9  # two independent standard normals are 1.13 apart


def test_noise_is_standard_normal():
  keys = noise.image_keys(np.full(64, 3), np.arange(64))
  for values in (noise.initial_noise(keys, (32, 32, 4)), noise.step_noise(keys, 0, (32, 32, 4))):
    assert abs(float(values.mean())) < 0.01  # 5 standard errors
    assert abs(float(values.std()) - 1) < 0.007


def test_noise_is_the_same_under_jit_and_on_eight_devices():
  def draw(seeds, indices, i):
    keys = noise.image_keys(seeds, indices)
    return noise.initial_noise(keys, SHAPE), noise.step_noise(keys, i, SHAPE)

  seeds, indices = np.arange(8, dtype=np.uint32), np.arange(8, dtype=np.uint32)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec('data'))
  spread = jax.jit(draw, in_shardings=(split, split, None), out_shardings=split)
  for expected, one, eight in zip(
    draw(seeds, indices, 7),
    jax.jit(draw)(seeds, indices, 7),
    spread(seeds, indices, 7),
    strict=True,
  ):
    np.testing.assert_array_equal(one, eight)
    np.testing.assert_allclose(one, expected, atol=1e-6)


def test_noise_does_not_follow_the_default_generator():
  expected = _noise([1, 2], [0, 1])
  with jax.default_prng_impl('rbg'):
    np.testing.assert_array_equal(_noise([1, 2], [0, 1]), expected)
