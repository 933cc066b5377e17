"""Pairs of images as one jitted program, from captions to images and CLIP's scores.

P pairs, L text tokens (77), S steps, H W size in pixels, h w size of the latents (H and W divided
by the VAE's factor). Both images of a pair get the same noise, initial and in every step, so only
their captions differ. `prompt_to_prompt` keeps them alike. Captions, scales, seeds and all numbers
of the control are traced: one compiled program serves all pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.errors import InputError
from ip2p_jax.pairs.prompt_to_prompt import Control, blended, coarse_level, controlled, word_map
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.clip_scores import Towers
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.scores import Scores


class PairSpec(NamedTuple):
  """The static inputs of a compiled program. Everything else is traced."""

  sampler: str
  height: int  # of the latents
  width: int
  shows_attention: bool = False


class PairRequest(NamedTuple):
  """The traced inputs of one call. Optional arrays may be None."""

  token_ids: Array  # int32 [2, P, L], captions and edited captions
  negative_ids: Array  # int32 [1, L]
  guidance: Array  # float32 [P]
  seeds: Array  # uint32 [P]
  grid: samplers.Grid
  control: Control
  init_noise: Array | None = None  # float32 [P, h, w, 4], standard normal
  step_noise: Array | None = None  # float32 [S, P, h, w, 4], standard normal
  null_contexts: Array | None = None  # float32 [S, P, L, C], from null-text inversion
  first_path: Array | None = None  # float32 [S + 1, P, h, w, 4], x of the first images, given


class Pairs(NamedTuple):
  """Finished pairs, first images first. `attention` is None unless the spec shows it."""

  images: Array  # float32 [2, P, H, W, 3] in 0..1
  latents: Array  # float32 [2, P, h, w, 4], scaled
  attention: Array | None  # float32 [2, P, a, b, L], mean over steps, layers and heads


def pair_program(networks: Networks, spec: PairSpec, params, request: PairRequest) -> Pairs:
  """Draws P pairs."""
  texts = request.token_ids, request.negative_ids
  contexts, null_context = parts.encode_texts(networks, params, *texts)
  both = contexts.reshape(-1, *contexts.shape[2:])  # [2 * P, L, C]
  shape = (spec.height, spec.width, networks.unet_config.in_channels)
  keys = noise.image_keys(request.seeds, jnp.zeros_like(request.seeds))
  init_noise = parts.initial_noise(keys, shape, request.init_noise)
  state = samplers.initial_state(request.grid, twice(init_noise))
  level = coarse_level(spec.height, spec.width)
  control, blend = request.control, request.control.blend
  scale = jnp.concatenate([request.guidance, request.guidance])

  def step(carry, i):
    state, seen, attention = carry
    maps = []  # attention of this step's coarse layers, [2, P, heads, N, L] each

    def record(site, probabilities):
      if site.level == level and site.place != 'mid':
        maps.append(probabilities)

    wants_maps = blend is not None or spec.shows_attention

    def predict(x, timestep):
      # The control acts on both evaluations of a heun step. Only the first one records maps: the
      # second is in a `lax.cond`, which maps cannot leave.
      attend = controlled(
        control, i, level, record if wants_maps and not maps else None, inner=networks.attention
      )
      nothing = null_context if request.null_contexts is None else request.null_contexts[i]
      nothing = twice(jnp.broadcast_to(nothing, contexts.shape[1:]))
      predictions = parts.predict_by_text(
        networks, params, both, nothing, parts.BY_TEXT, x, timestep, attend
      )
      return guidance.combine(predictions, parts.BY_TEXT, scale, scale)

    fresh = parts.step_noise(spec.sampler, keys, i, shape, request.step_noise)
    move = samplers.SAMPLERS[spec.sampler](denoiser(predict, networks.schedule), request.grid)
    state = move(state, i, None if fresh is None else twice(fresh))
    state = on_path(request.first_path, i + 1, state)
    if wants_maps and not maps:
      raise InputError('this UNet has no attention to words at the coarse level, so no maps.')
    if blend is not None:
      seen += sum(word_map(m, blend.words) for m in maps).reshape(seen.shape)
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
  images = parts.to_unit_range(parts.decode(networks, params, latents))
  attention = None if attention is None else attention / len(steps)
  return Pairs(apart(images), apart(latents), attention)


def scored_pairs(
  networks: Networks, towers: Towers, spec: PairSpec, params, request: PairRequest, clip_ids: Array
) -> tuple[Pairs, Scores]:
  """P pairs and CLIP's scores. `params` has 'clip'; `clip_ids` [2, P, L] are CLIP's tokens."""
  pairs = pair_program(networks, spec, params, request)
  return pairs, towers.scores(params['clip'], pairs.images, clip_ids)


def on_path(path: Array | None, level: Array, state: samplers.State) -> samplers.State:
  """The state [2 * P, ...], with the first images' x from `path` [S + 1, P, ...], if there is one.

  This is direct inversion (Ju et al. 2024), which adds the difference to the path.
  """
  if path is None:
    return state
  return jnp.concatenate([path[level], apart(state[0])[1]]), state[1]


def twice(x: Array) -> Array:
  """[P, ...] -> [2 * P, ...]: the same for both images."""
  return jnp.concatenate([x, x])


def apart(x: Array) -> Array:
  """[2 * P, ...] -> [2, P, ...]: first images, then second ones."""
  return x.reshape(2, -1, *x.shape[1:])
