"""Editing without having learned to edit (SDEdit, Meng et al. 2022), to compare with.

A text-to-image checkpoint gets the picture's latents with noise added up to a part of the way, and
denoises them with the caption of what should be seen. B pictures, h w latent sides, L text tokens,
S steps.
"""

import functools
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import (
  Networks,
  check_is_text_to_image,
  networks_of,
  params_of,
  tokenizer_of,
)

SAMPLER = 'euler_ancestral'
BRANCHES = (guidance.TEXT_AND_IMAGE, guidance.UNCONDITIONAL)


class SDEdit:
  """A text-to-image checkpoint that edits."""

  def __init__(self, networks: Networks, params, tokenizer: ClipTokenizer, source: str = 'base'):
    """`params` holds a parameter tree each for 'unet', 'vae' and 'text_encoder'."""
    check_is_text_to_image(networks, source)
    self.networks, self.params, self.tokenizer = networks, params, tokenizer
    self._program = jax.jit(functools.partial(program, networks))

  @classmethod
  def load(cls, path: str) -> Self:
    """Reads a checkpoint in float32, as `Editor.load` does; InputError if it is not fit for it."""
    checkpoint = workdir.load(path)
    networks = networks_of(checkpoint)
    params = params_of(checkpoint, networks, 'float32')
    return cls(networks, params, tokenizer_of(checkpoint, networks), checkpoint.source)

  def edit(
    self,
    images: np.ndarray,
    captions: Sequence[str],
    *,
    strength: float,
    text_guidance: float,
    steps: int = 30,
    seed: int = 0,
    indices: Sequence[int] | None = None,
  ) -> np.ndarray:
    """Edits uint8 [B, H, W, 3] to what the captions say.

    Args:
      strength: the part of the steps that is done, rounded down: 0 gives back the picture as the
        autoencoder sees it, 1 draws a new one.
      text_guidance: of classifier-free guidance.
      steps: of the whole way from noise; `strength` of them are done.
      seed, indices: decide the noise, as in `Editor.edit`.
    """
    if not 0 <= strength <= 1:
      raise InputError(f'strength is {strength}; it goes from 0 (the picture) to 1 (a new one).')
    first = steps - int(steps * strength)
    return np.asarray(
      self._program(
        self.params,
        np.asarray(images),
        self.tokenizer([*captions, '']),
        samplers.noise_levels(self.networks.schedule, SAMPLER, steps),
        np.int32(first),
        np.float32(text_guidance),
        np.full(len(images), seed, np.uint32),
        np.uint32(range(len(images)) if indices is None else indices),
      )
    )


def program(
  networks: Networks,
  params,
  images: Array,
  token_ids: Array,
  grid: samplers.Grid,
  first: Array,
  text_guidance: Array,
  seeds: Array,
  indices: Array,
) -> Array:
  """The whole edit, pixels to pixels: uint8 [B, H, W, 3]; all but `networks` is traced.

  `token_ids` [B + 1, L] has the empty text last; `first` [] is the step to begin with, S for none.
  """
  vae = nnx.merge(networks.vae_def, params['vae'])
  factor = networks.vae_config.scaling_factor
  known = vae.encode(images.astype(jnp.float32) / 127.5 - 1).mode() * factor
  keys = noise.image_keys(seeds, indices)
  start = noise.initial_noise(keys, known.shape[1:])
  # The last level is 0, which leaves the picture; the first is where pictures are made of noise.
  noisy = known + jnp.asarray(grid.sigmas)[first] * start
  x = jnp.where(first == 0, samplers.initial_state(grid, start)[0], noisy)

  context = nnx.merge(networks.text_encoder_def, params['text_encoder'])(token_ids)
  null_context = jnp.broadcast_to(context[-1:], context[:-1].shape)
  contexts = jnp.concatenate([context[:-1], null_context])
  unet = nnx.merge(networks.unet_def, params['unet'])

  def predict(x, timestep):
    predictions = unet(jnp.concatenate([x, x]), timestep, contexts).reshape(2, *x.shape)
    # With equal scales the branch between the two, which here does not exist, has no weight.
    return guidance.combine(predictions, BRANCHES, text_guidance, text_guidance)

  step = samplers.SAMPLERS[SAMPLER](denoiser(predict, networks.schedule), grid)
  advance = lambda i, state: step(state, i, noise.step_noise(keys, i, x.shape[1:]))
  state = jax.lax.fori_loop(first, len(grid.sigmas) - 1, advance, (x, jnp.zeros_like(x)))
  decoded = vae.decode(samplers.finish(grid, state) / factor)
  return jnp.round(jnp.clip(decoded * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
