"""Three methods to measure others by: the image itself, the autoencoder alone, and SDEdit."""

from typing import NamedTuple

import numpy as np

from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.evaluation import sdedit
from ip2p_jax.evaluation.methods.method import Method, Request, Texts, program, request
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.program import Images
from ip2p_jax.pipeline.text_to_image import TextToImage, check_strength, first_step


class Settings(NamedTuple):
  """Settings of SDEdit; InstructPix2Pix's figure 8 has strengths of 0.3 to 0.9.

  The paper does not name steps and sampler: here they are its editor's.
  """

  strength: float = 0.6
  steps: int = 100
  text_guidance: float = 7.5


def identity(model: TextToImage, settings: None = None) -> Method:
  """The images, unchanged."""
  del model, settings
  return lambda images, texts: np.array(images)


def vae(model: TextToImage, settings: None = None) -> Method:
  """The images through the autoencoder: the best that a method on its latents can keep."""
  del settings
  grid = samplers.noise_levels(model.networks.schedule, 'ddim', 1)  # is not read
  run = program(model, 'vae', through_autoencoder)
  return lambda images, texts: run(request(model, images, texts, grid))


def through_autoencoder(networks: Networks, params, request: Request) -> Images:
  latents = parts.scaled_latents(networks, params, request.images)
  return Images(parts.to_uint8(parts.decode(networks, params, latents)), latents)


def sdedit_caption(model: TextToImage, settings: Settings = Settings()) -> Method:
  """SDEdit with the edited caption (SDEdit-OC of the paper)."""
  return _sdedit(model, settings, lambda texts: texts.edited_captions)


def sdedit_instruction(model: TextToImage, settings: Settings = Settings()) -> Method:
  """SDEdit with the instruction in the caption's place (SDEdit-E of the paper)."""
  return _sdedit(model, settings, lambda texts: texts.instructions)


def sdedit_calls(settings: Settings) -> int:
  """UNet predictions for an image."""
  scale = settings.text_guidance
  each = len(guidance.branches(scale, scale))
  return each * (settings.steps - first_step(settings.steps, settings.strength))


def _sdedit(model, settings, prompts):
  check_strength(settings.steps, settings.strength)

  def edit(images: np.ndarray, texts: Texts) -> np.ndarray:
    return sdedit.edit(
      model, images, prompts(texts), **settings._asdict(), seed=texts.seeds,
      indices=[0] * len(images),
    )  # fmt: skip

  return edit
