"""The training loss (paper, equation 2) and its random draws.

B examples, H W pixels, h w latents, L text tokens. A batch is a dict of arrays, either of images

  edited_image, input_image         uint8 [B, H, W, 3]

or of the VAE's posteriors for them (of unscaled latents),

  edited_mean, edited_log_variance, input_mean      float16 [B, h, w, 4]

and token_ids int32 [B, L], weight float32 [B] (0 leaves an example out), index int32 [B] (the
example's row in the global batch). Text-to-image has no `input_*`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.diffusion.noise import Schedule, add_noise, velocity
from ip2p_jax.models.layers import Params, Remat
from ip2p_jax.models.vae import Posterior
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks

Batch = dict[str, Array]


class Draws(NamedTuple):
  """The random numbers of B examples.

  Attributes:
    posterior_noise, noise: standard normal [B, h, w, 4].
    timesteps: int32 [B], in 0..T-1.
    dropout: uniform in [0, 1), [B].
  """

  posterior_noise: Array
  noise: Array
  timesteps: Array
  dropout: Array


class Inputs(NamedTuple):
  """Inputs of the UNet: scaled latents, unscaled image latents (or None), text states."""

  latents: Array
  image_latents: Array | None
  context: Array


def draw(seed: int, step: Array, index: Array, shape: tuple[int, ...], schedule: Schedule) -> Draws:
  """The draws of the examples `index` [B] of a step; `shape` is (h, w, 4).

  Each depends only on (seed, step, index). So no two examples share a draw, and other numbers of
  devices or accumulation steps change nothing.
  """
  # The generator is named, since TPU users often change jax's default to one whose numbers depend
  # on the batch.
  key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), step)

  def draw_example(index):
    posterior, noise, timestep, dropout = jax.random.split(jax.random.fold_in(key, index), 4)
    return Draws(
      jax.random.normal(posterior, shape),
      jax.random.normal(noise, shape),
      jax.random.randint(timestep, (), 0, schedule.num_train_timesteps),
      jax.random.uniform(dropout),
    )

  return jax.vmap(draw_example)(index)


def latents_shape(networks: Networks, batch: Batch) -> tuple[int, ...]:
  """(h, w, 4) of one example."""
  if 'edited_mean' in batch:
    return batch['edited_mean'].shape[1:]
  _, height, width, _ = batch['edited_image'].shape
  config = networks.vae_config
  return height // config.factor, width // config.factor, config.latent_channels


def encode(
  networks: Networks, frozen: dict[str, Params], batch: Batch, draws: Draws, rate: float
) -> Inputs:
  """Runs the frozen networks and drops conditions.

  Args:
    frozen: 'vae' and 'text_encoder' parameters, and 'null_ids' int32 [L], the empty text.
    rate: `conditioning_dropout`, of each kind (the paper has 5%). One draw r per example decides,
      as in the original: below `rate` only the text is empty, below 2 rate text and image, below 3
      rate only the image.
  """
  posterior, image_latents = _posteriors(networks, frozen, batch)
  # A scaled sample for the edited image, the unscaled mode for the input image: every released
  # checkpoint was trained with these.
  latents = posterior.sample(draws.posterior_noise) * networks.vae_config.scaling_factor
  r = draws.dropout
  if image_latents is not None:
    is_dropped = (rate <= r) & (r < 3 * rate)
    image_latents = jnp.where(is_dropped[:, None, None, None], 0.0, image_latents)
  # Dropped before the text encoder, so that it need not run again for the empty text.
  token_ids = jnp.where((r < 2 * rate)[:, None], frozen['null_ids'][None], batch['token_ids'])
  text_encoder = nnx.merge(networks.text_encoder_def, frozen['text_encoder'])
  return jax.lax.stop_gradient(Inputs(latents, image_latents, text_encoder(token_ids)))


def _posteriors(networks, frozen, batch):
  if 'edited_mean' in batch:
    posterior = Posterior(
      batch['edited_mean'].astype(jnp.float32), batch['edited_log_variance'].astype(jnp.float32)
    )
    image_latents = batch.get('input_mean')
    return posterior, None if image_latents is None else image_latents.astype(jnp.float32)
  posterior_of = lambda name: parts.encode(networks.vae_def, frozen['vae'], batch[name])
  image_latents = posterior_of('input_image').mode() if 'input_image' in batch else None
  return posterior_of('edited_image'), image_latents


def example_losses(
  networks: Networks,
  unet_params: Params,
  inputs: Inputs,
  draws: Draws,
  *,
  min_snr_gamma: float = 0.0,
  remat: Remat = lambda layer: layer,
) -> Array:
  """Mean squared error of each example's prediction of noise (or velocity), [B] float32.

  With `min_snr_gamma`, weighted by min(gamma, snr) / snr, or by min(gamma, snr) / (snr + 1) for
  velocity (Hang et al. 2023).
  """
  schedule = networks.schedule
  noisy_latents = add_noise(schedule, inputs.latents, draws.noise, draws.timesteps)
  if inputs.image_latents is not None:
    noisy_latents = jnp.concatenate([noisy_latents, inputs.image_latents], -1)
  unet = nnx.merge(networks.unet_def, unet_params)
  predicted = unet(noisy_latents, draws.timesteps, inputs.context, networks.attention, remat)
  if schedule.prediction_type == 'epsilon':
    target = draws.noise
  else:
    target = velocity(schedule, inputs.latents, draws.noise, draws.timesteps)
  losses = jnp.square(predicted - target).mean((1, 2, 3))
  return losses * _min_snr(schedule, draws.timesteps, min_snr_gamma) if min_snr_gamma else losses


def _min_snr(schedule, timesteps, gamma):
  snr = jnp.asarray(schedule.sigmas)[timesteps] ** -2
  return jnp.minimum(snr, gamma) / (snr if schedule.prediction_type == 'epsilon' else snr + 1)
