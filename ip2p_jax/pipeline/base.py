"""The base of editing and drawing: a checkpoint in memory, and the devices that run it."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from ip2p_jax import sharding, weights
from ip2p_jax.errors import check_choice
from ip2p_jax.models import attention
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline import program, rows, workdir
from ip2p_jax.pipeline.networks import (
  Networks,
  default_dtype,
  networks_of,
  params_of,
  tokenizer_of,
)
from ip2p_jax.pipeline.sampling import Sampling
from ip2p_jax.progress import Progress

DTYPES = ('float32', 'bfloat16', 'float16')


class Pipeline:
  """A checkpoint that makes images: one image on one device, several on all of this process.

  A subclass defines `kind`, of its programs, and `check`, which raises InputError for a checkpoint
  of another kind.

  `Editor.edit` and `TextToImage.draw` share the following arguments. A single value is repeated for
  all others: ten images with one instruction, one text with ten seeds, and so on. B results, h w
  the latents' size, S steps.

  Args:
    text_guidance: how strongly to follow the text (3 to 12 make sense for edits, 5 to 15 for
      drawing).
    negative: what the result should not show; replaces the empty text.
    seed: 0 to 2**32 - 1. An image's noise depends on its seed and index only, never on its batch.
      None draws one seed for the call.
    indices: one per result; by default 0, 1, 2 ... over the images or texts given, so that all
      variations of one have 0.
    init_noise, step_noise: standard normal [B, h, w, 4] and [S, B, h, w, 4], to repeat a run of
      another framework.
    batch_size: images per call of the program, on all devices together; smaller batches are padded,
      so that one compiled program serves all. None puts all images of one working size into one
      call.
    progress: gets (steps done, all steps). The program then runs step by step, and computes keys
      and values of the text in each step (1.6% of an edit's step at 256 px, 0.4% at 512 px).
  """

  kind: program.Kind
  check: Callable[[Networks, str], None]

  def __init__(
    self,
    networks: Networks,
    params,
    tokenizer: ClipTokenizer,
    source: str = 'the checkpoint',
    mesh: Mesh | None = None,
  ):
    """`params` holds a parameter tree each for 'unet', 'vae' and 'text_encoder'.

    `mesh`: the devices that share the images of a call; None takes all devices of this process.
    """
    self.check(networks, source)
    self.networks, self.params, self.tokenizer = networks, params, tokenizer
    self.dtype = str(jax.tree.leaves(params['unet'])[0].dtype)
    self.mesh = mesh or sharding.make_mesh(devices=jax.local_devices())
    self._alone = program.compiled(self.kind, networks)
    self._shared = program.compiled(self.kind, networks, self.mesh)
    self._copies = None, None  # parameters, and the same on all devices

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    dtype: str | None = None,
    *,
    variant: str | None = None,
    ema: bool | None = None,
    prediction_type: str | None = None,
  ) -> Self:
    """Reads a diffusers folder, a single LDM file (`.safetensors`, `.ckpt`), or a run's workdir.

    Args:
      path: the checkpoint.
      dtype: of weights and arithmetic; None takes float32 on a CPU and bfloat16 elsewhere.
      variant: of a folder's files, such as 'fp16'.
      ema: for a single file or workdir with averaged weights: whether to take them. None takes them
        unless a file's live weights were changed without them, as by a merge.
      prediction_type: 'epsilon' or 'v_prediction', for single files, which do not say.

    Raises InputError if something is missing, broken or not supported.
    """
    checkpoint = workdir.load(path, variant=variant, ema=ema, prediction_type=prediction_type)
    return cls.from_checkpoint(checkpoint, dtype)

  @classmethod
  def from_checkpoint(cls, checkpoint: weights.Checkpoint, dtype: str | None = None) -> Self:
    dtype = dtype or default_dtype()
    check_choice('dtype', dtype, DTYPES)
    networks = networks_of(checkpoint)._replace(attention=attention.dispatch())
    cls.check(networks, checkpoint.source)  # before reading gigabytes
    tokenizer = tokenizer_of(checkpoint, networks)
    return cls(networks, params_of(checkpoint, networks, dtype), tokenizer, checkpoint.source)

  def _request(
    self, name, texts, sampling: Sampling, size: tuple[int, int], *, text_guidance, negative, seeds,
    indices, init_noise, step_noise,
  ) -> program.Request:  # fmt: skip
    """A checked request for latents of `size` (height, width); `name` is for messages."""
    batch = len(texts)
    shape = (batch, *size, self.networks.vae_config.latent_channels)
    grid = sampling.grid(self.networks.schedule)
    return program.Request(
      token_ids=self._tokens(name, texts),
      negative_ids=self._tokens('negative', [negative]),
      text_guidance=rows.scales('text_guidance', text_guidance, batch),
      seeds=rows.counts('seed', seeds, batch),
      indices=rows.counts('indices', range(batch) if indices is None else indices, batch),
      grid=grid,
      guided_sigmas=sampling.guided_sigmas(grid.sigmas),
      rescale=np.float32(sampling.rescale) if sampling.rescale else None,
      init_noise=rows.shaped('init_noise', init_noise, shape),
      step_noise=rows.shaped('step_noise', step_noise, (sampling.steps, *shape)),
    )

  def _run(
    self, spec: Any, request: program.Request, progress: Progress | None = None
  ) -> program.Images:
    """The images of a request. One device makes a single image, all of the mesh make several.

    Every device makes equally many: if the number does not divide, some images are made twice.
    """
    count = len(request.token_ids)
    if count == 1 or self.mesh.size == 1:
      return program.run(self._alone, spec, self.params, request, progress)
    request = sharding.padded_rows(self.mesh, program.SPLIT, request, count)
    images = program.run(self._shared, spec, self._on_all(), request, progress)
    if len(request.token_ids) == count:
      return images
    return program.Images(*(x[:count] for x in images))

  def _tokens(self, name: str, texts: Sequence[str]) -> np.ndarray:
    """int32 [B, L]; warns of text that is cut off."""
    for text in dict.fromkeys(texts):
      if cut := self.tokenizer.cut_off(text).strip():
        warnings.warn(
          f'the {name} is longer than {self.tokenizer.length} tokens; ignored: {cut!r}',
          stacklevel=5,
        )
    return self.tokenizer(texts)

  def _on_all(self):
    """The parameters on every device; copied with the first request of several images."""
    if self._copies[0] is not self.params:
      self._copies = self.params, sharding.copied(self.mesh, self.params)
    return self._copies[1]
