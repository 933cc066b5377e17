"""Checkpoints pickled by PyTorch (`.ckpt`, `.bin`, `.pt`), read without running their code."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.weights.tensors import DTYPES, Tensors, cast, check_same, damaged, float_dtype

SUFFIXES = ('.ckpt', '.bin', '.pt', '.pth')
# Packages whose objects in a torch file describe its training and do not affect its tensors.
_BOOKKEEPING = ('pytorch_lightning', 'lightning', 'lightning_fabric', 'omegaconf', 'numpy')


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
  """The tensors of a state_dict, and the texts beside it; InputError as in `files.read_tensors`."""
  torch = need_torch(path)
  is_zip = zipfile.is_zipfile(path)
  try:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    with torch.serialization.safe_globals(_stand_ins(unknown)):
      state = torch.load(path, 'cpu', weights_only=True, mmap=is_zip)
  except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
    if 'GLOBAL' in str(error) or 'Unsupported class' in str(error):
      raise InputError(f'{path}: refused, because loading it would run code stored in the file (it '
                       'pickles more than tensors); save its state_dict as .safetensors with the '
                       'program that wrote it.') from None  # fmt: skip
    raise damaged(path, 'PyTorch cannot read it') from None
  notes = {}
  while isinstance(state, Mapping) and isinstance(state.get('state_dict'), Mapping):
    notes |= {key: value for key, value in state.items() if isinstance(value, str)}
    state = state['state_dict']
  if not isinstance(state, Mapping):
    raise InputError(f'{path}: holds a {type(state).__name__}, not a state_dict of tensors.')
  tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}

  def array(tensor):
    if tensor.dtype == torch.bfloat16:
      return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()

  makers = {name: lambda value=value: array(value) for name, value in tensors.items()}
  return Tensors(makers), notes


class Inert:
  """Replaces a class that a training program pickled beside its tensors; does nothing."""

  def __init__(self, *args, **kwargs):
    pass

  def __setstate__(self, state):
    pass


def _stand_ins(names):
  """`Inert` for classes that occur in checkpoints, so that none of their code is needed.

  The original InstructPix2Pix and Stable Diffusion files hold Lightning's callbacks.
  """
  return [(Inert, name) for name in names if name.split('.')[0] in _BOOKKEEPING]


def write(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  dtype: str,
  also: Mapping[str, str],
  counters: Mapping[str, np.ndarray],
  notes: Mapping[str, Any],
) -> None:
  """Writes `{'state_dict': ..., **notes}` by torch.save, atomically, floats cast to `dtype`.

  Args:
    also: further names of tensors, {new: old}; they take no space.
    counters: further tensors, not cast.

  Raises:
    InputError: torch is not installed, or the cases of `write_safetensors`.
    OSError: the file does not read back as it was written.
  """
  torch, kind, path = need_torch(Path(path)), float_dtype(dtype), Path(path)

  def tensor(name):
    array = np.array(cast(name, tensors[name], kind), order='C')
    if array.dtype == DTYPES['bfloat16']:
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  state = {name: tensor(name) for name in tensors}
  state |= {new: state[old] for new, old in also.items()}
  state |= {name: torch.tensor(value) for name, value in counters.items()}
  with storage.replacing(path) as temporary:
    with temporary.open('wb') as file:
      torch.save({'state_dict': state, **notes}, file)
      file.flush()
      os.fsync(file.fileno())
    check_same(read(temporary)[0], path, tensors, kind)


def need_torch(path: Path) -> Any:
  """torch; InputError that names the file if torch is not installed."""
  try:
    import torch
  except ImportError:
    raise InputError(f'{path}: reading and writing {path.suffix} files needs PyTorch; pip install '
                     'torch, or use a .safetensors file.') from None  # fmt: skip
  return torch
