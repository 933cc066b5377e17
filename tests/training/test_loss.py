"""The loss and its gradients against PyTorch, and the distributions of random draws."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as ref
from torch_losses import DROPOUT, torch_losses

from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.layers import REMATS
from ip2p_jax.pipeline.networks import Networks, networks_of
from ip2p_jax.training import loss
from ip2p_jax.weights import names

torch = peers.module('torch')

B, SIDE, LATENT_SIDE = 8, 32, 8  # the tiny VAE divides sides by four


@pytest.fixture(scope='module')
def models():
  return make_models()


@pytest.fixture(scope='module')
def ours() -> tuple[Networks, dict]:
  return convert(tiny_models.checkpoint())


@pytest.fixture(scope='module')
def batch():
  return make_batch()


@pytest.fixture(scope='module')
def draws():
  return make_draws()


def make_models():
  return ref.models_of(tiny_models.checkpoint())


def convert(checkpoint):
  """Our networks, and their parameters as a step takes them."""
  networks = networks_of(checkpoint)
  params = {
    name: names.to_params(tensors, networks.shapes[name], name)
    for name, tensors in checkpoint.tensors.items()
  }
  return networks, params | {'null_ids': np.int32([598] + 76 * [599])}


def make_batch():
  rng = np.random.default_rng(0)
  return {
    'input_image': rng.integers(0, 256, (B, SIDE, SIDE, 3), np.uint8),
    'edited_image': rng.integers(0, 256, (B, SIDE, SIDE, 3), np.uint8),
    'token_ids': np.int32(np.column_stack([np.full(B, 598), rng.integers(0, 590, (B, 76))])),
    'weight': np.ones(B, np.float32),
    'index': np.arange(B, dtype=np.int32),
  }


def make_draws():
  """Two examples of each kind: text dropped, both dropped, image dropped, nothing dropped."""
  draws = loss.draw(0, 3, jnp.arange(B), (LATENT_SIDE, LATENT_SIDE, 4), Schedule())
  dropout = jnp.float32([0.0, 0.049, 0.05, 0.099, 0.10, 0.149, 0.15, 0.99])
  return draws._replace(dropout=dropout)


def our_losses(networks, params, batch, draws, **options):
  inputs = loss.encode(networks, params, batch, draws, DROPOUT)
  return loss.example_losses(networks, params['unet'], inputs, draws, **options)


@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('gamma', [0.0, 5.0])
def test_losses_equal_pytorchs(models, ours, batch, draws, prediction_type, gamma):
  networks, params = ours
  networks = networks._replace(schedule=Schedule(prediction_type=prediction_type))
  mine = our_losses(networks, params, batch, draws, min_snr_gamma=gamma)
  theirs = torch_losses(models, batch, draws, prediction_type, gamma)
  np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('remat', REMATS)
def test_every_gradient_equals_pytorchs(models, ours, batch, draws, remat):
  of_loss, of_gradients = gradient_errors(models, ours, batch, draws, remat)
  assert of_loss < 1e-5
  name = max(of_gradients, key=of_gradients.get)
  assert of_gradients[name] < 1e-4, name


def gradient_errors(models, ours, batch, draws, remat='none'):
  """Relative errors of the loss, and of every parameter's gradient and their norm, by name."""
  networks, params = ours
  unet = models['unet']
  unet.zero_grad()
  theirs = torch_losses(models, batch, draws).mean()
  theirs.backward()
  expected = {name: p.grad.numpy() for name, p in unet.named_parameters()}

  def mean_loss(unet_params):
    return our_losses(
      networks, params | {'unet': unet_params}, batch, draws, remat=REMATS[remat]
    ).mean()

  mine, grads = jax.jit(jax.value_and_grad(mean_loss))(params['unet'])
  grads = names.to_tensors(grads)
  assert grads.keys() == expected.keys()
  errors = {name: ref.relative_error(grads[name], expected[name]) for name in grads}
  norm = lambda tree: np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in tree.values()))
  errors['norm'] = abs(norm(grads) / norm(expected) - 1)
  return abs(float(mine) / theirs.item() - 1), errors


