"""Editing by a text-to-image model that has not learned to edit."""

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
  images = np.stack([world.picture(one.scene) for one in examples])
  return images, [one.edited_caption for one in examples]


@pytest.mark.long
def test_no_strength_gives_the_image_as_the_autoencoder_sees_it(base, scenes):
  images, captions = scenes
  edits = sdedit.edit(base, images, captions, strength=0.0, text_guidance=4.0, steps=10)
  vae = reference.models_of(tiny_models.checkpoint())['vae']
  latents = vae.encode(reference.nchw(images / np.float32(127.5) - 1)).latent_dist.mode()
  seen = decode(base.networks, base.params['vae'], reference.nhwc(latents))
  np.testing.assert_allclose(edits.astype(int), seen, atol=1)


@pytest.mark.long
def test_the_more_strength_the_less_of_the_image_is_seen(base, scenes):
  images, captions = scenes

  def seen(strength):
    """How far apart the edits of an image and of its negative are."""
    how = {'strength': strength, 'text_guidance': 4.0, 'steps': 10}
    both = [sdedit.edit(base, some, captions, **how).astype(int) for some in (images, 255 - images)]
    return np.abs(both[0] - both[1]).mean()

  assert seen(0.1) > 2 * seen(0.5) > 4 * seen(1.0)


@pytest.mark.long
def test_in_between_it_sees_the_image_the_caption_and_the_seed(base, scenes):
  images, captions = scenes
  how = {'strength': 0.5, 'text_guidance': 4.0, 'steps': 10, 'seed': 0}
  edits = sdedit.edit(base, images, captions, **how)
  for other in (
    sdedit.edit(base, 255 - images, captions, **how),
    sdedit.edit(base, images, captions[::-1], **how),
    sdedit.edit(base, images, captions, **how | {'seed': 1}),
    sdedit.edit(base, images, captions, **how | {'text_guidance': 1.0}),
  ):
    assert not np.array_equal(other[0], edits[0])
  np.testing.assert_array_equal(sdedit.edit(base, images, captions, **how), edits)


def test_strength_is_the_part_of_the_steps_done_rounded_down(base, scenes):
  how = {'text_guidance': 4.0, 'steps': 10}
  edits = sdedit.edit(base, *scenes, strength=0.5, **how)
  np.testing.assert_array_equal(sdedit.edit(base, *scenes, strength=0.59, **how), edits)
  assert not np.array_equal(sdedit.edit(base, *scenes, strength=0.6, **how), edits)


def test_noise_belongs_to_the_example_not_to_its_batch(base, scenes):
  images, captions = scenes
  how = {'strength': 0.5, 'text_guidance': 4.0, 'steps': 10}
  whole = sdedit.edit(base, images, captions, **how)
  turned = sdedit.edit(base, images[::-1], captions[::-1], indices=[2, 1, 0], **how)[::-1]
  np.testing.assert_allclose(whole.astype(int), turned, atol=1)


def test_a_strength_beyond_one_is_refused(base, scenes):
  with pytest.raises(InputError, match=r'strength is 1.5; it goes from 0'):
    sdedit.edit(base, *scenes, strength=1.5, text_guidance=4.0)
