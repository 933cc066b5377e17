"""Parts of every program that makes images: pixels, latents, texts, guidance and noise.

B images, H W pixels, h w latents' sides, L text tokens, C width of the text encoder, K branches of
guidance. `params` has a tree each for 'unet', 'vae' and 'text_encoder'. All functions are for use
inside jit.

There are two ways from the decoder to uint8, and both are needed, because they round values between
two levels differently: `to_uint8` (edits, and images drawn from a text), and `to_unit_range` with
`unit_to_uint8` (pairs; CLIP sees the values in between).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.models.attention import Attention
from ip2p_jax.models.layers import Params
from ip2p_jax.models.vae import Posterior
from ip2p_jax.pipeline.networks import Networks

# Without image guidance both scales are equal, and the third branch has weight 0.
BY_TEXT = (guidance.TEXT_AND_IMAGE, guidance.UNCONDITIONAL)

# (branches, x [B, h, w, 4], timestep []) -> the network's predictions [K, B, h, w, 4].
Predict = Callable[[tuple[str, ...], Array, Array], Array]


def to_model_range(images: Array) -> Array:
  """uint8 [..., 3] -> float32 in -1..1."""
  return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(decoded: Array) -> Array:
  """The decoder's float32 [..., 3] in about -1..1 -> uint8, rounded in float32."""
  return jnp.round(jnp.clip(decoded * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def to_unit_range(decoded: Array) -> Array:
  """The decoder's float32 [..., 3] in about -1..1 -> float32 in 0..1."""
  return jnp.clip(decoded / 2 + 0.5, 0, 1)


def unit_to_uint8(images: Array) -> Array:
  """float32 [..., 3] in 0..1 -> uint8."""
  return jnp.round(images * 255).astype(jnp.uint8)


def encode(vae_def: nnx.GraphDef, vae_params: Params, images: Array) -> Posterior:
  """uint8 [B, H, W, 3] -> the posterior over *unscaled* latents [B, h, w, 4]."""
  return nnx.merge(vae_def, vae_params).encode(to_model_range(images))


def image_latents(networks: Networks, params, images: Array) -> Array:
  """uint8 [B, H, W, 3] -> unscaled latents [B, h, w, 4], without noise: the posterior's mode.

  They are the input of an editor's UNet: every released checkpoint was trained with them.
  """
  return encode(networks.vae_def, params['vae'], images).mode()


def scaled_latents(networks: Networks, params, images: Array) -> Array:
  """uint8 [B, H, W, 3] -> latents [B, h, w, 4] at the scale of the diffusion."""
  return image_latents(networks, params, images) * networks.vae_config.scaling_factor


def decode(networks: Networks, params, latents: Array) -> Array:
  """Scaled latents [B, h, w, 4] -> float32 [B, H, W, 3] in about -1..1."""
  vae = nnx.merge(networks.vae_def, params['vae'])
  return vae.decode(latents / networks.vae_config.scaling_factor)


def encode_texts(
  networks: Networks, params, token_ids: Array, null_ids: Array
) -> tuple[Array, Array]:
  """Contexts of tokens [..., L] and of the null text [1, L]: [..., L, C] and [1, L, C].

  The null text is empty or negative. All texts are one batch of the text encoder.
  """
  texts = token_ids.reshape(-1, token_ids.shape[-1])
  text_encoder = nnx.merge(networks.text_encoder_def, params['text_encoder'])
  context = text_encoder(jnp.concatenate([texts, null_ids]))
  return context[:-1].reshape(*token_ids.shape, -1), context[-1:]


def predict_branches(
  networks: Networks,
  params,
  latents: Sequence[Array],
  timestep: Array,
  contexts: Sequence[Array],
  attention: Attention | None = None,
) -> Array:
  """The UNet's predictions [K, B, h, w, 4] of K branches, in one call of the network.

  Each branch has its `latents` [B, h, w, 4 or 8] and `contexts` [B, L, C]. `attention` None takes
  that of the networks.
  """
  unet = nnx.merge(networks.unet_def, params['unet'])
  predictions = unet(
    jnp.concatenate(latents), timestep, jnp.concatenate(contexts), attention or networks.attention
  )
  return predictions.reshape(len(latents), -1, *predictions.shape[1:])


def predict_by_text(
  networks: Networks,
  params,
  context: Array,
  null_context: Array,
  branches: tuple[str, ...],
  x: Array,
  timestep: Array,
  attention: Attention | None = None,
) -> Array:
  """`predict_branches` of a text-to-image model; `branches` are some of BY_TEXT.

  `context` is [B, L, C]; `null_context` is [B, L, C] or [1, L, C].
  """
  contexts = {
    guidance.TEXT_AND_IMAGE: context,
    guidance.UNCONDITIONAL: jnp.broadcast_to(null_context, context.shape),
  }
  contexts = [contexts[branch] for branch in branches]
  return predict_branches(networks, params, [x] * len(branches), timestep, contexts, attention)


def initial_noise(keys: Array, shape: tuple[int, ...], given: Array | None = None) -> Array:
  """Standard normal noise [B, h, w, 4] of the start: `given`, or drawn by the images' keys [B]."""
  return noise.initial_noise(keys, shape) if given is None else given


def step_noise(
  sampler: str, keys: Array, i: Array, shape: tuple[int, ...], given: Array | None = None
) -> Array | None:
  """Standard normal noise [B, h, w, 4] of step `i`: from `given` [S, B, h, w, 4], or drawn by keys.

  None for a sampler that takes none.
  """
  if sampler not in samplers.STOCHASTIC:
    return None
  return noise.step_noise(keys, i, shape) if given is None else given[i]
