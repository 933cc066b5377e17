"""Plug-and-play (Tumanyan et al. 2023): the edit borrows features and self-attention of the image.

The image is inverted by DDIM with the empty text. The edit is drawn from its noise with the edited
caption. In the first steps it takes from the image, at the same noise level: the features of one
residual layer of the decoder, and queries and keys of the decoder's self-attention from that layer
on. Both go into the half with text and into the half without.

N images, h w latents' sides, S steps. The network gets [3 N, ...]: the inverted images with the
empty text, then the edits with the negative text, then with the edited caption.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.methods.method import Method, Request, Texts, program, request
from ip2p_jax.models.attention import Attention
from ip2p_jax.models.layers import Remat
from ip2p_jax.models.unet import UNet
from ip2p_jax.pairs import inversion
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.program import Images
from ip2p_jax.pipeline.text_to_image import TextToImage


class Settings(NamedTuple):
  """Settings; the defaults are the authors'.

  Attributes:
    inversion_steps: of DDIM backwards; PIE-Bench's tables have 50.
    features: the part of the steps that takes features.
    attention: the part of the steps that takes queries and keys.
    negative: what the edit should not be.
  """

  steps: int = 50
  inversion_steps: int = 999
  guidance: float = 7.5
  features: float = 0.8
  attention: float = 0.5
  negative: str = 'ugly, blurry, black, low res, unrealistic'


class Traced(NamedTuple):
  """What the program reads of the settings."""

  guidance: Array  # []
  feature_steps: Array  # []
  attention_steps: Array  # []
  negative_ids: Array  # int32 [1, L]
  inverse_grid: samplers.Grid
  places: Array  # int32 [S], the inversion's step with the timestep of a step


def plug_and_play(model: TextToImage, settings: Settings = Settings()) -> Method:
  """Raises InputError for parts of the steps outside of 0 to 1."""
  for name in ('features', 'attention'):
    if not 0 <= (part := getattr(settings, name)) <= 1:
      raise InputError(f'{name} is {part}; give a part of the steps, 0 to 1.')
  schedule, steps = model.networks.schedule, settings.steps
  grid = samplers.noise_levels(schedule, inversion.SAMPLER, steps)
  inverse = samplers.noise_levels(schedule, inversion.SAMPLER, settings.inversion_steps)
  traced = Traced(
    np.float32(settings.guidance),
    np.int32(settings.features * steps),
    np.int32(settings.attention * steps),
    model.tokenizer([settings.negative]),
    inverse,
    np.abs(inverse.timesteps[:, None] - grid.timesteps[None]).argmin(0).astype(np.int32),
  )
  run = program(model, 'plug_and_play', edited)

  def edit(images: np.ndarray, texts: Texts) -> np.ndarray:
    return run(request(model, images, texts, grid, traced))

  return edit


def calls(settings: Settings) -> int:
  """UNet predictions for an image: the inversion, then three in each step."""
  return settings.inversion_steps + 3 * settings.steps


def edited(networks: Networks, params, request: Request) -> Images:
  """Edits of a request with `Traced`."""
  grid, traced = request.grid, request.settings
  clean = parts.scaled_latents(networks, params, request.images)
  ids = jnp.concatenate([request.target_ids, traced.negative_ids])
  texts, nothing = parts.encode_texts(networks, params, ids, request.null_ids)
  target, negative = texts[:-1], texts[-1:]
  negative, nothing = (jnp.broadcast_to(text, target.shape) for text in (negative, nothing))
  path = inversion.ddim_path(networks, params, clean, nothing, traced.inverse_grid)
  levels = jnp.asarray(traced.inverse_grid.sigmas)[traced.places]
  sources = path[traced.places] / jnp.sqrt(levels**2 + 1)[:, None, None, None, None]
  contexts = jnp.concatenate([nothing, negative, target])
  unet = nnx.merge(networks.unet_def, params['unet'])

  def step(state, i):
    hooks = borrowing(
      unet, i < traced.feature_steps, i < traced.attention_steps, networks.attention
    )

    def predict(x, timestep):
      three = unet(jnp.concatenate([sources[i], x, x]), timestep, contexts, *hooks())
      _, without, with_text = jnp.split(three, 3)
      return without + traced.guidance * (with_text - without)

    return samplers.euler(denoiser(predict, networks.schedule), grid)(state, i, None)

  state = samplers.walk(step, grid, samplers.initial_state(grid, sources[0]))
  latents = samplers.finish(grid, state)
  return Images(parts.to_uint8(parts.decode(networks, params, latents)), latents)


def borrowing(unet: UNet, has_features: Array, has_attention: Array, inner: Attention) -> Any:
  """A function that makes the network's arguments `attention` and `remat`, for one call of it."""
  block = next(block for block in unet.up_blocks if block.attentions is not None)
  chosen = block.resnets[1]

  def hooks() -> tuple[Attention, Remat]:
    seen = []  # the decoder's self-attentions, in order

    def attention(q, k, v, site):
      if site.place == 'up' and not site.is_cross:
        seen.append(site)
        if len(seen) > 1:  # the first one comes before the chosen layer
          q, k = borrowed(q, has_attention), borrowed(k, has_attention)
      return inner(q, k, v, site)

    def with_features(x, time):
      skip = x if chosen.conv_shortcut is None else chosen.conv_shortcut(x)
      return skip + borrowed(chosen(x, time) - skip, has_features)

    return attention, lambda layer: with_features if layer is chosen else layer

  return hooks


def borrowed(x: Array, is_on: Array) -> Array:
  """[3 N, ...]: the images' rows, in the place of all, where it is on."""
  images = jnp.split(x, 3)[0]
  return jnp.where(is_on, jnp.concatenate([images] * 3), x)
