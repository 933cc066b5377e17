"""Arguments of a caller as rows, one for each image to make; InputError if they do not fit."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ip2p_jax.defaults import MAX_SCALE, MAX_SEED
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress, part_of


def as_list(value: Any) -> list:
  """A sequence or array as a list, anything else as a list of one."""
  is_many = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
  return list(value) if is_many else [value]


def some_seed() -> int:
  return secrets.randbelow(MAX_SEED + 1)


def repeated(**columns: Sequence) -> dict[str, list]:
  """Repeats each column of one entry to the length of the others."""
  count = max(map(len, columns.values()))
  for name, column in columns.items():
    if len(column) not in (1, count):
      raise InputError(f'{len(column)} {name} for {count} images; give one, or one each.')
  return {name: list(column) * (count // len(column)) for name, column in columns.items()}


def check_positive(**values: int | None) -> None:
  for name, value in values.items():
    if value is not None and value < 1:
      raise InputError(f'{name} is {value}; use 1 or more.')


def groups(sizes: Sequence[tuple[int, int]], batch_size: int | None) -> list[list[int]]:
  """Groups of rows of equal working size; `batch_size` limits a group, None does not."""
  by_size = {}
  for row, size in enumerate(sizes):
    by_size.setdefault(size, []).append(row)
  return [
    rows[start : start + (batch_size or len(rows))]
    for rows in by_size.values()
    for start in range(0, len(rows), batch_size or len(rows))
  ]


def padded(rows: list, batch_size: int | None) -> list:
  """The rows, repeated to fill a batch, so that one compiled program serves all batches."""
  return (rows * batch_size)[:batch_size] if batch_size else rows


class Batch(NamedTuple):
  """One call of the program.

  Attributes:
    results: the rows whose images it makes.
    rows: the same, `padded`.
    size: working size (width, height) of all of them.
    progress: of this call.
  """

  results: list[int]
  rows: list[int]
  size: tuple[int, int]
  progress: Progress | None


def batches(
  sizes: Sequence[tuple[int, int]], batch_size: int | None, progress: Progress | None
) -> Iterator[Batch]:
  """The calls that make a row of each of these working sizes. `progress` counts all of them."""
  every = groups(sizes, batch_size)
  for done, group in enumerate(every):
    part = part_of(progress, done, len(every))
    yield Batch(group, padded(group, batch_size), sizes[group[0]], part)


def scales(name: str, values: float | Sequence[float], batch: int) -> np.ndarray:
  """Guidance scales, float32 [B]."""
  values = _one_each(name, values, batch)
  if not (values.dtype.kind in 'iuf' and (abs(values) <= MAX_SCALE).all()):
    raise InputError(f'{name} is {values.tolist()}; it goes from -{MAX_SCALE} to {MAX_SCALE}.')
  return np.broadcast_to(values.astype(np.float32), (batch,))


def counts(name: str, values: int | Sequence[int], batch: int) -> np.ndarray:
  """Seeds or indices, uint32 [B]."""
  values = _one_each(name, values, batch)
  if not (values.dtype.kind in 'iu' and ((values >= 0) & (values <= MAX_SEED)).all()):
    raise InputError(f'{name} is {values.tolist()}; give a whole number from 0 to {MAX_SEED}.')
  return np.broadcast_to(values.astype(np.uint32), (batch,))


def _one_each(name, values, batch):
  values = np.asarray(values)
  if values.ndim and values.shape != (batch,):
    raise InputError(f'{name} has shape {list(values.shape)} for {batch} images; give one each.')
  return values


def shaped(name: str, value: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
  """The value as float32, if it has this shape or is None."""
  if value is None:
    return None
  if np.shape(value) != shape:
    raise InputError(f'{name} has shape {list(np.shape(value))}, not {list(shape)}.')
  return np.asarray(value, np.float32)


def pixels(images: np.ndarray, factor: int) -> np.ndarray:
  """Images uint8 [B, H, W, 3] that a VAE of this factor can encode."""
  images = np.asarray(images)
  shape = list(images.shape)
  if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not images.size:
    raise InputError(f'images are {images.dtype} {shape}; give uint8 [B, H, W, 3].')
  if shape[1] % factor or shape[2] % factor:
    raise InputError(f'images are {shape[2]}x{shape[1]}; sides must be multiples of {factor}.')
  return images


def check_noise(init_noise: np.ndarray | None, step_noise: np.ndarray | None, count: int) -> None:
  """Raises InputError unless noise is None or has a row for each of `count` results."""
  for name, value, axis in (('init_noise', init_noise, 0), ('step_noise', step_noise, 1)):
    shape = np.shape(value)
    if value is not None and shape[axis : axis + 1] != (count,):
      raise InputError(
        f'{name} has shape {list(shape)} for {count} results; give one row each, in axis {axis}.'
      )


def noise_of(
  rows: list[int], init_noise: np.ndarray | None, step_noise: np.ndarray | None
) -> dict[str, np.ndarray | None]:
  """The noise of `rows`, as arguments by name."""
  return {
    'init_noise': None if init_noise is None else np.asarray(init_noise)[rows],
    'step_noise': None if step_noise is None else np.asarray(step_noise)[:, rows],
  }


def check_finite(what: str, latents: np.ndarray) -> None:
  """Raises InputError if latents overflowed; `what` they are, for the message."""
  if not np.isfinite(latents).all():
    raise InputError(f'the {what} overflowed; use lower scales, or the dtype bfloat16 or float32.')
