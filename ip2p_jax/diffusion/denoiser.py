"""From the network's prediction to an estimate of clean latents.

B batch, h w latent height and width. Samplers use one interface, `denoised = denoise(x, sigma)`,
with x [B, h, w, 4] = clean latents + sigma * noise; this file implements it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ip2p_jax.diffusion.noise import Schedule

Array = jax.Array


def denoiser(
  predict: Callable[[Array, Array], Array], schedule: Schedule
) -> Callable[[Array, Array], Array]:
  """Wraps a network that predicts noise or velocity as `denoise(x, sigma)`.

  `predict(scaled_x [B, h, w, 4], timestep [])` gets latents at the scale of training and a
  fractional float32 timestep; it returns what `schedule.prediction_type` says. `denoise` takes a
  scalar sigma, traced or not, and returns float32 (Karras et al. 2022, equation 7).
  """

  def denoise(x, sigma):
    c_in = 1 / jnp.sqrt(sigma**2 + 1)
    if schedule.prediction_type == 'epsilon':
      c_skip, c_out = 1.0, -sigma
    else:
      c_skip, c_out = c_in**2, -sigma * c_in
    prediction = predict(c_in * x, sigma_to_timestep(schedule, sigma))
    return c_skip * x + c_out * prediction.astype(jnp.float32)

  return denoise


def sigma_to_timestep(schedule: Schedule, sigma: Array) -> Array:
  """The fractional timestep of a noise level; levels outside the schedule get its ends."""
  timesteps = jnp.arange(schedule.num_train_timesteps, dtype=jnp.float32)
  return jnp.interp(sigma, jnp.asarray(schedule.sigmas), timesteps)
