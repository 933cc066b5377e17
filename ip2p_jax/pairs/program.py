"""Pairs of pictures as one jitted program, from captions to pictures and CLIP's numbers.

P pairs, L text tokens (77), S steps, H W size in pixels, h w the latents' (H and W over the VAE's
factor). Both pictures of a pair come from the same noise, initial and of every step, so that they
differ by their captions alone; `prompt_to_prompt` keeps them alike. Captions, scales, seeds and all
numbers of the control are traced: one compiled program serves all pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.errors import InputError
from ip2p_jax.pairs.prompt_to_prompt import Control, blended, coarse_level, controlled, word_map
from ip2p_jax.pipeline.clip_scores import Towers
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.scores import Scores

# With no image to guide by, equal scales leave no weight to the branch between these two.
BRANCHES = (guidance.TEXT_AND_IMAGE, guidance.UNCONDITIONAL)


class PairSpec(NamedTuple):
  """What a compiled program is made for; everything else is traced."""

  sampler: str
  height: int  # of the latents
  width: int
  shows_attention: bool = False


class PairRequest(NamedTuple):
  """The traced inputs of one call; optional arrays are None when not given."""

  token_ids: Array  # int32 [2, P, L], of captions and edited captions
  negative_ids: Array  # int32 [1, L]
  guidance: Array  # float32 [P]
  seeds: Array  # uint32 [P]
  grid: samplers.Grid
  control: Control
  init_noise: Array | None = None  # float32 [P, h, w, 4], standard normal
  step_noise: Array | None = None  # float32 [S, P, h, w, 4], standard normal
  null_contexts: Array | None = None  # float32 [S, P, L, C], of null-text inversion


class Pairs(NamedTuple):
  """Finished pairs, first pictures first; `attention` is None unless the spec shows it."""

  images: Array  # float32 [2, P, H, W, 3] in 0..1
  latents: Array  # float32 [2, P, h, w, 4], scaled
  attention: Array | None  # float32 [2, P, a, b, L], mean over steps, layers and heads


def pair_program(networks: Networks, spec: PairSpec, params, request: PairRequest) -> Pairs:
  """Draws P pairs."""
  context, null_context = encode_texts(networks, params, request.token_ids, request.negative_ids)
  shape = (spec.height, spec.width, networks.unet_config.in_channels)
  keys = noise.image_keys(request.seeds, jnp.zeros_like(request.seeds))
  init_noise = request.init_noise
  if init_noise is None:
    init_noise = noise.initial_noise(keys, shape)
  state = samplers.initial_state(request.grid, twice(init_noise))
  unet = nnx.merge(networks.unet_def, params['unet'])
  level = coarse_level(spec.height, spec.width)
  control, blend = request.control, request.control.blend
  scale = jnp.concatenate([request.guidance, request.guidance])

  def step(carry, i):
    state, seen, attention = carry
    maps = []  # of this step's coarse layers, [2, P, heads, N, L] each

    def record(site, probabilities):
      if site.level == level and site.place != 'mid':
        maps.append(probabilities)

    wants_maps = blend is not None or spec.shows_attention

    def predict(x, timestep):
      # Both evaluations of a heun step are controlled as its step is, and the first, which every
      # step has, tells where words look: the second lies in a `lax.cond`, which no map may leave.
      attend = controlled(
        control, i, level, record if wants_maps and not maps else None, inner=networks.attention
      )
      nothing = null_context if request.null_contexts is None else request.null_contexts[i]
      nothing = jnp.broadcast_to(nothing, context.shape[1:])
      contexts = jnp.concatenate([*context, nothing, nothing])
      predictions = unet(jnp.concatenate([x, x]), timestep, contexts, attention=attend)
      return guidance.combine(predictions.reshape(2, *x.shape), BRANCHES, scale, scale)

    step_noise = None
    if spec.sampler in samplers.STOCHASTIC:
      of_step = (
        noise.step_noise(keys, i, shape) if request.step_noise is None else request.step_noise[i]
      )
      step_noise = twice(of_step)
    denoise = denoiser(predict, networks.schedule)
    state = samplers.SAMPLERS[spec.sampler](denoise, request.grid)(state, i, step_noise)
    if wants_maps and not maps:
      raise InputError('this UNet looks at no words where the picture is coarse; there is no map.')
    if blend is not None:
      seen += sum(word_map(m, blend.words) for m in maps).reshape(seen.shape)
      apart = lambda x: x.reshape(2, -1, *shape)
      state = tuple(blended(blend, i, seen, apart(x)).reshape(x.shape) for x in state)
    if spec.shows_attention:
      attention += sum(m.mean(2) for m in maps).reshape(attention.shape) / len(maps)
    return (state, seen, attention), None

  pairs, length = request.token_ids.shape[1:]
  coarse = tuple(-(-side // 2**level) for side in shape[:2])
  seen = None if blend is None else jnp.zeros((2, pairs, *coarse))
  attention = jnp.zeros((2, pairs, *coarse, length)) if spec.shows_attention else None
  steps = jnp.arange(request.grid.timesteps.shape[0])
  (state, _, attention), _ = jax.lax.scan(step, (state, seen, attention), steps)

  latents = samplers.finish(request.grid, state)
  images = decode(networks, params, latents)
  apart = lambda x: x.reshape(2, -1, *x.shape[1:])
  attention = None if attention is None else attention / len(steps)
  return Pairs(apart(images), apart(latents), attention)


def scored_pairs(
  networks: Networks, towers: Towers, spec: PairSpec, params, request: PairRequest, clip_ids: Array
) -> tuple[Pairs, Scores]:
  """The same with CLIP's numbers; `params` has 'clip', `clip_ids` [2, P, L] are its own tokens."""
  pairs = pair_program(networks, spec, params, request)
  return pairs, towers.scores(params['clip'], pairs.images, clip_ids)


def encode_texts(networks: Networks, params, token_ids: Array, negative_ids: Array):
  """Contexts float32 [2, P, L, C] of both captions, and [1, L, C] of no caption."""
  flat = token_ids.reshape(-1, token_ids.shape[-1])
  text_encoder = nnx.merge(networks.text_encoder_def, params['text_encoder'])
  context = text_encoder(jnp.concatenate([flat, negative_ids]))
  return context[:-1].reshape(*token_ids.shape, -1), context[-1:]


def decode(networks: Networks, params, latents: Array) -> Array:
  """Pictures float32 [B, H, W, 3] in 0..1 of scaled latents [B, h, w, 4]."""
  vae = nnx.merge(networks.vae_def, params['vae'])
  decoded = vae.decode(latents / networks.vae_config.scaling_factor)
  return jnp.clip(decoded.astype(jnp.float32) / 2 + 0.5, 0, 1)


def twice(x: Array) -> Array:
  """[P, ...] -> [2 * P, ...]: the same for both pictures."""
  return jnp.concatenate([x, x])
