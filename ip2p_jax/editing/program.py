"""The edit as one jitted program, from pixels to pixels.

B batch, H W working size in pixels, h w the latents' (H and W over the VAE's factor), L text tokens
(77), S steps, K branches of guidance. `edit_program` is CLIP and VAE encode -> `lax.scan` over the
steps -> VAE decode. Instructions, scales, seeds and noise are traced, so changing them never
recompiles; what is static is in `Networks`, in `EditSpec` and in the shapes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.sharding import ROWS, SECOND, WHOLE, each_its_rows

CONDITIONAL = (guidance.TEXT_AND_IMAGE,)


class EditSpec(NamedTuple):
  """What a compiled program is made for; everything else is traced."""

  sampler: str
  branches: tuple[str, ...]
  has_interval: bool


class EditRequest(NamedTuple):
  """The traced inputs of one call; optional arrays are None when not given."""

  images: Array  # uint8 [B, H, W, 3]
  token_ids: Array  # int32 [B, L]
  negative_ids: Array  # int32 [1, L]
  text_guidance: Array  # float32 [B]
  image_guidance: Array  # float32 [B]
  seeds: Array  # uint32 [B]
  indices: Array  # uint32 [B]
  grid: samplers.Grid
  guided_sigmas: Array  # float32 [2]: guide where [0] < sigma <= [1]
  rescale: Array | None  # float32 []
  mask: Array | None  # float32 [B, h, w, 1], 1 = edit
  init_noise: Array | None  # float32 [B, h, w, 4], standard normal
  step_noise: Array | None  # float32 [S, B, h, w, 4], standard normal


# How devices share a request, field by field.
SPLIT = EditRequest(
  ROWS, ROWS, WHOLE, ROWS, ROWS, ROWS, ROWS, WHOLE, WHOLE, WHOLE, ROWS, ROWS, SECOND
)


class Conditions(NamedTuple):
  """What the UNet is told besides latents and time, computed once per edit."""

  context: Array  # [B, L, C]
  null_context: Array  # [1, L, C]
  image_latents: Array  # [B, h, w, 4], unscaled
  keys: Array  # [B], of each image's noise


class Edit(NamedTuple):
  """The finished edit: uint8 images [B, H, W, 3] and float32 scaled latents [B, h, w, 4]."""

  images: Array
  latents: Array


class Programs(NamedTuple):
  """The edit, and its three parts, jitted; the first argument of each is a EditSpec."""

  edit: Callable
  begin: Callable
  advance: Callable
  end: Callable


def edit_programs(networks: Networks, mesh: Mesh | None = None) -> Programs:
  """Each device of the mesh edits its own rows; without a mesh, where the parameters lie."""
  conditions = Conditions(ROWS, WHOLE, ROWS, ROWS)
  given = (WHOLE, SPLIT)  # parameters, and the request

  def jitted(f, in_specs, out_specs):
    def run(spec, *inputs):
      whole = functools.partial(f, networks, spec)
      return each_its_rows(whole, mesh, in_specs, out_specs)(*inputs)

    run.__name__ = f.__name__  # what profiles and logs show
    return jax.jit(run, static_argnums=0)

  return Programs(
    jitted(edit_program, given, ROWS),
    jitted(begin, given, (conditions, ROWS)),
    jitted(advance, (*given, conditions, ROWS, WHOLE), ROWS),
    jitted(end, (*given, ROWS), ROWS),
  )


def edit_program(networks: Networks, spec: EditSpec, params, request: EditRequest) -> Edit:
  """The whole edit as one program; `begin`, `advance` and `end` are its parts."""
  conditions, state = begin(networks, spec, params, request)
  steps = jnp.arange(request.grid.timesteps.shape[0])
  step = lambda state, i: (advance(networks, spec, params, request, conditions, state, i), None)
  state, _ = jax.lax.scan(step, state, steps)
  return end(networks, spec, params, request, state)


def begin(networks: Networks, spec: EditSpec, params, request: EditRequest):
  """Encodes picture and texts, draws the initial noise: (Conditions, sampler state)."""
  text_encoder = nnx.merge(networks.text_encoder_def, params['text_encoder'])
  context = text_encoder(jnp.concatenate([request.token_ids, request.negative_ids]))
  vae = nnx.merge(networks.vae_def, params['vae'])
  # The mode, and not scaled: what every released checkpoint was trained with.
  image_latents = vae.encode(request.images.astype(jnp.float32) / 127.5 - 1).mode()
  keys = noise.image_keys(request.seeds, request.indices)
  init_noise = request.init_noise
  if init_noise is None:
    init_noise = noise.initial_noise(keys, image_latents.shape[1:])
  conditions = Conditions(context[:-1], context[-1:], image_latents, keys)
  return conditions, samplers.initial_state(request.grid, init_noise)


def advance(networks: Networks, spec: EditSpec, params, request: EditRequest, conditions, state, i):
  """One step of the sampler."""
  denoise = guided_denoiser(networks, spec, params, request, conditions)
  step_noise = None
  if spec.sampler in samplers.STOCHASTIC:
    step_noise = (
      noise.step_noise(conditions.keys, i, state[0].shape[1:])
      if request.step_noise is None
      else request.step_noise[i]
    )
  return samplers.SAMPLERS[spec.sampler](denoise, request.grid)(state, i, step_noise)


def end(networks: Networks, spec: EditSpec, params, request: EditRequest, state) -> Edit:
  """Decodes the last state."""
  del spec
  latents = samplers.finish(request.grid, state)
  vae = nnx.merge(networks.vae_def, params['vae'])
  decoded = vae.decode(latents / networks.vae_config.scaling_factor)
  return Edit(jnp.round(jnp.clip(decoded * 127.5 + 127.5, 0, 255)).astype(jnp.uint8), latents)


def guided_denoiser(networks: Networks, spec: EditSpec, params, request: EditRequest, conditions):
  """`denoise(x, sigma)` with both guidances, the interval and the mask."""

  def predict(branches):
    def prediction(x, timestep):
      predictions = predict_branches(networks, params, conditions, branches, x, timestep)
      if branches == CONDITIONAL:
        return predictions[0]
      scales = (request.text_guidance, request.image_guidance)
      return guidance.combine(predictions, branches, *scales, request.rescale)

    return denoiser(prediction, networks.schedule)

  guided, unguided = predict(spec.branches), predict(CONDITIONAL)

  def denoise(x, sigma):
    if spec.has_interval:
      low, high = request.guided_sigmas
      denoised = jax.lax.cond((low < sigma) & (sigma <= high), guided, unguided, x, sigma)
    else:
      denoised = guided(x, sigma)
    if request.mask is None:
      return denoised
    # Outside the mask the clean latents are known; then x there is always they plus sigma * noise.
    known = conditions.image_latents * networks.vae_config.scaling_factor
    return request.mask * denoised + (1 - request.mask) * known

  return denoise


def predict_branches(networks: Networks, params, conditions: Conditions, branches, x, timestep):
  """The UNet's prediction per branch, [K, B, h, w, 4], all in one call of the network."""
  with_text = conditions.context
  without_text = jnp.broadcast_to(conditions.null_context, with_text.shape)
  with_image, without_image = conditions.image_latents, jnp.zeros_like(conditions.image_latents)
  told = {
    guidance.TEXT_AND_IMAGE: (with_image, with_text),
    guidance.IMAGE: (with_image, without_text),
    guidance.UNCONDITIONAL: (without_image, without_text),
  }
  image_latents, contexts = zip(*(told[branch] for branch in branches), strict=True)
  latents = [jnp.concatenate([x, image], -1) for image in image_latents]
  unet = nnx.merge(networks.unet_def, params['unet'])
  predictions = unet(
    jnp.concatenate(latents), timestep, jnp.concatenate(contexts), networks.attention
  )
  return predictions.reshape(len(branches), *x.shape)
