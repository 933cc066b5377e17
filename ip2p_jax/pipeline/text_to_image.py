"""Images from texts: `TextToImage.load(path).draw('a photo of a lake')`, alone or from an image.

From an image (img2img, as in SDEdit: Meng et al. 2022): its latents get noise of a middle step, and
are denoised from there. B images of one call of the program, H W their size, h w the latents' size
(H and W over the VAE's factor, 8), L text tokens (77), S steps.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.errors import InputError
from ip2p_jax.images import restore, to_array, with_metadata, working_size
from ip2p_jax.pipeline import parts, program, rows
from ip2p_jax.pipeline.base import Pipeline
from ip2p_jax.pipeline.networks import Networks, check_is_text_to_image
from ip2p_jax.pipeline.program import Images, Request
from ip2p_jax.pipeline.sampling import Sampling, check_acts, check_noise_acts
from ip2p_jax.progress import Progress


class DrawSpec(NamedTuple):
  """The static settings of a compiled program; everything else is traced."""

  sampler: str
  branches: tuple[str, ...]
  has_interval: bool
  height: int  # of the latents
  width: int


def begin(networks: Networks, spec: DrawSpec, params, request: Request):
  """Encodes texts and image, draws the initial noise: (Conditions, sampler state)."""
  conditions = program.encode_texts(networks, params, request)
  shape = (spec.height, spec.width, networks.vae_config.latent_channels)
  init_noise = parts.initial_noise(conditions.keys, shape, request.init_noise)
  if request.images is None:
    return conditions, samplers.initial_state(request.grid, init_noise)
  latents = parts.scaled_latents(networks, params, request.images)
  return conditions, samplers.noisy_state(request.grid, latents, init_noise)


def text_denoiser(networks: Networks, spec: DrawSpec, params, request: Request, conditions):
  """`denoise(x, sigma)` with classifier-free guidance (Ho and Salimans 2022)."""
  contexts = conditions.context, conditions.null_context
  predict = functools.partial(parts.predict_by_text, networks, params, *contexts)
  return program.guided_denoiser(networks, spec, request, predict)


KIND = program.Kind('draw_program', begin, text_denoiser)


class TextToImage(Pipeline):
  """A Stable Diffusion checkpoint that draws: one image on one device, several on all."""

  kind = KIND
  check = staticmethod(check_is_text_to_image)

  def draw(
    self,
    texts: str | Sequence[str],
    sampling: Sampling = Sampling(50),
    *,
    init: Image.Image | None = None,
    strength: float = 0.6,
    size: int | None = None,
    text_guidance: float | Sequence[float] = 7.5,
    negative: str = '',
    seed: int | Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    init_noise: np.ndarray | None = None,
    step_noise: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
  ) -> list[Image.Image]:
    """Draws an image for each text. `Pipeline` explains the arguments that are not listed here.

    Args:
      texts: what to draw, as in 'a photo of a lake'.
      sampling: steps, sampler and so on.
      init: an image to start from; results have its size, colours and transparency.
      strength: with `init`, the fraction of the steps that is done; see `first_step`.
      size: side of the square images in pixels, or with `init` the longer working side; None takes
        the checkpoint's.

    Raises InputError for bad values, and for settings without effect.
    """
    check_acts(sampling, text_guidance, text_guidance, negative)
    check_noise_acts(sampling.sampler, seed, indices, init_noise, step_noise)
    rows.check_positive(batch_size=batch_size)
    if init is not None:
      check_strength(sampling.steps, strength)
    every = _rows(texts, text_guidance, seed, indices)
    count = len(every['texts'])
    rows.check_noise(init_noise, step_noise, count)
    original = None if init is None else with_metadata(init)
    width, height = self._size(original, size)
    start = None if original is None else to_array(original, (width, height))
    results = []
    for batch in rows.batches([(width, height)] * count, batch_size, progress):
      drawn = self.draw_arrays(
        sampling=sampling,
        size=(height, width),
        images=None if start is None else np.stack([start] * len(batch.rows)),
        strength=strength,
        negative=negative,
        **{name: [column[row] for row in batch.rows] for name, column in every.items()},
        **rows.noise_of(batch.rows, init_noise, step_noise),
        progress=batch.progress,
      )
      rows.check_finite('image', drawn.latents)
      images = np.asarray(drawn.images)[: len(batch.results)]
      results += [
        Image.fromarray(image) if original is None else restore(image, original) for image in images
      ]
    return results

  def _size(self, original: Image.Image | None, size: int | None) -> tuple[int, int]:
    """The working size (width, height)."""
    size = self.networks.resolution if size is None else size
    if original is None:
      return size, size
    return working_size(*original.size, size, self.networks.vae_config.factor)

  def draw_arrays(
    self,
    texts: Sequence[str],
    sampling: Sampling = Sampling(50),
    *,
    size: tuple[int, int] | None = None,
    images: np.ndarray | None = None,
    strength: float = 0.6,
    text_guidance: float | Sequence[float] = 7.5,
    negative: str = '',
    seeds: int | Sequence[int] = 0,
    indices: Sequence[int] | None = None,
    init_noise: np.ndarray | None = None,
    step_noise: np.ndarray | None = None,
    progress: Progress | None = None,
  ) -> Images:
    """Runs the program on a batch of texts; returns images and latents on the devices.

    `size` is (height, width), multiples of the VAE's factor; None takes the checkpoint's. `images`
    uint8 [B, H, W, 3] are images to start from, instead of `size`. The rest is as in `draw`. All
    devices share several images.
    """
    batch, factor = len(texts), self.networks.vae_config.factor
    size = size or [self.networks.resolution] * 2
    if images is not None:
      images = rows.pixels(images, factor)
      size = images.shape[1:3]
      if len(images) != batch:
        raise InputError(f'{batch} texts for {len(images)} images; give one each.')
    if any(side < 1 or side % factor for side in size):
      raise InputError(f'size is {size[1]}x{size[0]}; sides must be multiples of {factor}.')
    height, width = (side // factor for side in size)
    request = self._request(
      'text', texts, sampling, (height, width), text_guidance=text_guidance, negative=negative,
      seeds=seeds, indices=indices, init_noise=init_noise, step_noise=step_noise,
    )  # fmt: skip
    if images is not None:
      grid = samplers.begin_at(request.grid, first_step(sampling.steps, strength))
      request = request._replace(images=images, grid=grid)
    branches = guidance.branches(request.text_guidance, request.text_guidance, sampling.rescale)
    has_interval = sampling.has_interval(branches)
    spec = DrawSpec(sampling.sampler, branches, has_interval, height, width)
    return self._run(spec, request, progress)


def _rows(texts, text_guidance, seed, indices) -> dict[str, list]:
  """One entry per result: texts, text_guidance, seeds and indices."""
  texts = rows.as_list(texts)
  if not all(text.strip() for text in texts):
    raise InputError('the text is empty; say what to draw, as in "a photo of a lake".')
  return rows.repeated(
    texts=texts,
    text_guidance=rows.as_list(text_guidance),
    seeds=rows.as_list(rows.some_seed() if seed is None else seed),
    indices=range(len(texts)) if indices is None else indices,
  )


def first_step(steps: int, strength: float) -> int:
  """The first step from an image: the fraction `strength` of the steps is done, rounded down.

  This is diffusers' rule. At 0 no step is done: the result is the image through the autoencoder. At
  1 the image gets the most noise, which leaves very little of it.
  """
  if not 0 <= strength <= 1:
    raise InputError(f'strength is {strength}; it goes from 0 (the image) to 1 (a new one).')
  return steps - int(steps * strength)


def check_strength(steps: int, strength: float) -> None:
  """Raises InputError for a strength with which the text changes nothing."""
  if first_step(steps, strength) == steps:
    raise InputError(f'strength {strength:g} leaves none of {steps} steps; use more of either.')
