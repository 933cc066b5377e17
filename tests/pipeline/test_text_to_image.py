"""Images from texts: agreement with diffusers' pipelines, and properties for any weights."""

import jax
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference
from PIL import Image

from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.sampling import Sampling
from ip2p_jax.pipeline.text_to_image import TextToImage, first_step

torch = peers.module('torch')
diffusers, transformers = peers.module('diffusers'), peers.module('transformers')

UNET = tiny_models.ONE_LEVEL | {'in_channels': 4, 'sample_size': 8}
TEXTS = ['a red boat on a lake', 'winter']


def checkpoint(prediction_type='epsilon'):
  return tiny_models.checkpoint(UNET, Schedule(prediction_type=prediction_type))


@pytest.fixture(scope='module')
def model():
  return TextToImage.from_checkpoint(checkpoint(), 'float32')


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  for name, content in reference.tokenizer_files().items():
    (folder / name).write_bytes(content)
  return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture
def photos(rng):
  """uint8 [2, 32, 32, 3]."""
  y, x = np.mgrid[:32, :32] / 32
  smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x + 5 * y)], -1)
  return np.round(255 * np.stack([smooth, smooth[::-1]])).astype(np.uint8)


def theirs(kind, tokenizer, sampler, prediction_type, step_noise, **options):
  """Scaled latents of diffusers' pipeline, NHWC."""
  source = checkpoint(prediction_type)
  pipeline = getattr(diffusers, kind)(
    **reference.models_of(source),
    tokenizer=tokenizer,
    scheduler=reference.scheduler(sampler, Schedule(prediction_type=prediction_type)),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipeline.set_progress_bar_config(disable=True)
  with torch.no_grad(), reference.given_noise(step_noise):
    return reference.nhwc(
      pipeline(TEXTS, negative_prompt=['fog'] * 2, output_type='latent', **options).images
    )


@pytest.mark.parametrize(('sampler', 'prediction_type'), [
  ('euler_ancestral', 'v_prediction'),
  ('ddim', 'epsilon'),
  ('dpmpp_2m', 'v_prediction'),
])  # fmt: skip
def test_drawing_agrees_with_diffusers(tokenizer, rng, sampler, prediction_type):
  init_noise = rng.standard_normal((2, 8, 12, 4), np.float32)
  step_noise = rng.standard_normal((5, 2, 8, 12, 4), np.float32)
  expected = theirs(
    'StableDiffusionPipeline', tokenizer, sampler, prediction_type, step_noise,
    height=32, width=48, num_inference_steps=5, guidance_scale=7.5,
    latents=reference.nchw(init_noise),
  )  # fmt: skip
  drawn = TextToImage.from_checkpoint(checkpoint(prediction_type), 'float32').draw_arrays(
    TEXTS, Sampling(5, sampler), size=(32, 48), negative='fog',
    init_noise=init_noise, step_noise=step_noise,
  )  # fmt: skip
  assert reference.relative_error(drawn.latents, expected) <= 5e-5


@pytest.mark.long
@pytest.mark.parametrize(('sampler', 'prediction_type', 'strength'), [
  ('euler_ancestral', 'v_prediction', 1.0),
  ('euler_ancestral', 'epsilon', 0.6),
  ('heun', 'epsilon', 0.6),
  ('ddim', 'epsilon', 0.5),
  ('dpmpp_2m', 'v_prediction', 0.6),
  ('lcm', 'epsilon', 0.8),
])  # fmt: skip
def test_drawing_from_an_image_agrees_with_diffusers(
  tokenizer, photos, rng, sampler, prediction_type, strength
):
  init_noise = rng.standard_normal((2, 8, 8, 4), np.float32)
  step_noise = rng.standard_normal((5, 2, 8, 8, 4), np.float32)
  with reference.noisy_image(init_noise):
    expected = theirs(
      'StableDiffusionImg2ImgPipeline', tokenizer, sampler, prediction_type,
      step_noise[first_step(5, strength) :], image=[Image.fromarray(photo) for photo in photos],
      strength=strength, num_inference_steps=5, guidance_scale=7.5,
    )  # fmt: skip
  drawn = TextToImage.from_checkpoint(checkpoint(prediction_type), 'float32').draw_arrays(
    TEXTS, Sampling(5, sampler), images=photos, strength=strength, negative='fog',
    init_noise=init_noise, step_noise=step_noise,
  )  # fmt: skip
  assert reference.relative_error(drawn.latents, expected) <= 5e-5


def small(model, text='a boat', sampling=Sampling(2), **options):
  return model.draw_arrays([text], sampling, **options)


@pytest.mark.long
def test_one_of_three_is_the_same_alone(model):
  together = model.draw_arrays(['a hill', 'a boat', 'a lake'], Sampling(2), seeds=5)
  alone = small(model, seeds=5, indices=[1])
  assert together.images.shape == (3, 32, 32, 3)  # made by eight devices
  assert alone.images.devices() == {jax.devices()[0]}
  assert reference.relative_error(alone.latents[0], np.asarray(together.latents[1])) <= 1e-5


def test_other_texts_scales_seeds_and_strengths_compile_nothing(model, photos):
  small(model, images=photos[:1], strength=0.5)
  small(model)
  before = model._alone.whole._cache_size()
  small(model, 'a lake with many boats', seeds=7, text_guidance=3.0, negative='fog')
  small(model, 'a lake', images=photos[:1], strength=1.0)
  assert model._alone.whole._cache_size() == before


def test_progress_counts_remaining_steps_and_does_not_change_the_result(model, photos):
  seen = []
  expected = small(model, images=photos[:1], strength=0.5)
  counted = small(
    model, images=photos[:1], strength=0.5, progress=lambda *numbers: seen.append(numbers)
  )
  assert reference.relative_error(counted.latents, np.asarray(expected.latents)) <= 1e-5
  assert seen == [(0, 1), (1, 1)]


@pytest.mark.long
def test_without_guidance_one_branch_gives_the_same_result(model):
  nearly = np.nextafter(np.float32(1), np.float32(2))
  unguided = np.asarray(small(model, text_guidance=1.0).latents)
  assert reference.relative_error(small(model, text_guidance=nearly).latents, unguided) <= 1e-4
  run = lambda interval: small(model, sampling=Sampling(2, interval=interval)).latents
  assert reference.relative_error(run((0.5, 0.5)), unguided) <= 1e-5
  assert reference.relative_error(run((0.0, 0.5)), unguided) > 1e-3


def test_a_variation_equals_the_image_of_its_seed(model):
  both = model.draw('a boat', Sampling(2), seed=[1, 2], batch_size=1)
  (second,) = model.draw('a boat', Sampling(2), seed=2)
  assert [image.size for image in both] == [(32, 32)] * 2  # the checkpoint's size
  assert np.abs(np.asarray(both[1], int) - np.asarray(second, int)).max() <= 1
  assert np.any(np.asarray(both[0]) != np.asarray(both[1]))


def test_a_result_has_the_size_and_transparency_of_init(model):
  init = Image.new('RGBA', (50, 50), (200, 10, 10, 77))
  (image,) = model.draw('a boat', Sampling(2), init=init, seed=1)
  assert image.size == (50, 50) and image.mode == 'RGBA'
  assert (np.asarray(image)[..., 3] == 77).all()


INIT = Image.new('RGB', (32, 32))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'texts': ' '}, 'the text is empty'),
    ({'size': 30}, 'size is 30x30; sides must be multiples of 4'),
    ({'text_guidance': float('nan')}, 'text_guidance'),
    ({'text_guidance': 1.0, 'negative': 'fog'}, 'negative: of no use'),
    ({'seed': -1}, 'seed'),
    ({'texts': ['a', 'b'], 'seed': [1, 2, 3]}, '2 texts for 3 images'),
    ({'init': INIT, 'strength': 1.1}, 'strength is 1.1; it goes from 0'),
    ({'init': INIT, 'strength': 0.4}, 'strength 0.4 leaves none of 2 steps'),
    ({'init_noise': np.zeros((3, 8, 8, 4))}, 'init_noise has shape .* for 1 results'),
    ({'batch_size': 0}, 'batch_size'),
  ],
)
def test_a_wrong_value_is_named(model, options, message):
  arguments = {'texts': 'a boat', 'sampling': Sampling(2), 'size': 32} | options
  with pytest.raises(InputError, match=message):
    model.draw(**arguments)


def test_an_editor_is_refused():
  with pytest.raises(InputError, match=r'8 input channels .* needs a text-to-image checkpoint'):
    TextToImage.from_checkpoint(tiny_models.checkpoint())
