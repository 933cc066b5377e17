"""Inversion: diffusers' backward scheduler, and an image that guided DDIM reproduces."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference
from flax import nnx

from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.pairs import inversion, program
from ip2p_jax.pairs.prompt_to_prompt import Control
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of

diffusers = peers.module('diffusers')
torch = peers.module('torch')

UNET = tiny_models.TINY_UNET | {'in_channels': 4}
STEPS = 5


@pytest.fixture(scope='module', params=['epsilon', 'v_prediction'])
def model(request):
  checkpoint = tiny_models.checkpoint(UNET, Schedule(prediction_type=request.param))
  networks = networks_of(checkpoint)
  return (
    networks,
    params_of(checkpoint, networks, 'float32'),
    functools.cache(lambda: reference.models_of(checkpoint)),
    tokenizer_of(checkpoint, networks),
  )


@pytest.mark.long
def test_the_inverse_path_is_that_of_diffusers(model, rng):
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
      predicted = theirs()['unet'](x, t, torch.tensor(context)).sample
      x = scheduler.step(predicted, t, x).prev_sample
      level = STEPS - 1 - i
      ours = path[level] / np.sqrt(grid.sigmas[level] ** 2 + 1)
      np.testing.assert_allclose(ours, reference.nhwc(x), atol=1e-4, rtol=1e-4)


def their_null_texts(unet, schedule, path, grid, context, nothing, scale):
  """The optimisation of one image, as in the null_text notebook of google/prompt-to-prompt."""
  sigmas = [float(sigma) for sigma in grid.sigmas]
  unit = lambda x, sigma: x / (sigma**2 + 1) ** 0.5
  x, nothing, texts = path[0], nothing.clone(), []
  for i, t in enumerate(grid.timesteps):
    sigma, below = sigmas[i], sigmas[i + 1]

    def noise(text, x=x, sigma=sigma, t=float(t)):
      out = unet(unit(x, sigma), t, text).sample
      if schedule.prediction_type == 'v_prediction':
        out = (out + sigma * unit(x, sigma)) / (sigma**2 + 1) ** 0.5
      return out

    def down(text, x=x, step=below - sigma, noise=noise, with_text=noise(context).detach()):
      without_text = noise(text)
      return x + step * (without_text + scale * (with_text - without_text))

    nothing = nothing.detach().requires_grad_()
    place = i * min(1, 50 / len(grid.timesteps))  # of 50 steps, as published
    optimizer = torch.optim.Adam([nothing], lr=1e-2 * (1 - place / 100))
    for _ in range(10):
      loss = torch.nn.functional.mse_loss(unit(down(nothing), below), unit(path[i + 1], below))
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      if loss.item() < 1e-5 + place * 2e-5:
        break
    texts.append(nothing.detach().clone())
    with torch.no_grad():
      x = down(nothing)
  return texts, x


@pytest.mark.long
def test_empty_texts_are_trained_as_published(model, rng):
  networks, params, theirs, _ = model
  steps, scales = 3, np.float32([1.5, 3.0])
  grid = samplers.noise_levels(networks.schedule, 'ddim', steps)
  latents = rng.standard_normal((2, 8, 8, 4), np.float32)
  context, nothing = rng.standard_normal((2, 2, 77, 24), np.float32)

  @jax.jit
  def ours(params):
    path = inversion.ddim_path(networks, params, latents, context, grid)
    return path, inversion.null_texts(networks, params, path, context, nothing, scales, grid)

  path, texts = ours(params)
  for i in range(2):
    to_torch = lambda x, i=i: torch.tensor(np.asarray(x[i : i + 1]))
    their_path = [reference.nchw(np.asarray(x[i : i + 1])) for x in path]
    expected, _ = their_null_texts(
      theirs()['unet'], networks.schedule, their_path, grid, to_torch(context), to_torch(nothing),
      float(scales[i]),
    )  # fmt: skip
    for step in range(steps):
      difference = np.abs(np.asarray(texts[step, i]) - expected[step][0].numpy())
      # Adam's first updates have the sign of a gradient, and some gradients are nearly zero.
      assert difference.mean() < 1e-4
      assert np.abs(expected[step][0].numpy() - nothing[i]).mean() > 1e-2


@pytest.mark.parametrize('steps', [5, 50, 51, 120, 500])
def test_any_number_of_steps_uses_the_published_rates(steps, monkeypatch):
  """If the path is far away, each update of Adam has the length of its rate, in one direction."""
  monkeypatch.setattr(inversion, '_unet', lambda *_: lambda x, t, text: text.mean(1)[:, None, None])
  networks = types.SimpleNamespace(schedule=Schedule())
  grid = samplers.noise_levels(networks.schedule, 'ddim', steps)
  path = jnp.full((steps + 1, 1, 2, 2, 4), 1e4).at[0].set(0)
  text, scale = np.zeros((1, 2, 4), np.float32), np.float32([3.0])
  texts = inversion.null_texts(networks, None, path, text, text, scale, grid)
  moved = np.diff(np.asarray(texts)[:, 0].mean((1, 2)), prepend=0)
  place = np.arange(steps) * (1 if steps <= 50 else 50 / steps)
  np.testing.assert_allclose(moved, 10 * 1e-2 * (1 - place / 100), rtol=2e-2)
  assert moved.min() > 0.05


@pytest.mark.slow
def test_an_image_is_nearer_with_its_own_empty_texts(model, rng):
  networks, params, _, tokenizer = model
  images = rng.integers(0, 256, (2, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
  captions = ['a red star', 'two cats']
  grid = samplers.noise_levels(networks.schedule, 'ddim', STEPS)
  ids, nothing, scales = tokenizer(captions), tokenizer(['']), np.float32([3.0, 7.5])
  invert = jax.jit(functools.partial(inversion.invert, networks))
  inverted = invert(params, images, ids, nothing, scales, grid)
  request = program.PairRequest(
    token_ids=np.stack([ids, tokenizer(['a blue star', 'two dogs'])]),
    negative_ids=nothing,
    guidance=scales,
    seeds=np.uint32([0, 0]),
    grid=grid,
    control=Control(share_until=np.int32([3, 3])),
    init_noise=inverted.init_noise,
    null_contexts=inverted.null_contexts,
  )
  spec = program.PairSpec('ddim', 8, 8)
  draw = jax.jit(functools.partial(program.pair_program, networks, spec))
  truth = encoded(networks, params, images)
  error = lambda pairs: np.square(np.asarray(pairs.latents[0]) - truth).mean((1, 2, 3))
  plain = error(draw(params, request._replace(null_contexts=None)))
  assert (error(draw(params, request)) < 0.8 * plain).all()


def encoded(networks, params, images):
  vae = nnx.merge(networks.vae_def, params['vae'])
  latents = vae.encode(images.astype(np.float32) / 127.5 - 1).mode()
  return np.asarray(latents) * networks.vae_config.scaling_factor