def test_latents_computed_beforehand_give_the_same_inputs_to_half_precision(ours, batch, draws):
  networks, params = ours
  vae = loss.nnx.merge(networks.vae_def, params['vae'])
  edited, source = (
    vae.encode(batch[name].astype(np.float32) / 127.5 - 1)
    for name in ('edited_image', 'input_image')
  )
  cached = {key: batch[key] for key in ('token_ids', 'weight', 'index')} | {
    'edited_mean': np.float16(edited.mean),
    'edited_log_variance': np.float16(edited.log_variance),
    'input_mean': np.float16(source.mean),
  }
  online = loss.encode(networks, params, batch, draws, DROPOUT)
  offline = loss.encode(networks, params, cached, draws, DROPOUT)
  np.testing.assert_allclose(offline.latents, online.latents, atol=2e-3)
  np.testing.assert_allclose(offline.image_latents, online.image_latents, atol=4e-3)
  np.testing.assert_array_equal(offline.context, online.context)


def test_text_to_image_sees_no_image(ours, batch, draws):
  networks, params = ours
  only_text = {key: value for key, value in batch.items() if key != 'input_image'}
  inputs = loss.encode(networks, params, only_text, draws, DROPOUT)
  assert inputs.image_latents is None
  np.testing.assert_array_equal(
    inputs.latents, loss.encode(networks, params, batch, draws, DROPOUT).latents
  )


def test_no_two_examples_of_any_steps_share_a_draw():
  index, shape = jnp.arange(64), (2, 2, 4)
  first, second = (loss.draw(0, step, index, shape, Schedule()) for step in (0, 1))
  noise = np.concatenate([first.noise, second.noise, first.posterior_noise]).reshape(192, -1)
  assert len(np.unique(noise[:, 0])) == 192
  assert abs(np.corrcoef(noise)[np.triu_indices(192, 1)]).mean() < 0.25
  assert len(np.unique(np.concatenate([first.dropout, second.dropout]))) == 128


def test_an_examples_draws_depend_on_seed_step_and_index_only():
  shape = (4, 4, 4)
  together = loss.draw(7, 5, jnp.arange(16), shape, Schedule())
  alone = loss.draw(7, 5, jnp.int32([11]), shape, Schedule())
  for all_of_them, one in zip(together, alone, strict=True):
    np.testing.assert_array_equal(all_of_them[11], one[0])
  other_seed = loss.draw(8, 5, jnp.int32([11]), shape, Schedule())
  assert not np.any(np.asarray(other_seed.noise) == np.asarray(alone.noise))


def test_draws_ignore_jaxs_default_generator():
  threefry = loss.draw(0, 0, jnp.arange(2), (2, 2, 4), Schedule())
  with jax.default_prng_impl('rbg'):
    np.testing.assert_array_equal(
      loss.draw(0, 0, jnp.arange(2), (2, 2, 4), Schedule()).noise, threefry.noise
    )


def test_timesteps_and_conditioning_are_drawn_as_in_the_paper():
  draws = jax.jit(lambda: loss.draw(0, 0, jnp.arange(40_000), (1, 1, 4), Schedule()))()
  timesteps, r = np.asarray(draws.timesteps), np.asarray(draws.dropout)
  assert timesteps.min() == 0 and timesteps.max() == 999
  assert abs(timesteps.mean() - 499.5) < 5
  text, image = r < 2 * DROPOUT, (r >= DROPOUT) & (r < 3 * DROPOUT)
  for kind in (text & ~image, text & image, image & ~text):
    assert abs(kind.mean() - 0.05) < 0.004
  assert abs(np.asarray(draws.noise).std() - 1) < 0.01
