"""Edits images of any size: `Editor.load(path).edit(image, 'make it winter')`.

B images of one call of the program, H W their working size, h w size of the latents (H and W
divided by the VAE's factor, 8), S steps.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from ip2p_jax import bundled
from ip2p_jax.diffusion import guidance
from ip2p_jax.editing.program import KIND, EditSpec
from ip2p_jax.errors import InputError
from ip2p_jax.images import check_mask, restore, to_array, with_metadata, working_size
from ip2p_jax.pipeline import rows
from ip2p_jax.pipeline.base import Pipeline
from ip2p_jax.pipeline.networks import check_is_editor
from ip2p_jax.pipeline.program import Images
from ip2p_jax.pipeline.sampling import Sampling, check_acts, check_noise_acts
from ip2p_jax.progress import Progress


class Editor(Pipeline):
  """A checkpoint that edits images. One image uses one device, several use all of this process."""

  kind = KIND
  check = staticmethod(check_is_editor)

  @classmethod
  def load(
    cls,
    path: str | os.PathLike | None = None,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    ema: bool | None = None,
    prediction_type: str | None = None,
  ) -> Self:
    """As `Pipeline.load`. The UNet must have eight input channels.

    Without a path it loads the bundled miniature, which edits drawn scenes of 64 px, best with the
    settings in `bundled`.
    """
    options = {'variant': variant, 'ema': ema, 'prediction_type': prediction_type}
    return super().load(bundled.path() if path is None else path, dtype, **options)

  def edit(
    self,
    images: Image.Image | np.ndarray | Sequence[Image.Image],
    instructions: str | Sequence[str],
    *,
    steps: int = 100,
    text_guidance: float | Sequence[float] = 7.5,
    image_guidance: float | Sequence[float] = 1.5,
    seed: int | Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    sampler: str = 'euler_ancestral',
    spacing: str | None = None,
    karras: bool = False,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: str = '',
    mask: np.ndarray | Sequence[np.ndarray] | None = None,
    init_noise: np.ndarray | None = None,
    step_noise: np.ndarray | None = None,
    resolution: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
  ) -> list[Image.Image] | np.ndarray:
    """Edits images of any size. Each result has the size, colours and transparency of its image.

    `Sampling` explains steps, sampler, spacing, karras, rescale and interval. `Pipeline` explains
    the arguments that are not listed here.

    Args:
      images: PIL images, each in its own colours; or uint8 sRGB [H, W, 3] or [B, H, W, 3].
      instructions: what to do, such as 'make it winter'.
      image_guidance: how strongly to keep the image (1 to 2.2 make sense).
      mask: float [H, W] in [0, 1] at the image's size; pixels at 0 do not change.
      resolution: longer side to work at; None works at the image's own size.

    Returns PIL images, RGB, RGBA or, with a profile, CMYK; or an array if `images` is one. `info`
    has profile, EXIF and dpi. Raises InputError for bad values, and for settings without effect.
    """
    originals = [with_metadata(image) for image in _images(images)]
    every = EditRows.of(originals, instructions, text_guidance, image_guidance, seed, mask, indices)
    sampling = Sampling(steps, sampler, spacing, karras, rescale, interval)
    check_acts(sampling, every.text_guidance, every.image_guidance, negative)
    check_noise_acts(sampler, seed, indices, init_noise, step_noise)
    rows.check_positive(batch_size=batch_size, resolution=resolution)
    factor = self.networks.vae_config.factor
    sizes = every.sizes(resolution, factor)
    rows.check_noise(init_noise, step_noise, len(sizes))
    results: list[Image.Image | None] = [None] * len(sizes)
    for batch in rows.batches(sizes, batch_size, progress):
      edit = self.edit_arrays(
        sampling=sampling,
        negative=negative,
        **every.arrays(batch.rows, batch.size, factor),
        **rows.noise_of(batch.rows, init_noise, step_noise),
        progress=batch.progress,
      )
      rows.check_finite('edit', edit.latents)
      for row, image in zip(batch.results, np.asarray(edit.images), strict=False):
        results[row] = restore(image, every.originals[row], every.mask[row])
    return np.stack(results) if isinstance(images, np.ndarray) else results

  def edit_arrays(
    self,
    images: np.ndarray,
    instructions: Sequence[str],
    sampling: Sampling = Sampling(),
    *,
    text_guidance: float | Sequence[float] = 7.5,
    image_guidance: float | Sequence[float] = 1.5,
    seeds: int | Sequence[int] = 0,
    indices: Sequence[int] | None = None,
    negative: str = '',
    mask: np.ndarray | None = None,
    init_noise: np.ndarray | None = None,
    step_noise: np.ndarray | None = None,
    progress: Progress | None = None,
  ) -> Images:
    """Runs the program on a batch uint8 [B, H, W, 3]. Returns images and latents on the devices.

    Sides must be multiples of the VAE's factor; `mask` is float32 [B, h, w, 1]; other arguments are
    as in `edit`. All devices share several images equally; if the number does not divide, some
    images are computed twice.
    """
    factor = self.networks.vae_config.factor
    images = rows.pixels(images, factor)
    batch, height, width, _ = images.shape
    if len(instructions) != batch:
      raise InputError(f'{len(instructions)} instructions for {batch} images; give one each.')
    size = height // factor, width // factor
    request = self._request(
      'instruction', instructions, sampling, size, text_guidance=text_guidance, negative=negative,
      seeds=seeds, indices=indices, init_noise=init_noise, step_noise=step_noise,
    )  # fmt: skip
    image_guidance = rows.scales('image_guidance', image_guidance, batch)
    mask = rows.shaped('mask', mask, (batch, *size, 1))
    request = request._replace(images=images, image_guidance=image_guidance, mask=mask)
    branches = guidance.branches(request.text_guidance, image_guidance, sampling.rescale)
    spec = EditSpec(sampling.sampler, branches, sampling.has_interval(branches))
    return self._run(spec, request, progress)


class EditRows(NamedTuple):
  """One entry per result."""

  originals: Sequence[Image.Image]
  instructions: Sequence[str]
  text_guidance: Sequence[float]
  image_guidance: Sequence[float]
  seeds: Sequence[int]
  mask: Sequence[np.ndarray | None]
  indices: Sequence[int]

  @classmethod
  def of(cls, originals, instructions, text_guidance, image_guidance, seed, mask, indices) -> Self:
    """Repeats single values to the number of results. Raises InputError if numbers do not fit."""
    seed = rows.some_seed() if seed is None else seed
    columns = [originals, instructions, text_guidance, image_guidance, seed]
    columns = [rows.as_list(column) for column in columns]
    columns.append([mask] if mask is None or np.ndim(mask[0]) == 1 else list(mask))
    columns.append(indices if indices is not None else range(len(columns[0])))
    every = cls(**rows.repeated(**dict(zip(cls._fields, columns, strict=True))))
    if not all(text.strip() for text in every.instructions):
      raise InputError('the instruction is empty; say what to change, such as "make it winter".')
    for original, row_mask in zip(every.originals, every.mask, strict=True):
      if row_mask is not None:
        check_mask(row_mask, original.size)
    if mask is not None and not any(map(np.any, every.mask)):
      raise InputError('the mask is 0 everywhere, so nothing would be edited; 1 is edited.')
    return every

  def sizes(self, resolution: int | None, factor: int) -> list[tuple[int, int]]:
    """Working sizes (width, height)."""
    own = [image.size for image in self.originals]
    return [working_size(*size, resolution or max(size), factor) for size in own]

  def arrays(self, numbers: Sequence[int], size: tuple[int, int], factor: int) -> dict[str, Any]:
    """Arguments of `edit_arrays` for these results, at a working size (width, height)."""
    part = EditRows(*([column[i] for i in numbers] for column in self))._asdict()
    originals, masks = part.pop('originals'), part.pop('mask')
    mask = None if masks[0] is None else np.stack([_latent_mask(m, size, factor) for m in masks])
    return {'images': np.stack([to_array(x, size) for x in originals]), 'mask': mask} | part


def _images(images):
  if isinstance(images, Image.Image):
    return [images]
  if not isinstance(images, np.ndarray):
    return list(images)
  if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
    raise InputError(f'images are {images.dtype} {list(images.shape)}; give uint8 [B, H, W, 3].')
  return [Image.fromarray(image) for image in (images if images.ndim == 4 else images[None])]


def _latent_mask(mask, size, factor):
  """[H, W] at the image's size -> [h, w, 1]: 1 for each latent that touches the edited region."""
  width, height = size
  resized = Image.fromarray(np.asarray(mask, np.float32)).resize(size, Image.Resampling.BILINEAR)
  cells = np.asarray(resized).reshape(height // factor, factor, width // factor, factor)
  return (cells.max((1, 3)) > 0).astype(np.float32)[..., None]
