"""Inverts an image for prompt-to-prompt: finds the noise and the empty texts that reproduce it.

P images, h w latent sides, L text tokens (77), S steps. DDIM runs backwards with only the caption
(Dhariwal and Nichol 2021). Guidance leads away from that path, so the empty text of every step is
trained until the guided path stays on it (Mokady et al. 2023). With the sampler 'ddim', both images
of a pair then start from the given image.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks

SAMPLER = 'ddim'
TRIES = 10  # most updates of one step's empty text
# The next values are published for 50 steps. More steps interpolate them.
PUBLISHED_STEPS = 50
RATE, RATE_END = 1e-2, 100  # the learning rate, and the step where it would reach 0
GOOD, GOOD_PER_STEP = 1e-5, 2e-5  # the squared error to stop at, and its growth per step


class Inversion(NamedTuple):
  """The inputs of `pairs.program.PairRequest` that reproduce an image.

  Attributes:
    init_noise: float32 [P, h, w, 4].
    null_contexts: float32 [S, P, L, C].
  """

  init_noise: Array
  null_contexts: Array


def invert(
  networks: Networks,
  params,
  images: Array,
  token_ids: Array,
  negative_ids: Array,
  guidance: Array,
  grid: samplers.Grid,
) -> Inversion:
  """Inverts images uint8 [P, H, W, 3] with captions [P, L]. `grid` must be that of 'ddim'.

  `negative_ids` [1, L] are the empty text; `guidance` [P] is that of the pairs to draw.
  """
  latents = parts.scaled_latents(networks, params, images)
  context, null_context = parts.encode_texts(networks, params, token_ids, negative_ids)
  path = ddim_path(networks, params, latents, context, grid)
  nothing = jnp.broadcast_to(null_context, context.shape)
  null_contexts = null_texts(networks, params, path, context, nothing, guidance, grid)
  return Inversion(path[0] / grid.initial_scale, null_contexts)


def ddim_path(
  networks: Networks, params, latents: Array, context: Array, grid: samplers.Grid
) -> Array:
  """The noisy x of scaled latents [P, h, w, 4] at all steps: [S + 1, P, h, w, 4], noisiest first.

  Each step predicts the noise from the latents at its start, with the timestep at its end, as
  diffusers' DDIMInverseScheduler does.
  """
  unet = _unet(networks, params)
  sigmas, timesteps = jnp.asarray(grid.sigmas), jnp.asarray(grid.timesteps)

  def up(x, i):
    sigma = sigmas[i + 1]
    scaled = x / jnp.sqrt(sigma**2 + 1)
    noise = unet(scaled, timesteps[i], context)
    if networks.schedule.prediction_type == 'v_prediction':
      noise = (noise + sigma * scaled) / jnp.sqrt(sigma**2 + 1)
    noisier = x + (sigmas[i] - sigma) * noise
    return noisier, noisier

  start = latents / grid.final_scale
  _, path = jax.lax.scan(up, start, jnp.arange(len(timesteps))[::-1])
  return jnp.concatenate([path[::-1], start[None]])


def null_texts(
  networks: Networks,
  params,
  path: Array,
  context: Array,
  null_context: Array,
  guidance: Array,
  grid: samplers.Grid,
) -> Array:
  """Empty texts [S, P, L, C] with which guided DDIM follows `path`, noisiest first.

  Each step starts with the text of the previous step. For each image it ends at the first update
  that finds a small enough error.
  """
  unet = _unet(networks, params)
  sigmas, scale = jnp.asarray(grid.sigmas), guidance[:, None, None, None]
  optimizer = optax.scale_by_adam()
  steps = len(grid.timesteps)

  def step(carry, i):
    x, start = carry
    place = i * min(1.0, PUBLISHED_STEPS / steps)
    sigma, below = sigmas[i], sigmas[i + 1]
    noise = lambda text: _noise(unet, networks.schedule, x, sigma, text)
    with_text = noise(context)

    def down(text):
      without_text = noise(text)
      return x + (below - sigma) * (without_text + scale * (with_text - without_text))

    def errors(text):
      error = (down(text) - path[i + 1]) / jnp.sqrt(below**2 + 1)  # as latents of unit variance
      each = (error**2).mean((1, 2, 3))
      return each.sum(), each

    def update(state):
      tries, text, moments, is_bad = state
      (_, each), grads = jax.value_and_grad(errors, has_aux=True)(text)
      changes, moments = optimizer.update(grads, moments)
      rate = RATE * (1 - place / RATE_END)
      text = text - jnp.where(is_bad[:, None, None], rate * changes, 0)
      return tries + 1, text, moments, is_bad & (each >= GOOD + GOOD_PER_STEP * place)

    go_on = lambda state: (state[0] < TRIES) & state[3].any()
    begin = (0, start, optimizer.init(start), jnp.ones(len(start), bool))
    _, text, *_ = jax.lax.while_loop(go_on, update, begin)
    return (down(text), text), text

  _, texts = jax.lax.scan(step, (path[0], null_context), jnp.arange(steps))
  return texts


def _unet(networks, params):
  unet = nnx.merge(networks.unet_def, params['unet'])
  return functools.partial(unet, attention=networks.attention)


def _noise(unet, schedule, x, sigma, context):
  denoise = denoiser(lambda scaled, timestep: unet(scaled, timestep, context), schedule)
  return (x - denoise(x, sigma)) / sigma
