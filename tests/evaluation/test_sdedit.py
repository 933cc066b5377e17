"""Editing by a text-to-image model that was not trained to edit."""

import numpy as np
import pytest
import tiny_models
import torch_models as reference
import world

from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import sdedit
from ip2p_jax.pipeline.text_to_image import TextToImage
from ip2p_jax.training.previews import decode


@pytest.fixture(scope='module')
def base():
  unet = tiny_models.TINY_UNET | {'in_channels': 4}
  checkpoint = tiny_models.checkpoint(unet, Schedule(prediction_type='v_prediction'))
  return TextToImage.from_checkpoint(checkpoint, 'float32')


@pytest.fixture(scope='module')
def scenes():
  examples = [world.example(seed, 'test') for seed in range(3)]
  images = np.stack([world.picture(example.scene) for example in examples])
  return images, [example.edited_caption for example in examples]


@pytest.mark.long
def test_strength_0_reconstructs_the_image(base, scenes):
  images, captions = scenes
  edits = sdedit.edit(base, images, captions, strength=0.0, text_guidance=4.0, steps=10)
  vae = reference.models_of(tiny_models.checkpoint())['vae']
  latents = vae.encode(reference.nchw(images / np.float32(127.5) - 1)).latent_dist.mode()
  seen = decode(base.networks, base.params['vae'], reference.nhwc(latents))
  np.testing.assert_allclose(edits.astype(int), seen, atol=1)


@pytest.mark.long
def test_more_strength_keeps_less_of_the_image(base, scenes):
  images, captions = scenes

  def seen(strength):
    """How far apart the edits of an image and of its negative are."""
    options = {'strength': strength, 'text_guidance': 4.0, 'steps': 10}
    edits, negatives = (
      sdedit.edit(base, some, captions, **options).astype(int) for some in (images, 255 - images)
    )
    return np.abs(edits - negatives).mean()

  assert seen(0.1) > 2 * seen(0.5) > 4 * seen(1.0)


@pytest.mark.long
def test_an_edit_depends_on_image_caption_and_seed(base, scenes):
  images, captions = scenes
  options = {'strength': 0.5, 'text_guidance': 4.0, 'steps': 10, 'seed': 0}
  edits = sdedit.edit(base, images, captions, **options)
  for other in (
    sdedit.edit(base, 255 - images, captions, **options),
    sdedit.edit(base, images, captions[::-1], **options),
    sdedit.edit(base, images, captions, **options | {'seed': 1}),
    sdedit.edit(base, images, captions, **options | {'text_guidance': 1.0}),
  ):
    assert not np.array_equal(other[0], edits[0])
  np.testing.assert_array_equal(sdedit.edit(base, images, captions, **options), edits)


def test_strength_rounds_the_steps_down(base, scenes):
  options = {'text_guidance': 4.0, 'steps': 10}
  edits = sdedit.edit(base, *scenes, strength=0.5, **options)
  np.testing.assert_array_equal(sdedit.edit(base, *scenes, strength=0.59, **options), edits)
  assert not np.array_equal(sdedit.edit(base, *scenes, strength=0.6, **options), edits)


def test_noise_depends_on_the_example_not_on_the_batch(base, scenes):
  images, captions = scenes
  options = {'strength': 0.5, 'text_guidance': 4.0, 'steps': 10}
  edits = sdedit.edit(base, images, captions, **options)
  turned = sdedit.edit(base, images[::-1], captions[::-1], indices=[2, 1, 0], **options)[::-1]
  np.testing.assert_allclose(edits.astype(int), turned, atol=1)


def test_a_strength_beyond_one_is_refused(base, scenes):
  with pytest.raises(InputError, match=r'strength is 1.5; it goes from 0'):
    sdedit.edit(base, *scenes, strength=1.5, text_guidance=4.0)
