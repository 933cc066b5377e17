"""Settings that cannot act on the data at hand are refused, so that none is silently ignored."""

from collections.abc import Sequence

from ip2p_jax.config import DataConfig, TrainConfig
from ip2p_jax.data import shards
from ip2p_jax.errors import InputError


def check_training(config: TrainConfig, paths: Sequence[str]) -> None:
  """Raises InputError if a data setting of a run cannot act on one of its data sets.

  Packed pictures have no more pixels than they were packed with, and latents are of one size, cut
  one way. What is left at its default is never refused.
  """
  data = config.data
  if data.flip_directions and not data.flip_rate:
    raise InputError(
      'data.flip_directions has no effect, since data.flip_rate is 0 and nothing is mirrored; leave'
      ' it out.'
    )
  if data.resize == 'squash' and data.largest_resize == config.resolution:
    raise InputError(
      f'data.largest_resize is {data.largest_resize}, as the resolution, and data.resize is squash,'
      ' so there is one way to cut; raise it, or leave it out.'
    )
  for path in filter(shards.is_shards, paths):
    about = shards.describe(path)
    if about['kind'] == 'latents':
      _check_latents(config, path, about)
    else:
      _check_pixels(config, path, about['settings']['size'])


def pack_size(src: str, size: int | None, is_latents: bool) -> int:
  """The side to pack at, pixels; 0 keeps files as they are.

  Args:
    src: what is packed. Shards of pictures can be packed again no larger than they are.
    size: as given; None for the size of packed shards, else 256.
    is_latents: whether latents are made, which are of this very side.
  """
  held = _held_size(src)
  if held is None:
    return 256 if size is None else size
  most = largest(held) if is_latents else held
  if size is not None and size > most:
    raise InputError(
      f'{src}: its pictures were packed for {held} px, and --size {size} would scale them up; give'
      f' --size {held}, or pack the first data set again.'
    )
  return size or held


def largest(size: int) -> int:
  """Pixels of the short side that a picture packed with `size` has at most."""
  return size * 9 // 8


def _held_size(src) -> int | None:
  """What packed pictures were packed at; None for other data and for files that were kept."""
  if not shards.is_shards(src):
    return None
  return shards.describe(src)['settings'].get('size')


def _check_pixels(config, path, size):
  most = None if size is None else largest(size)
  asked = {'resolution': config.resolution, 'data.largest_resize': config.data.largest_resize}
  for name, pixels in asked.items():
    if most is not None and pixels > most:
      raise InputError(
        f'{path}: was packed for {size} px, and {name} {pixels} would scale its pictures up; set'
        f' --config.{name} to at most {most}, or pack again with a larger --size.'
      )


def _check_latents(config, path, about):
  data, usual, packed = config.data, DataConfig(), about['settings']['resize']
  problem = None
  if data.largest_resize:
    problem = f'data.largest_resize {data.largest_resize}: latents cannot be cropped'
  elif data.resize not in (usual.resize, packed):
    problem = f'data.resize {data.resize}: they were packed with --resize {packed}'
  elif data.workers not in (usual.workers, 0):
    problem = f'data.workers {data.workers}: there is nothing to decode, so threads read them'
  if problem:
    raise InputError(
      f'{path}: holds latents, on which this has no effect: {problem}; leave it out, or train from'
      ' pictures.'
    )
