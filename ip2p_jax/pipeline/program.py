"""A run of a sampler as jitted programs: from a request to images, at once or step by step.

B images, H W pixels, h w the latents' sides, L text tokens (77), C width of the text encoder, S
steps. A request is traced, so that other texts, scales, seeds and noise never recompile. A spec is
hashable and static: a program is compiled for each.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.progress import Progress
from ip2p_jax.sharding import ROWS, SECOND, WHOLE, each_its_rows
from ip2p_jax.xla_alarms import quietly


class Request(NamedTuple):
  """The traced inputs of one call; optional arrays may be None."""

  token_ids: Array  # int32 [B, L]
  negative_ids: Array  # int32 [1, L]
  text_guidance: Array  # float32 [B]
  seeds: Array  # uint32 [B]
  indices: Array  # uint32 [B]
  grid: samplers.Grid
  guided_sigmas: Array  # float32 [2]: guide where [0] < sigma <= [1]
  rescale: Array | None = None  # float32 []
  images: Array | None = None  # uint8 [B, H, W, 3], to edit, or to start from at `grid.first`
  image_guidance: Array | None = None  # float32 [B], for edits
  mask: Array | None = None  # float32 [B, h, w, 1], for edits; 1 = edit
  init_noise: Array | None = None  # float32 [B, h, w, 4], standard normal
  step_noise: Array | None = None  # float32 [S, B, h, w, 4], standard normal


class Conditions(NamedTuple):
  """Values computed once per image, before the first step."""

  context: Array  # [B, L, C]
  null_context: Array  # [1, L, C]
  keys: Array  # [B], of each image's noise
  image_latents: Array | None = None  # [B, h, w, 4], unscaled, for edits


# How devices split the fields.
SPLIT = Request(ROWS, WHOLE, ROWS, ROWS, ROWS, WHOLE, WHOLE, WHOLE, ROWS, ROWS, ROWS, ROWS, SECOND)
SPLIT_CONDITIONS = Conditions(ROWS, WHOLE, ROWS, ROWS)


class Kind(NamedTuple):
  """One kind of program. Its spec has `sampler`, `branches` and `has_interval`.

  Attributes:
    name: of the program, in profiles and logs.
    begin: (networks, spec, params, request) -> (Conditions, the sampler's first state).
    denoiser: (networks, spec, params, request, conditions) -> `denoise(x, sigma)`.
  """

  name: str
  begin: Callable
  denoiser: Callable


class Images(NamedTuple):
  """Finished images, uint8 [B, H, W, 3], and their scaled latents, float32 [B, h, w, 4]."""

  images: Array
  latents: Array


class Programs(NamedTuple):
  """The whole run, and its three parts, jitted. They take a spec (static), parameters, a request.

  `advance` also takes conditions, state and step number; `end` also takes the state.
  """

  whole: Callable
  begin: Callable
  advance: Callable
  end: Callable


def compiled(kind: Kind, networks: Networks, mesh: Mesh | None = None) -> Programs:
  """The programs of a kind. Each device of the mesh makes its own rows.

  Without a mesh they run where the parameters are.
  """
  specs = (WHOLE, SPLIT)  # parameters, and the request

  def jitted(name, f, in_specs, out_specs):
    def run(spec, *inputs):
      program = functools.partial(f, networks, spec)
      return each_its_rows(program, mesh, in_specs, out_specs)(*inputs)

    run.__name__ = name  # shown in profiles and logs
    return jax.jit(run, static_argnums=0)

  of_kind = lambda f: functools.partial(f, kind)
  return Programs(
    jitted(kind.name, of_kind(whole), specs, ROWS),
    jitted('begin', kind.begin, specs, (SPLIT_CONDITIONS, ROWS)),
    jitted('advance', of_kind(advance), (*specs, SPLIT_CONDITIONS, ROWS, WHOLE), ROWS),
    jitted('end', end, (*specs, ROWS), ROWS),
  )


def encode_texts(networks: Networks, params, request: Request) -> Conditions:
  """The conditions by text alone."""
  contexts = parts.encode_texts(networks, params, request.token_ids, request.negative_ids)
  return Conditions(*contexts, noise.image_keys(request.seeds, request.indices))


def guided_denoiser(networks: Networks, spec, request: Request, predict: parts.Predict):
  """`denoise(x, sigma)` with guidance, in all steps or in those of the interval."""
  image_guidance = request.image_guidance
  if image_guidance is None:  # with equal scales the branch of the image alone has weight 0
    image_guidance = request.text_guidance

  def denoise_by(branches):
    def prediction(x, timestep):
      predictions = predict(branches, x, timestep)
      if branches == guidance.CONDITIONAL:
        return predictions[0]
      scales = (request.text_guidance, image_guidance)
      return guidance.combine(predictions, branches, *scales, request.rescale)

    return denoiser(prediction, networks.schedule)

  guided = denoise_by(spec.branches)
  if not spec.has_interval:
    return guided
  unguided = denoise_by(guidance.CONDITIONAL)

  def denoise(x, sigma):
    low, high = request.guided_sigmas
    return jax.lax.cond((low < sigma) & (sigma <= high), guided, unguided, x, sigma)

  return denoise


def whole(kind: Kind, networks: Networks, spec, params, request: Request) -> Images:
  """The whole run as one program; `kind.begin`, `advance` and `end` are its parts."""
  conditions, state = kind.begin(networks, spec, params, request)
  step = lambda state, i: advance(kind, networks, spec, params, request, conditions, state, i)
  return end(networks, spec, params, request, samplers.walk(step, request.grid, state))


def advance(kind: Kind, networks: Networks, spec, params, request, conditions, state, i):
  """One step of the sampler."""
  denoise = kind.denoiser(networks, spec, params, request, conditions)
  shape = state[0].shape[1:]
  step_noise = parts.step_noise(spec.sampler, conditions.keys, i, shape, request.step_noise)
  return samplers.SAMPLERS[spec.sampler](denoise, request.grid)(state, i, step_noise)


def end(networks: Networks, spec, params, request, state) -> Images:
  """Decodes the last state."""
  del spec
  latents = samplers.finish(request.grid, state)
  return Images(parts.to_uint8(parts.decode(networks, params, latents)), latents)


def run(
  programs: Programs, spec, params, request: Request, progress: Progress | None = None
) -> Images:
  """Runs the whole program, or with `progress` its parts, so that the host can count the steps."""
  if progress is None:
    return quietly(programs.whole, spec, params, request)
  conditions, state = quietly(programs.begin, spec, params, request)
  steps = samplers.steps_of(request.grid)
  for done, i in enumerate(steps):
    previous = state
    state = quietly(programs.advance, spec, params, request, conditions, state, np.int32(i))
    jax.block_until_ready(previous)  # so that one step always runs ahead
    progress(done, len(steps))
  images = jax.block_until_ready(quietly(programs.end, spec, params, request, state))
  progress(len(steps), len(steps))
  return images
