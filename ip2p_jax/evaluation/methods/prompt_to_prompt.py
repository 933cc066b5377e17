"""Prompt-to-prompt (Hertz et al. 2022) from a given image, with three ways to invert the image.

The noise of the image is found by DDIM backwards. From it the image is drawn again with its
caption, and beside it the edit with the edited caption, whose attention follows the image's. The
three ways differ in what keeps the first one on the image:

- `ddim`: nothing. Guidance leads away from the image.
- `null_text`: an empty text for every step, trained for it (Mokady et al. 2023).
- `direct`: the image's own noisy latents, which replace what was drawn (Ju et al. 2024).

With `direct` the first image is exact, while the edit still follows guidance. The tables' code
shares self-attention up to 32 x 32 tokens. Here it is 16 x 16, as published, at 512 pixels.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ip2p_jax.diffusion import samplers
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.methods.method import Method, Request, Texts, program, request
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pairs import alignment, inversion
from ip2p_jax.pairs.program import PairRequest, Pairs, PairSpec, pair_program
from ip2p_jax.pairs.prompt_to_prompt import Blend, Control, Injection
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.pipeline.program import Images
from ip2p_jax.pipeline.text_to_image import TextToImage


class Settings(NamedTuple):
  """Settings; the defaults are those of PIE-Bench's tables, for all three ways.

  Attributes:
    cross_steps: the part of the steps that shares attention to words ('refine', see docs/pairs.md).
    self_steps: the part of the steps that shares coarse self-attention.
    weight: of the attention to a changed word that is given.
    blend_from: the part of the steps before the edit is kept to the regions of given words.
    threshold: of attention, for these regions.
  """

  steps: int = 50
  guidance: float = 7.5
  cross_steps: float = 0.4
  self_steps: float = 0.6
  weight: float = 2.0
  blend_from: float = 0.2
  threshold: float = 0.3


# (networks, params, request) -> fields of PairRequest.
Invert = Callable[[Networks, dict, Request], dict[str, Array]]


def ddim(model: TextToImage, settings: Settings = Settings()) -> Method:
  return _method(model, settings, ddim_noise)


def null_text(model: TextToImage, settings: Settings = Settings()) -> Method:
  return _method(model, settings, null_texts)


def direct(model: TextToImage, settings: Settings = Settings()) -> Method:
  return _method(model, settings, own_path)


def calls(settings: Settings) -> int:
  """UNet predictions for an image by `ddim` or `direct`.

  The inversion has one in each step. Then two images are drawn, with and without text.
  """
  return 5 * settings.steps


def null_text_calls(settings: Settings) -> int:
  """The most UNet predictions for an image by `null_text`, which stops early where it can.

  Each step has one with the caption, one in each update, and one with the trained text. An update
  also needs a gradient. Its cost is not counted: about one prediction more, since the weights need
  no gradient.
  """
  return calls(settings) + (inversion.TRIES + 2) * settings.steps


def _method(model, settings, invert: Invert) -> Method:
  grid = samplers.noise_levels(model.networks.schedule, inversion.SAMPLER, settings.steps)
  run = program(model, invert.__name__, functools.partial(edited, invert))

  def edit(images: np.ndarray, texts: Texts) -> np.ndarray:
    control = controls(model.tokenizer, texts, settings)
    return run(request(model, images, texts, grid, np.float32(settings.guidance), control))

  return edit


def controls(tokenizer: ClipTokenizer, texts: Texts, settings: Settings) -> Control:
  """The controls of all rows. Warns of a changed word that is not in its caption, and ignores it.

  The tables' code ignores it, too.
  """
  given = texts.words or [None] * len(texts.captions)
  each = [
    _control(tokenizer, *row, settings)
    for row in zip(texts.captions, texts.edited_captions, given, strict=True)
  ]
  injection, blend = jax.tree.map(lambda *rows: np.stack(rows), *each)
  return Control(injection=injection, blend=blend if any(given) else None)


def _control(tokenizer, caption, edited_caption, words, settings) -> tuple[Injection, Blend]:
  steps = settings.steps
  aligned = alignment.refine(tokenizer, caption, edited_caption)
  sides = zip((caption, edited_caption), words or ('', ''), strict=True)
  places = np.stack([_places(tokenizer, text, word) for text, word in sides])
  start = int(settings.blend_from * steps) if places.any() else steps  # never
  injection = Injection(
    np.int32(alignment.step_window(settings.self_steps, steps)),
    alignment.windows(tokenizer, edited_caption, steps, settings.cross_steps, {}),
    *aligned,
    np.where(places[1], np.float32(settings.weight), np.float32(1)),
  )
  return injection, Blend(places, np.float32(settings.threshold), np.int32(start))


def _places(tokenizer, text, word) -> np.ndarray:
  """float32 [L], 1 for the tokens of the word; '' and an absent word have none."""
  try:
    return alignment.mask(tokenizer, text, [word] if word else [])
  except InputError:
    warnings.warn(f'the changed word {word!r} is not in {text!r}; ignored', stacklevel=2)
    return np.zeros(tokenizer.length, np.float32)


def edited(invert: Invert, networks: Networks, params, request: Request) -> Images:
  """The second images of `pairs`."""
  both = pairs(invert, networks, params, request)
  return Images(parts.unit_to_uint8(both.images[1]), both.latents[1])


def pairs(invert: Invert, networks: Networks, params, request: Request) -> Pairs:
  """The given images, drawn again, and their edits; `request.settings` is the guidance."""
  factor = networks.vae_config.factor
  height, width = (side // factor for side in request.images.shape[1:3])
  drawn = PairRequest(
    token_ids=jnp.stack([request.source_ids, request.target_ids]),
    negative_ids=request.null_ids,
    guidance=_guidance(request),
    seeds=request.seeds,
    grid=request.grid,
    control=request.control,
    **invert(networks, params, request),
  )
  return pair_program(networks, PairSpec(inversion.SAMPLER, height, width), params, drawn)


def own_path(networks: Networks, params, request: Request) -> dict[str, Array]:
  """The noise of the images by DDIM, and their noisy latents at every step."""
  latents = parts.scaled_latents(networks, params, request.images)
  context, _ = parts.encode_texts(networks, params, request.source_ids, request.null_ids)
  path = inversion.ddim_path(networks, params, latents, context, request.grid)
  return {'init_noise': path[0] / request.grid.initial_scale, 'first_path': path}


def ddim_noise(networks: Networks, params, request: Request) -> dict[str, Array]:
  return {'init_noise': own_path(networks, params, request)['init_noise']}


def null_texts(networks: Networks, params, request: Request) -> dict[str, Array]:
  return inversion.invert(
    networks, params, request.images, request.source_ids, request.null_ids, _guidance(request),
    request.grid,
  )._asdict()  # fmt: skip


def _guidance(request):
  return jnp.broadcast_to(request.settings, request.seeds.shape)
