"""A small text-to-image model, photos and texts for tests of methods of editing."""

import functools

import jax
import numpy as np
import tiny_models

from ip2p_jax import sharding
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.evaluation.methods.method import Texts
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of
from ip2p_jax.pipeline.text_to_image import TextToImage

UNET = tiny_models.ONE_LEVEL | {'in_channels': 4, 'sample_size': 8}
CAPTIONS = ('a red star', 'two cats on a mat', 'a lake')
EDITED = ('a blue star', 'two dogs on a mat', 'a lake in winter')


def checkpoint(prediction_type='epsilon'):
  return tiny_models.checkpoint(UNET, Schedule(prediction_type=prediction_type))


@functools.cache
def base(prediction_type: str = 'epsilon', devices: int = 1) -> TextToImage:
  source = checkpoint(prediction_type)
  networks = networks_of(source)
  return TextToImage(
    networks,
    params_of(source, networks, 'float32'),
    tokenizer_of(source, networks),
    mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
  )


@functools.cache
def torch_models(prediction_type: str = 'epsilon') -> dict:
  """The same networks in torch: 'unet', 'vae', 'text_encoder'."""
  import torch_models as reference

  return reference.models_of(checkpoint(prediction_type))


def photos(count: int) -> np.ndarray:
  """uint8 [N, 32, 32, 3]: for the VAE of `tiny_models`, 8 x 8 latents."""
  y, x = np.mgrid[:32, :32] / 32
  smooth = [
    np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x + (5 + i) * y)], -1)[:: (-1) ** i]
    for i in range(count)
  ]
  return np.round(255 * np.stack(smooth)).astype(np.uint8)


def texts(count: int) -> Texts:
  return Texts(CAPTIONS[:count], EDITED[:count], ['change it'] * count, range(7, 7 + count))


def same_texts(count: int) -> Texts:
  return texts(count)._replace(edited_captions=CAPTIONS[:count])
