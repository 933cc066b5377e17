"""Inversion: diffusers' scheduler backwards, and a photograph that comes back under guidance."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch
import torch_models as reference
from flax import nnx

from ip2p_jax import inversion, pair_program
from ip2p_jax import prompt_to_prompt as p2p
from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.networks import networks_of, params_of, tokenizer_of

UNET = reference.TINY_UNET | {'in_channels': 4}
STEPS = 10


@pytest.fixture(scope='module', params=['epsilon', 'v_prediction'])
def model(request):
  checkpoint, theirs = reference.checkpoint(UNET, Schedule(prediction_type=request.param))
  networks = networks_of(checkpoint)
  return (
    networks,
    params_of(checkpoint, networks, 'float32'),
    theirs,
    tokenizer_of(checkpoint, networks),
  )


def test_the_way_up_is_that_of_diffusers(model, rng):
  networks, params, theirs, _ = model
  latents = rng.standard_normal((2, 8, 8, 4), np.float32)
  context = rng.standard_normal((2, 77, 24), np.float32)
  grid = samplers.noise_levels(networks.schedule, 'ddim', STEPS)
  up = jax.jit(functools.partial(inversion.ddim_path, networks))
  path = up(params, latents, context, grid)

  scheduler = diffusers.DDIMInverseScheduler.from_config(
    networks.schedule.to_json() | {'timestep_spacing': 'leading'}
  )
  scheduler.set_timesteps(STEPS)
  x = reference.nchw(latents)
  with torch.no_grad():
    for i, t in enumerate(scheduler.timesteps):
      predicted = theirs['unet'](x, t, torch.tensor(context)).sample
      x = scheduler.step(predicted, t, x).prev_sample
      level = STEPS - 1 - i
      ours = path[level] / np.sqrt(grid.sigmas[level] ** 2 + 1)
      np.testing.assert_allclose(ours, reference.nhwc(x), atol=1e-4, rtol=1e-4)


def test_a_picture_comes_back_under_guidance(model, rng):
  networks, params, _, tokenizer = model
  images = rng.integers(0, 256, (2, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
  captions = ['a red star', 'two cats']
  grid = samplers.noise_levels(networks.schedule, 'ddim', STEPS)
  ids, nothing, scales = tokenizer(captions), tokenizer(['']), np.float32([3.0, 7.5])
  invert = jax.jit(functools.partial(inversion.invert, networks))
  found = invert(params, images, ids, nothing, scales, grid)

  request = pair_program.Request(
    token_ids=np.stack([ids, tokenizer(['a blue star', 'two dogs'])]),
    negative_ids=nothing,
    guidance=scales,
    seeds=np.uint32([0, 0]),
    grid=grid,
    control=p2p.Control(share_until=np.int32([5, 5])),
    init_noise=found.init_noise,
    null_contexts=found.null_contexts,
  )
  plan = pair_program.Plan('ddim', 8, 8)
  draw = jax.jit(functools.partial(pair_program.pair_program, networks, plan))
  latents = draw(params, request).latents
  plain = draw(params, request._replace(null_contexts=None)).latents
  truth = encoded(networks, params, images)
  error = lambda x: np.square(np.asarray(x[0]) - truth).mean((1, 2, 3))
  print(error(latents), error(plain))
  assert (error(latents) < 0.2 * error(plain)).all()


def encoded(networks, params, images):
  vae = nnx.merge(networks.vae_def, params['vae'])
  latents = vae.encode(images.astype(np.float32) / 127.5 - 1).mode()
  return np.asarray(latents) * networks.vae_config.scaling_factor
