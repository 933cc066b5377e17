"""The start of an editor's training: its data, its checkpoint, and the frozen parameters."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ip2p_jax import parameters, sharding, weights
from ip2p_jax.config import DataConfig, TrainConfig
from ip2p_jax.data import shards, sources
from ip2p_jax.data.examples import Framing
from ip2p_jax.data.pack_plan import largest
from ip2p_jax.data.rows import Source
from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline.networks import Networks, check_is_editor, fingerprint, networks_of
from ip2p_jax.pipeline.workdir import read_unet
from ip2p_jax.weights import Checkpoint, names


class Data(NamedTuple):
  """Opened data sets and their weights; `validation` may be empty."""

  train: list[Source]
  weights: list[float]
  validation: Source
  is_latents: bool


def open_data(config: TrainConfig) -> Data:
  """Opens every data set of the mixture; the first validation split is the run's."""
  opened, mixture, validation = [], sources.mixture(config.data.path), ()
  _check_settings(config, [path for path, _ in mixture])
  kinds = []
  for path, _ in mixture:
    opener = functools.partial(
      sources.open_source, path, columns=config.data.columns, task=config.task
    )
    train = opener('train')
    if not len(train):
      raise InputError(f'{path}: has no training examples, only other splits.')
    opened.append(train)
    kinds.append(shards.is_shards(path) and shards.describe(path)['kind'] == 'latents')
    validation = validation if len(validation) else opener('validation')
  sources.check_columns(config.data.columns, opened, config.data.path)
  return Data(opened, [weight for _, weight in mixture], validation, all(kinds))


def framing_of(config: TrainConfig) -> Framing:
  """The settings that make examples from images."""
  data = config.data
  return Framing(
    config.resolution, config.task, data.resize, data.largest_resize, data.flip_rate,
    data.flip_directions,
  )  # fmt: skip


def check_latents(config: TrainConfig, checkpoint: Checkpoint, tokenizer: ClipTokenizer) -> None:
  """Raises InputError if latents were made with another VAE or at another size than this run's."""
  expected = None
  for path, _ in sources.mixture(config.data.path):
    about = shards.describe(path) if shards.is_shards(path) else {'kind': 'images'}
    if about['kind'] != 'latents':
      continue
    expected = expected or fingerprint(checkpoint, tokenizer)
    if about['fingerprint'] != expected:
      raise InputError(
        f'{path}: these latents were made with another VAE or tokenizer than those of'
        f' {checkpoint.source}; pack them again with --ckpt of this checkpoint.'
      )
    if about['resolution'] != config.resolution:
      raise InputError(
        f'{path}: these latents are of {about["resolution"]} px, but resolution is'
        f' {config.resolution}; set --config.resolution={about["resolution"]}, or pack them again.'
      )


def starting_checkpoint(config: TrainConfig) -> Checkpoint:
  """The checkpoint to start from; for editing, its UNet gets input channels with zero weights."""
  checkpoint = weights.read(
    config.checkpoint,
    ema={'': None, 'average': True, 'live': False}[config.checkpoint_weights],
    prediction_type=config.prediction_type or None,
  )
  networks = networks_of(checkpoint)
  latents = networks.vae_config.latent_channels
  if config.task == 'text_to_image':
    if networks.unet_config.in_channels != latents:
      raise InputError(
        f'{config.checkpoint}: the UNet takes {networks.unet_config.in_channels} channels, so it is'
        " not a text-to-image model; set task to 'edit'."
      )
    return checkpoint
  widened = weights.with_input_channels(checkpoint, 2 * latents)
  if widened is not checkpoint:
    rate = parameters.first_match(config.optimizer.rates, 'conv_in.kernel', 'optimizer.rates')
    if config.lora.rank or not rate:
      raise InputError(
        f'{config.checkpoint}: is a text-to-image model, so its new input channels must learn;'
        ' train all weights, or start LoRA and partial training from an editor.'
      )
  check_is_editor(networks_of(widened), config.checkpoint)
  return widened


