"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024).

The image is noised to every level with independent noise. Each step down then misses the next,
less noisy, image by some difference: the noise map z_t (their equation 5). The edited image starts
from one of the noisy images and takes the same steps with the edited caption and the same noise
maps. If captions and scales are equal, it comes back to the image exactly.

N images, h w latents' sides, S steps. x [N, h, w, 4] is clean latents + sigma * noise. A step is a
step of DDPM (DDIM with eta 1), whose mean is that of `samplers.euler_ancestral`. Both captions run
together, so that no noise map is stored: the map times its sigma is a difference of two values that
are at hand.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.methods.method import Method, Request, program, request
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.program import Images
from ip2p_jax.pipeline.text_to_image import TextToImage


class Settings(NamedTuple):
  """Settings; the defaults are the paper's.

  Attributes:
    skip: how many of the noisiest steps are left out; more keeps more of the image.
    drops_last: whether the last step has no noise map, as in the released code. The image then does
      not come back exactly.
  """

  steps: int = 100
  skip: int = 36
  source_guidance: float = 3.5
  target_guidance: float = 15.0
  drops_last: bool = False


PIE = Settings(50, 12, 1.0, 7.5)  # as in PIE-Bench's tables


def edit_friendly(model: TextToImage, settings: Settings = Settings()) -> Method:
  """Raises InputError if no step is left."""
  if not 0 <= settings.skip < settings.steps:
    raise InputError(f'skip is {settings.skip} of {settings.steps} steps; leave at least one.')
  grid = samplers.noise_levels(model.networks.schedule, 'ddim', settings.steps)
  grid = samplers.begin_at(grid, settings.skip)
  run = program(model, 'edit_friendly', edited)
  return lambda images, texts: run(request(model, images, texts, grid, settings))


def calls(settings: Settings) -> int:
  """UNet predictions for an image: two captions, with and without text."""
  return 4 * (settings.steps - settings.skip)


def edited(networks: Networks, params, request: Request) -> Images:
  """Edits of a request with `Settings`."""
  grid, settings = request.grid, request.settings
  clean = parts.scaled_latents(networks, params, request.images)
  keys = noise.image_keys(request.seeds, jnp.zeros_like(request.seeds))
  sigmas, steps = jnp.asarray(grid.sigmas), len(grid.timesteps)
  predict = by_both_captions(networks, params, request)
  mean = samplers.euler_ancestral(denoiser(predict, networks.schedule), grid)

  def noisy(i):
    """The image at level i; at level S it is the clean one."""
    x = clean + sigmas[i] * noise.step_noise(keys, i, clean.shape[1:])
    return jnp.where(i < steps, x, clean / grid.final_scale)

  def step(x, i):
    both = jnp.concatenate([noisy(i), x])
    source, target = jnp.split(mean((both, both), i, 0.0)[0], 2)
    has_map = ~(jnp.asarray(settings.drops_last) & (i == steps - 1))
    return target + has_map * (noisy(i + 1) - source)

  latents = samplers.walk(step, grid, noisy(grid.first)) * grid.final_scale
  return Images(parts.to_uint8(parts.decode(networks, params, latents)), latents)


def by_both_captions(networks: Networks, params, request: Request):
  """`predict(x, timestep)`, guided: x [2 N, h, w, 4] has N rows for each caption."""
  ids = jnp.concatenate([request.source_ids, request.target_ids])
  contexts = parts.encode_texts(networks, params, ids, request.null_ids)
  by_text = functools.partial(parts.predict_by_text, networks, params, *contexts, parts.BY_TEXT)
  scales = request.settings.source_guidance, request.settings.target_guidance
  scale = jnp.repeat(jnp.float32(jnp.stack(scales)), len(request.images))

  def predict(x, timestep):
    return guidance.combine(by_text(x, timestep), parts.BY_TEXT, scale, scale)

  return predict
