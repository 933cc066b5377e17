"""Edit-friendly inversion: the paper's formulas in torch, and an image that comes back."""

import functools

import jax
import method_models
import numpy as np
import peers
import pytest
import torch_models as reference

from ip2p_jax.diffusion import noise, samplers
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.methods import edit_friendly
from ip2p_jax.evaluation.methods.edit_friendly import Settings
from ip2p_jax.evaluation.methods.method import Texts, request
from ip2p_jax.pipeline import parts

torch, diffusers = peers.module('torch'), peers.module('diffusers')
ledits = peers.module('diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion')


def inputs(model, texts, settings):
  grid = samplers.noise_levels(model.networks.schedule, 'ddim', settings.steps)
  grid = samplers.begin_at(grid, settings.skip)
  return request(model, method_models.photos(2), texts, grid, settings)


@functools.cache
def compiled(f, model):
  return jax.jit(functools.partial(f, model.networks))


def latents(model, given):
  return np.asarray(compiled(edit_friendly.edited, model)(model.params, given).latents)


def clean(model):
  encode = compiled(parts.scaled_latents, model)
  return np.asarray(encode(model.params, method_models.photos(2)))


@pytest.mark.long
@pytest.mark.parametrize('prediction_type', ['epsilon', 'v_prediction'])
def test_equal_captions_give_the_image_back(prediction_type):
  model = method_models.base(prediction_type)
  for skip in (0, 2):
    given = inputs(model, method_models.same_texts(2), Settings(5, skip, 3.5, 3.5))
    np.testing.assert_allclose(latents(model, given), clean(model), atol=1e-4)
  other = inputs(model, method_models.texts(2), Settings(5, 2))
  assert np.abs(latents(model, other) - clean(model)).mean() > 1e-2


def their_edit(model, given, settings):
  """Noise maps of the paper's equation 5, then samples with them, as the released code does."""
  theirs = method_models.torch_models()
  scheduler = diffusers.DDIMScheduler.from_config(
    model.networks.schedule.to_json() | {'timestep_spacing': 'leading'}
  )
  scheduler.set_timesteps(settings.steps)
  alphas = scheduler.alphas_cumprod
  encode = lambda ids: theirs['text_encoder'](torch.tensor(np.asarray(ids)).long())[0]
  source, target, nothing = map(encode, (given.source_ids, given.target_ids, given.null_ids))
  nothing = nothing.expand(source.shape)

  def predict(x, t, text, scale):
    without, with_text = (theirs['unet'](x, t, c).sample for c in (nothing, text))
    return without + scale * (with_text - without)

  x0 = reference.nchw(clean(model))
  keys = noise.image_keys(given.seeds, np.zeros_like(given.seeds))
  x = []
  for i, t in enumerate(scheduler.timesteps):
    drawn = reference.nchw(np.asarray(noise.step_noise(keys, i, (8, 8, 4))))
    x.append(alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * drawn)
  x.append(x0)
  maps = [
    ledits.compute_noise(
      scheduler, x[i + 1], x[i], t, predict(x[i], t, source, settings.source_guidance), 1.0
    )[0]
    for i, t in enumerate(scheduler.timesteps)
  ]
  if settings.drops_last:
    maps[-1] = torch.zeros_like(maps[-1])
  y = x[settings.skip]
  for i, t in list(enumerate(scheduler.timesteps))[settings.skip :]:
    predicted = predict(y, t, target, settings.target_guidance)
    y = scheduler.step(predicted, t, y, eta=1.0, variance_noise=maps[i]).prev_sample
  return reference.nhwc(y)


@pytest.mark.long
def test_edits_agree_with_the_noise_maps_of_diffusers():
  model = method_models.base()
  for drops_last in (False, True):
    settings = Settings(5, 1, drops_last=drops_last)
    given = inputs(model, method_models.texts(2), settings)
    with torch.no_grad():
      expected = their_edit(model, given, settings)
    np.testing.assert_allclose(latents(model, given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_an_edit_depends_on_its_seed_not_on_batch_or_devices():
  texts, photos = method_models.texts(3), method_models.photos(3)
  settings = Settings(3, 1)
  alone = edit_friendly.edit_friendly(method_models.base(), settings)(photos, texts)
  turned = Texts(*(column[::-1] for column in texts[:4]))
  shared = edit_friendly.edit_friendly(method_models.base(devices=2), settings)(
    photos[::-1], turned
  )
  np.testing.assert_allclose(alone.astype(int), shared[::-1], atol=1)


def test_a_skip_of_all_steps_is_refused():
  with pytest.raises(InputError, match='skip is 5 of 5 steps; leave at least one'):
    edit_friendly.edit_friendly(method_models.base(), Settings(5, 5))