def with_prediction_type(config: TrainConfig, networks: Networks, workdir: str) -> TrainConfig:
  """The config with the network's prediction type."""
  expected = networks.schedule.prediction_type
  if config.prediction_type not in ('', expected):
    raise InputError(
      f'prediction_type was {expected!r} in {workdir} and cannot change; set it to that, or use a'
      ' new workdir.'
    )
  return dataclasses.replace(config, prediction_type=expected)


def check_resolution(config: TrainConfig, networks: Networks) -> None:
  """InputError for a resolution that the VAE does not take."""
  factor = networks.vae_config.factor
  if config.resolution % factor:
    near = max(round(config.resolution / factor), 1) * factor
    raise InputError(
      f'resolution is {config.resolution}; this VAE takes multiples of {factor}: use {near}.'
    )


def frozen_parts(
  config: TrainConfig,
  checkpoint: Checkpoint,
  networks: Networks,
  tokenizer: ClipTokenizer,
  mesh: Mesh,
  trained: Collection[str],
) -> dict[str, Any]:
  """The inputs that a step does not change, on the devices, in the dtype of arithmetic.

  `trained` has the names of the trained parameters. See `step` for the parts.
  """
  everywhere, shapes = sharding.replicated(mesh), parameters.flatten(networks.shapes['unet'])
  # A kernel with an adapter stays in float32 until the adapter is added.
  adapted = {name.rpartition('.')[0] for name in trained if '.lora_' in name}
  frozen = {'unet': {}, 'null_ids': sharding.put(tokenizer([''])[0], everywhere)}
  fixed = read_unet(checkpoint, {name: shapes[name] for name in shapes if name not in trained})
  for name, value in fixed.items():
    dtype = np.float32 if name.rpartition('.')[0] in adapted else config.dtype
    placement = sharding.split(mesh, value.shape, ('fsdp',))
    frozen['unet'][name] = sharding.put(value.astype(dtype), placement)
  for part in ('vae', 'text_encoder'):
    place = lambda x, _: sharding.put(np.asarray(x).astype(config.dtype), everywhere)
    frozen[part] = names.to_params(
      checkpoint.tensors[part], networks.shapes[part], part, source=checkpoint.source, place=place
    )
  return frozen


def _check_settings(config: TrainConfig, paths: Sequence[str]) -> None:
  """Raises InputError if a data setting has no effect on one of the run's data sets.

  Packed images cannot grow, and latents have one size and one crop. Default values are always
  allowed.
  """
  data = config.data
  if data.flip_directions and not data.flip_rate:
    raise InputError(
      'data.flip_directions has no effect, since data.flip_rate is 0 and no image is mirrored;'
      ' leave it out.'
    )
  if data.resize == 'squash' and data.largest_resize == config.resolution:
    raise InputError(
      f'data.largest_resize is {data.largest_resize}, like the resolution, and data.resize is'
      ' squash, so there is only one crop; raise it, or leave it out.'
    )
  for path in filter(shards.is_shards, paths):
    about = shards.describe(path)
    if about['kind'] == 'latents':
      _check_packed_latents(config, path, about)
    else:
      _check_pixels(config, path, about['settings']['size'])


def _check_pixels(config, path, size):
  most = None if size is None else largest(size)
  sizes = {'resolution': config.resolution, 'data.largest_resize': config.data.largest_resize}
  for name, pixels in sizes.items():
    if most is not None and pixels > most:
      raise InputError(
        f'{path}: was packed for {size} px, and {name} {pixels} would enlarge its images; set'
        f' --config.{name} to at most {most}, or pack again with a larger --size.'
      )


def _check_packed_latents(config, path, about):
  data, default, packed = config.data, DataConfig(), about['settings']['resize']
  problem = None
  if data.largest_resize:
    problem = f'data.largest_resize {data.largest_resize}: latents cannot be cropped'
  elif data.resize not in (default.resize, packed):
    problem = f'data.resize {data.resize}: they were packed with --resize {packed}'
  elif data.workers not in (default.workers, 0):
    problem = f'data.workers {data.workers}: threads read latents, as there is nothing to decode'
  if problem:
    raise InputError(
      f'{path}: holds latents, on which a setting has no effect: {problem}; leave it out, or train'
      ' from images.'
    )
