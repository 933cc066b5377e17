"""A checkpoint in memory: named arrays that are read on access, and their types."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ip2p_jax.errors import InputError

COMPONENTS = ('unet', 'vae', 'text_encoder')
DTYPES = {
  'float32': np.dtype(np.float32),
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
FLOATS = (np.dtype(np.float64), *DTYPES.values())


@dataclasses.dataclass
class Checkpoint:
  """A Stable Diffusion checkpoint in diffusers' form, from any kind of file.

  Attributes:
    configs: 'unet', 'vae', 'text_encoder', 'scheduler' -> the component's JSON.
    tensors: 'unet', 'vae', 'text_encoder' -> {diffusers or transformers name: array in torch's
      layout}. From a file they are `Tensors`, read on each access.
    tokenizer: file name -> contents; `vocab.json` and `merges.txt` are always there.
    source: its path, for messages.
  """

  configs: dict[str, dict[str, Any]]
  tensors: dict[str, Mapping[str, np.ndarray]]
  tokenizer: dict[str, bytes]
  source: str


class Tensors(Mapping):
  """Names to arrays; a function makes an array on each access, and it is not kept."""

  def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]):
    self._makers = dict(makers)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._makers[name]()

  def __contains__(self, name: object) -> bool:  # Mapping's version would make the array
    return name in self._makers

  def __iter__(self) -> Iterator[str]:
    return iter(self._makers)

  def __len__(self) -> int:
    return len(self._makers)


def renamed(tensors: Mapping[str, np.ndarray], new_to_old: Mapping[str, str]) -> Tensors:
  """The tensors that `new_to_old` names, under their new names."""
  return Tensors({new: lambda old=old: tensors[old] for new, old in new_to_old.items()})


def float_dtype(dtype: str) -> np.dtype:
  """The numpy dtype of 'float32', 'float16' or 'bfloat16'; InputError for any other name."""
  if dtype not in DTYPES:
    raise InputError(f'dtype {dtype!r} is unknown; use {", ".join(DTYPES)}.')
  return DTYPES[dtype]


def is_finite(array: np.ndarray) -> bool:
  """Whether a float array holds neither NaN nor infinity."""
  return bool(np.isfinite(array).all())


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A float array as `dtype`; other arrays unchanged.

  Raises:
    InputError: names the tensor if it is not finite before or after.
  """
  if array.dtype not in FLOATS:
    return array
  with np.errstate(over='ignore'):
    result = array.astype(dtype, copy=False)
  if not is_finite(result):
    if is_finite(array):
      raise InputError(f'{name} has values too large for {dtype}; use float32 or bfloat16.')
    raise InputError(f'{name} holds NaN or infinity; the checkpoint is broken.')
  return result


def damaged(path: str | os.PathLike, why: str) -> InputError:
  """The error for a file that was cut short or changed."""
  return InputError(f'{path}: damaged or incomplete file: {why}; fetch or write it again.')


def check_same(
  written: Mapping[str, np.ndarray],
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  dtype: np.dtype,
) -> None:
  """Raises OSError if `written` is not `tensors` as `dtype`."""
  for name in tensors:
    array, wanted = written[name], cast(name, tensors[name], dtype)
    same = array.dtype == wanted.dtype and array.shape == wanted.shape
    if not same or not np.array_equal(as_bytes(array), as_bytes(wanted)):
      raise OSError(f'{path}: {name} does not read back as it was written; is the disk sound?')


def as_bytes(array: np.ndarray) -> np.ndarray:
  """Its bytes in memory, uint8 [N]."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
