"""Prompt-to-prompt from a photo: what the first image is, and the loop of direct inversion."""

import functools

import jax
import method_models
import numpy as np
import pytest

from ip2p_jax.diffusion import samplers
from ip2p_jax.evaluation.methods import prompt_to_prompt
from ip2p_jax.evaluation.methods.method import request
from ip2p_jax.evaluation.methods.prompt_to_prompt import Settings
from ip2p_jax.pairs import alignment, inversion
from ip2p_jax.pairs.prompt_to_prompt import Control
from ip2p_jax.pipeline import parts

SETTINGS = Settings(steps=5)
CAPTION = method_models.CAPTIONS[0]


def inputs(texts, settings=SETTINGS, control=None):
  model = method_models.base()
  grid = samplers.noise_levels(model.networks.schedule, 'ddim', settings.steps)
  if control is None:
    control = prompt_to_prompt.controls(model.tokenizer, texts, settings)
  photos = method_models.photos(len(texts.captions))
  return request(model, photos, texts, grid, np.float32(settings.guidance), control)


@functools.cache
def compiled(invert):
  return jax.jit(functools.partial(prompt_to_prompt.pairs, invert, method_models.base().networks))


def latents(invert, given):
  """[2, P, h, w, 4]."""
  return np.asarray(compiled(invert)(method_models.base().params, given).latents)


def clean(count):
  model = method_models.base()
  encode = jax.jit(functools.partial(parts.scaled_latents, model.networks))
  return np.asarray(encode(model.params, method_models.photos(count)))


@pytest.mark.long
def test_direct_inversion_draws_the_first_image_exactly():
  drawn = latents(prompt_to_prompt.own_path, inputs(method_models.texts(2)))
  np.testing.assert_allclose(drawn[0], clean(2), atol=1e-5)
  assert np.abs(drawn[1] - drawn[0]).mean() > 1e-2


@pytest.mark.slow
def test_equal_captions_keep_the_image_nearest_with_null_texts():
  given, truth, errors = inputs(method_models.same_texts(2)), clean(2), {}
  for invert in (prompt_to_prompt.null_texts, prompt_to_prompt.ddim_noise):
    first, second = latents(invert, given)
    np.testing.assert_allclose(second, first, atol=1e-4)
    errors[invert] = np.square(first - truth).mean((1, 2, 3))
  assert (errors[prompt_to_prompt.null_texts] < errors[prompt_to_prompt.ddim_noise]).all()


@pytest.mark.long
def test_direct_inversion_is_the_published_loop():
  """The published form: the loss of the first image at each step is added to it alone."""
  model, texts = method_models.base(), method_models.texts(2)
  given = inputs(texts, control=Control())
  drawn = latents(prompt_to_prompt.own_path, given)
  networks, params, grid = model.networks, model.params, given.grid

  @jax.jit
  def conditions(params):
    ids = np.stack([given.source_ids, given.target_ids])
    return parts.encode_texts(networks, params, ids, given.null_ids)

  (source, target), nothing = conditions(params)
  both = np.concatenate([source, target])
  path = jax.jit(functools.partial(inversion.ddim_path, networks))(params, clean(2), source, grid)

  @jax.jit
  def noise(params, x, t):
    args = both, nothing, parts.BY_TEXT, x, t
    with_text, without = parts.predict_by_text(networks, params, *args)
    return without + SETTINGS.guidance * (with_text - without)

  x = np.concatenate([path[0], path[0]])
  for i, t in enumerate(grid.timesteps):
    sigma, below = grid.sigmas[i], grid.sigmas[i + 1]
    x = x + (below - sigma) * np.asarray(noise(params, x / np.sqrt(sigma**2 + 1), t))
    x[:2] += path[i + 1] - x[:2]
  expected = (x * grid.final_scale).reshape(drawn.shape)
  np.testing.assert_allclose(drawn, expected, atol=1e-4, rtol=1e-4)


def test_given_words_are_weighted_and_bound_the_edit():
  texts = method_models.texts(2)._replace(words=[('red', 'blue'), None])
  control = inputs(texts, SETTINGS._replace(steps=10)).control
  tokens = method_models.base().tokenizer
  np.testing.assert_array_equal(control.blend.words[0, 0], alignment.mask(tokens, CAPTION, ['red']))
  assert not control.blend.words[1].any()
  np.testing.assert_array_equal(control.blend.start, [2, 10])  # 10 of 10 steps is never
  weights = control.injection.equalizer
  blue = alignment.places(tokens, 'a blue star', 'blue')
  assert (weights[0, blue] == 2).all() and weights.sum() == weights.size + len(blue)


def test_a_word_that_is_not_in_its_caption_is_ignored():
  texts, settings = method_models.texts(1), SETTINGS._replace(steps=10)
  with pytest.warns(UserWarning, match="'green' is not in 'a red star'; ignored"):
    control = inputs(texts._replace(words=[('green', 'blue')]), settings).control
  assert not control.blend.words[0, 0].any() and control.blend.words[0, 1].any()
  assert control.blend.start == 2 and control.injection.equalizer.max() == 2
  with pytest.warns(match="'dogs' is not in"), pytest.warns(match="'cats' is not in"):
    control = inputs(texts._replace(words=[('dogs', 'cats')]), settings).control
  assert control.blend.start == 10 and control.injection.equalizer.max() == 1  # 10 is never


@pytest.mark.long
def test_a_method_edits_images():
  photos = method_models.photos(2)
  edits = prompt_to_prompt.ddim(method_models.base(), SETTINGS)(photos, method_models.texts(2))
  assert edits.shape == photos.shape and edits.dtype == np.uint8
  assert (edits != photos).any()
