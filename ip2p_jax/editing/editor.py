"""Editing pictures of any size: `Editor.load(path).edit(picture, 'make it winter')`.

B pictures of one call of the program, H W their working size, h w the latents' (H and W over the
VAE's factor, 8), S steps.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ip2p_jax import bundled, sharding, weights
from ip2p_jax.defaults import MAX_SCALE, MAX_SEED
from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.editing.edit_rows import EditRows
from ip2p_jax.editing.program import CONDITIONAL, SPLIT, Edit, EditRequest, EditSpec, edit_programs
from ip2p_jax.errors import InputError, check_choice
from ip2p_jax.images import restore, to_array, with_metadata, working_size
from ip2p_jax.models import attention
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import (
  Networks,
  check_is_editor,
  default_dtype,
  networks_of,
  params_of,
  tokenizer_of,
)
from ip2p_jax.pipeline.sampling import Sampling, check_acts, check_noise_acts
from ip2p_jax.progress import Progress, part_of
from ip2p_jax.xla_alarms import quietly

DTYPES = ('float32', 'bfloat16', 'float16')


class Editor:
  """A checkpoint that edits pictures: one on one device, several on all of this process."""

  def __init__(
    self,
    networks: Networks,
    params,
    tokenizer: ClipTokenizer,
    source: str = 'editor',
    mesh: Mesh | None = None,
  ):
    """`params` holds a parameter tree each for 'unet', 'vae' and 'text_encoder'.

    `mesh` has the devices that share the pictures of a call; None takes all of this process.
    """
    check_is_editor(networks, source)
    self.networks, self.params, self.tokenizer = networks, params, tokenizer
    self.dtype = str(jax.tree.leaves(params['unet'])[0].dtype)
    self.mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
    self._alone = edit_programs(networks)
    self._shared = edit_programs(networks, self.mesh)
    self._copies = None, None  # parameters, and the same on all devices

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
    """Reads a diffusers folder, a single LDM file (`.safetensors`, `.ckpt`), or a run's workdir.

    Args:
      path: the checkpoint; its UNet must have eight input channels. None is the bundled miniature,
        which edits drawn scenes of 64 px, best at the settings in `bundled`.
      dtype: of weights and arithmetic; None takes float32 on a CPU and bfloat16 elsewhere.
      variant: of a folder's files, such as 'fp16'.
      ema: whether to take averaged weights, of a single file or a workdir that holds them too;
        None takes them unless the live ones of a file were changed without them, as merging does.
      prediction_type: 'epsilon' or 'v_prediction', for single files that cannot say.

    Raises InputError for anything that is missing, broken or not supported.
    """
    path = bundled.path() if path is None else path
    checkpoint = workdir.load(path, variant=variant, ema=ema, prediction_type=prediction_type)
    return cls.from_checkpoint(checkpoint, dtype)

  @classmethod
  def from_checkpoint(cls, checkpoint: weights.Checkpoint, dtype: str | None = None) -> Self:
    dtype = dtype or default_dtype()
    check_choice('dtype', dtype, DTYPES)
    networks = networks_of(checkpoint)._replace(attention=attention.dispatch())
    check_is_editor(networks, checkpoint.source)  # before reading gigabytes
    tokenizer = tokenizer_of(checkpoint, networks)
    return cls(networks, params_of(checkpoint, networks, dtype), tokenizer, checkpoint.source)

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
    """Edits pictures of any size; each result has its picture's size, colours and transparency.

    One of a kind goes with any number of the others: ten pictures with one instruction, one picture
    with ten seeds, and so on.

    Args:
      images: PIL images, each in the colours of its profile; or a uint8 array of sRGB, [H, W, 3] or
        [B, H, W, 3].
      instructions: what to do, as in 'make it winter'.
      steps, sampler, spacing, karras, rescale, interval: see `Sampling`.
      text_guidance: how strongly to follow the instruction (3 to 12 make sense).
      image_guidance: how strongly to stay with the picture (1 to 2.2 make sense).
      seed: 0 to 2**32 - 1. A picture's noise depends on its seed and index only, never on the
        batch it is in. None draws one seed for the call.
      indices: one per result; by default 0, 1, 2 ... counting the pictures given, so that all
        variations of one picture have 0.
      negative: what the result should not be; takes the place of the empty instruction.
      mask: float [H, W] in [0, 1] at the picture's size; pixels at 0 are kept exactly.
      init_noise, step_noise: standard normal [B, h, w, 4] and [S, B, h, w, 4], to repeat a run of
        another framework.
      resolution: of the longer side at work; None works at the picture's own size.
      batch_size: pictures per call of the program, on all devices together; fewer are padded, so
        that one compiled program serves all. None puts all pictures of one working size into one
        call.
      progress: called as (steps done, steps in all); the program then runs step by step, and
        computes keys and values of the text in each (1.6% of a step at 256 px, 0.4% at 512 px).

    Returns PIL images, RGB, RGBA or, with a profile, CMYK, or an array if arrays came in. Profile,
    EXIF and dpi are in `info`; `images.save` writes them all. Raises InputError on bad values, and
    for settings that cannot act.
    """
    originals = [with_metadata(image) for image in _pictures(images)]
    rows = EditRows.of(originals, instructions, text_guidance, image_guidance, seed, mask, indices)
    sampling = Sampling(steps, sampler, spacing, karras, rescale, interval)
    check_acts(sampling, rows.text_guidance, rows.image_guidance, negative)
    check_noise_acts(sampler, seed, indices, init_noise, step_noise)
    if any(value is not None and value < 1 for value in (batch_size, resolution)):
      raise InputError('batch_size and resolution must be 1 or more.')
    count, factor = len(rows.originals), self.networks.vae_config.factor
    for name, noise, axis in (('init_noise', init_noise, 0), ('step_noise', step_noise, 1)):
      _check_rows(name, noise, axis, count)
    results: list[Image.Image | None] = [None] * count
    groups = self.batches([image.size for image in rows.originals], resolution, batch_size)
    for done, (size, group) in enumerate(groups):
      padded = (group * batch_size)[:batch_size] if batch_size else group
      part = rows.take(padded)
      edit = self.edit_arrays(
        np.stack([to_array(original, size) for original in part.originals]),
        part.instructions,
        sampling,
        text_guidance=part.text_guidance,
        image_guidance=part.image_guidance,
        seeds=part.seeds,
        indices=part.indices,
        negative=negative,
        mask=None if mask is None else np.stack([_latent_mask(m, size, factor) for m in part.mask]),
        init_noise=None if init_noise is None else np.asarray(init_noise)[padded],
        step_noise=None if step_noise is None else np.asarray(step_noise)[:, padded],
        progress=part_of(progress, done, len(groups)),
      )
      if not np.isfinite(edit.latents).all():
        raise InputError('the edit overflowed; use lower scales, or the dtype bfloat16 or float32.')
      for row, image in zip(group, np.asarray(edit.images), strict=False):
        results[row] = restore(image, rows.originals[row], rows.mask[row])
    return np.stack(results) if isinstance(images, np.ndarray) else results

  def batches(
    self,
    sizes: Sequence[tuple[int, int]],
    resolution: int | None = None,
    batch_size: int | None = None,
  ) -> list[tuple[tuple[int, int], list[int]]]:
    """Rows that one call of the program can serve, with the size that it works at.

    Args:
      sizes: of the pictures, a row each.
      resolution, batch_size: as of `edit`.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    factor = self.networks.vae_config.factor
    for row, size in enumerate(sizes):
      by_size.setdefault(working_size(*size, resolution or max(size), factor), []).append(row)
    return [
      (size, rows[start : start + (batch_size or len(rows))])
      for size, rows in by_size.items()
      for start in range(0, len(rows), batch_size or len(rows))
    ]

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
  ) -> Edit:
    """Runs the program on a batch: uint8 [B, H, W, 3] in, images and latents out, on the devices.

    Sides must be multiples of the VAE's factor; `mask` is float32 [B, h, w, 1]; the rest is as in
    `edit`. Several pictures are shared by all devices, each of which has as many: some are made
    twice if they do not divide.
    """
    images = self._checked_images(images)
    batch, height, width, _ = images.shape
    factor = self.networks.vae_config.factor
    latents_shape = (batch, height // factor, width // factor, 4)
    text_guidance = _scales('text_guidance', text_guidance, batch)
    image_guidance = _scales('image_guidance', image_guidance, batch)
    branches = guidance.branches(text_guidance, image_guidance, sampling.rescale)
    has_interval = tuple(sampling.interval) != (0.0, 1.0) and branches != CONDITIONAL
    spec = EditSpec(sampling.sampler, branches, has_interval)
    grid = samplers.noise_levels(
      self.networks.schedule, sampling.sampler, sampling.steps, sampling.spacing, sampling.karras
    )
    request = EditRequest(
      images=images,
      token_ids=self._tokens('instruction', instructions, batch),
      negative_ids=self._tokens('negative', [negative], 1),
      text_guidance=text_guidance,
      image_guidance=image_guidance,
      seeds=_counts('seed', seeds, batch),
      indices=_counts('indices', range(batch) if indices is None else indices, batch),
      grid=grid,
      guided_sigmas=sampling.guided_sigmas(grid.sigmas),
      rescale=np.float32(sampling.rescale) if sampling.rescale else None,
      mask=_checked('mask', mask, (*latents_shape[:3], 1)),
      init_noise=_checked('init_noise', init_noise, latents_shape),
      step_noise=_checked('step_noise', step_noise, (sampling.steps, *latents_shape)),
    )
    if batch == 1 or self.mesh.size == 1:
      return _run(self._alone, spec, self.params, request, sampling.steps, progress)
    request = sharding.padded_rows(self.mesh, SPLIT, request, batch)
    edit = _run(self._shared, spec, self._on_all(), request, sampling.steps, progress)
    return edit if len(request.images) == batch else Edit(*(x[:batch] for x in edit))

  def _on_all(self):
    """The parameters on every device; copied when several pictures are first made."""
    if self._copies[0] is not self.params:
      self._copies = self.params, sharding.copied(self.mesh, self.params)
    return self._copies[1]

  def _tokens(self, name, texts, count):
    if len(texts) != count:
      raise InputError(f'{len(texts)} instructions for {count} images; give one each.')
    for text in dict.fromkeys(texts):
      if cut := self.tokenizer.cut_off(text).strip():
        warnings.warn(
          f'the {name} is longer than {self.tokenizer.length} tokens; ignored: {cut!r}',
          stacklevel=4,
        )
    return self.tokenizer(texts)

  def _checked_images(self, images):
    images, factor = np.asarray(images), self.networks.vae_config.factor
    shape = list(images.shape)
    if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not images.size:
      raise InputError(f'images are {images.dtype} {shape}; give uint8 [B, H, W, 3].')
    if shape[1] % factor or shape[2] % factor:
      raise InputError(f'images are {shape[2]}x{shape[1]}; sides must be multiples of {factor}.')
    return images


def _run(programs, spec, params, request, steps, progress) -> Edit:
  """The program; in parts, so that the host can count, if there is somebody to tell."""
  if progress is None:
    return quietly(programs.edit, spec, params, request)
  conditions, state = quietly(programs.begin, spec, params, request)
  for i in range(steps):
    previous = state
    state = quietly(programs.advance, spec, params, request, conditions, state, np.int32(i))
    jax.block_until_ready(previous)  # one step is always in flight
    progress(i, steps)
  edit = jax.block_until_ready(quietly(programs.end, spec, params, request, state))
  progress(steps, steps)
  return edit


def _pictures(images):
  if isinstance(images, Image.Image):
    return [images]
  if not isinstance(images, np.ndarray):
    return list(images)
  if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
    raise InputError(f'images are {images.dtype} {list(images.shape)}; give uint8 [B, H, W, 3].')
  return [Image.fromarray(image) for image in (images if images.ndim == 4 else images[None])]


def _scales(name, values, batch):
  values = _one_each(name, values, batch)
  if not (values.dtype.kind in 'iuf' and (abs(values) <= MAX_SCALE).all()):
    raise InputError(f'{name} is {values.tolist()}; it goes from -{MAX_SCALE} to {MAX_SCALE}.')
  return np.broadcast_to(values.astype(np.float32), (batch,))


def _counts(name, values, batch):
  values = _one_each(name, values, batch)
  if not (values.dtype.kind in 'iu' and ((values >= 0) & (values <= MAX_SEED)).all()):
    raise InputError(f'{name} is {values.tolist()}; give a whole number from 0 to {MAX_SEED}.')
  return np.broadcast_to(values.astype(np.uint32), (batch,))


def _one_each(name, values, batch):
  values = np.asarray(values)
  if values.ndim and values.shape != (batch,):
    raise InputError(f'{name} has shape {list(values.shape)} for {batch} images; give one each.')
  return values


def _check_rows(name, value, axis, count):
  shape = np.shape(value)
  if value is not None and shape[axis : axis + 1] != (count,):
    raise InputError(
      f'{name} has shape {list(shape)} for {count} results; give one row each, in axis {axis}.'
    )


def _checked(name, value, shape):
  if value is None:
    return None
  if np.shape(value) != shape:
    raise InputError(f'{name} has shape {list(np.shape(value))}, not {list(shape)}.')
  return np.asarray(value, np.float32)


def _latent_mask(mask, size, factor):
  """[H, W] at the picture's size -> [h, w, 1]: 1 for each latent that touches what is edited."""
  width, height = size
  picture = Image.fromarray(np.asarray(mask, np.float32)).resize(size, Image.Resampling.BILINEAR)
  cells = np.asarray(picture).reshape(height // factor, factor, width // factor, factor)
  return (cells.max((1, 3)) > 0).astype(np.float32)[..., None]
