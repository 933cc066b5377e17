"""The edit as one jitted program, from pixels to pixels. `pipeline.program` runs it.

B batch, h w latent sides, L text tokens (77), K branches of guidance. The program is: encode with
CLIP and VAE, loop over the steps, decode with the VAE.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.pipeline import parts, program
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.program import Conditions, Request


class EditSpec(NamedTuple):
  """The static inputs of a compiled program. Everything else is traced."""

  sampler: str
  branches: tuple[str, ...]
  has_interval: bool


def begin(networks: Networks, spec: EditSpec, params, request: Request):
  """Encodes image and texts, and draws the initial noise: (Conditions, sampler state)."""
  del spec
  image_latents = parts.image_latents(networks, params, request.images)
  conditions = program.encode_texts(networks, params, request)._replace(image_latents=image_latents)
  init_noise = parts.initial_noise(conditions.keys, image_latents.shape[1:], request.init_noise)
  return conditions, samplers.initial_state(request.grid, init_noise)


def masked_denoiser(networks: Networks, spec: EditSpec, params, request: Request, conditions):
  """`denoise(x, sigma)` with both guidances, the interval and the mask."""
  predict_edit = functools.partial(predict, networks, params, conditions)
  denoise = program.guided_denoiser(networks, spec, request, predict_edit)
  if request.mask is None:
    return denoise

  def masked(x, sigma):
    # Outside the mask the result is the clean latents, so x stays clean + sigma * noise there.
    clean = conditions.image_latents * networks.vae_config.scaling_factor
    return request.mask * denoise(x, sigma) + (1 - request.mask) * clean

  return masked


def predict(networks: Networks, params, conditions: Conditions, branches, x, timestep):
  """The UNet's prediction per branch, [K, B, h, w, 4]."""
  with_text = conditions.context
  without_text = jnp.broadcast_to(conditions.null_context, with_text.shape)
  with_image, without_image = conditions.image_latents, jnp.zeros_like(conditions.image_latents)
  inputs = {
    guidance.TEXT_AND_IMAGE: (with_image, with_text),
    guidance.IMAGE: (with_image, without_text),
    guidance.UNCONDITIONAL: (without_image, without_text),
  }
  image_latents, contexts = zip(*(inputs[branch] for branch in branches), strict=True)
  latents = [jnp.concatenate([x, image], -1) for image in image_latents]
  return parts.predict_branches(networks, params, latents, timestep, contexts)


KIND = program.Kind('edit_program', begin, masked_denoiser)
