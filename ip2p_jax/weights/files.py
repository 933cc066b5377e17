"""Containers: a checkpoint in memory, and the tensor files that hold one.

Reading is lazy: a `Tensors` maps names to arrays that are read when asked for, so that a 4 GB file
costs memory only for the tensor in hand. Writing goes to a temporary name beside the destination,
is read back and compared, and only then takes the destination's name.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ip2p_jax import storage
from ip2p_jax.errors import InputError

COMPONENTS = ('unet', 'vae', 'text_encoder')
DTYPES = {
  'float32': np.dtype(np.float32),
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
FLOATS = (np.dtype(np.float64), *DTYPES.values())
TORCH_SUFFIXES = ('.ckpt', '.bin', '.pt', '.pth')

_SAFETENSORS_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
# Packages whose objects in a torch file say how it was trained, and never matter for its tensors.
_BOOKKEEPING = ('pytorch_lightning', 'lightning', 'lightning_fabric', 'omegaconf', 'numpy')
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass
class Checkpoint:
  """A Stable Diffusion checkpoint in diffusers' form, whatever file it came from.

  Attributes:
    configs: 'unet', 'vae', 'text_encoder', 'scheduler' -> the component's JSON.
    tensors: 'unet', 'vae', 'text_encoder' -> {diffusers or transformers name: array in torch's
      layout}. Read from a file they are `Tensors`, made anew at each access.
    tokenizer: file name -> contents; `vocab.json` and `merges.txt` are always there.
    source: where it came from, for messages.
  """

  configs: dict[str, dict[str, Any]]
  tensors: dict[str, Mapping[str, np.ndarray]]
  tokenizer: dict[str, bytes]
  source: str


class Tensors(Mapping):
  """Names to arrays; each array is made by a function when it is asked for, and not kept."""

  def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]):
    self._makers = dict(makers)

  def __getitem__(self, name: str) -> np.ndarray:
    return self._makers[name]()

  def __contains__(self, name: object) -> bool:  # Mapping's own would make the array
    return name in self._makers

  def __iter__(self) -> Iterator[str]:
    return iter(self._makers)

  def __len__(self) -> int:
    return len(self._makers)


def renamed(tensors: Mapping[str, np.ndarray], new_to_old: Mapping[str, str]) -> Tensors:
  """The tensors that `new_to_old` names, under their new names."""
  return Tensors({new: lambda old=old: tensors[old] for new, old in new_to_old.items()})


def read_tensors(path: str | os.PathLike) -> tuple[Tensors, dict[str, str]]:
  """The tensors and the metadata of a `.safetensors`, `.safetensors.index*.json` or torch file.

  Raises:
    InputError: the file is absent, damaged, of another kind, or would run code when loaded.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f'{path}: no such file.')
  if path.suffix == '.safetensors':
    return _read_safetensors(path)
  if path.suffix == '.json':
    return _read_shards(path), {}
  if path.suffix in TORCH_SUFFIXES:
    return _read_torch(path)
  known = ', '.join(('.safetensors', *TORCH_SUFFIXES))
  raise InputError(f'{path}: not a checkpoint file; give one that ends in {known}, or a folder.')


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """The object in a JSON file, or an InputError that names the file."""
  path = Path(path)
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise InputError(f'{path}: no such file.') from None
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}).') from None
  except ValueError as error:
    raise InputError(f'{path}: not valid JSON ({error}).') from None
  if not isinstance(value, dict):
    raise InputError(f'{path}: holds a JSON {type(value).__name__} where an object is expected.')
  return value


def _read_safetensors(path):
  # The format is a JSON header and raw bytes. Read so, bfloat16 needs no torch, and tensors are
  # views of the mapped file, never copies.
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise _damaged(path, 'it ends within its header')
    try:
      header = json.loads(file.read(length))
      metadata = header.pop('__metadata__', {})
      entries = {name: _entry(path, name, **entry) for name, entry in header.items()}
    except InputError:
      raise
    except (ValueError, TypeError, AttributeError):
      raise _damaged(path, 'its header is not safetensors') from None
  start = 8 + length
  expected = start + max((end for *_, end in entries.values()), default=0)
  if expected != size:
    raise _damaged(path, f'it has {size:,} bytes and its header describes {expected:,}')
  data = np.memmap(path, np.uint8, 'r', offset=start) if size > start else np.empty(0, np.uint8)

  def view(entry):
    dtype, shape, begin, end = entry
    return data[begin:end].view(np.ndarray).view(dtype).reshape(shape)

  return Tensors(
    {name: lambda entry=entry: view(entry) for name, entry in entries.items()}
  ), metadata


def _entry(path, name, dtype, shape, data_offsets):
  begin, end = data_offsets
  if dtype not in _SAFETENSORS_DTYPES:
    raise InputError(f'{path}: {name} is stored as {dtype}, which is not supported; use a '
                     'float32, float16 or bfloat16 version of the file.')  # fmt: skip
  known = _SAFETENSORS_DTYPES[dtype]
  if begin < 0 or end - begin != known.itemsize * math.prod(shape):
    raise ValueError(name)
  return known, tuple(shape), begin, end


def _damaged(path, why):
  return InputError(f'{path}: damaged or incomplete file: {why}; fetch or write it again.')


def _read_shards(index):
  files: dict[str, Tensors] = {}
  makers = {}
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(f'{index}: has no weight_map, so it is not an index of weight files.')
  for name, file in weight_map.items():
    if file not in files:
      files[file] = read_tensors(index.with_name(file))[0]
    if name not in files[file]:
      raise InputError(f'{index}: says that {name} is in {file}, which does not hold it.')
    makers[name] = lambda shard=files[file], name=name: shard[name]
  return Tensors(makers)


def _read_torch(path):
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
    raise _damaged(path, 'PyTorch cannot read it') from None
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
  """Stands for a class that a training program pickled beside its tensors; does nothing at all."""

  def __init__(self, *args, **kwargs):
    pass

  def __setstate__(self, state):
    pass


def _stand_ins(names):
  """Inert stand-ins for classes known to lie in checkpoints, so that none of their code is needed.

  The original InstructPix2Pix and Stable Diffusion files hold Lightning's callbacks.
  """
  return [(Inert, name) for name in names if name.split('.')[0] in _BOOKKEEPING]


def is_finite(array: np.ndarray) -> bool:
  """Whether a float array holds neither NaN nor infinity."""
  return bool(np.isfinite(array).all())


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A float array as `dtype`, other arrays as they are.

  Raises:
    InputError: naming the tensor, if it is not finite before or after.
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


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  dtype: str = 'float32',
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one safetensors file, atomically, tensor by tensor, floats cast to `dtype`.

  Raises:
    InputError: `dtype` is unknown, or a tensor is not finite or does not fit it.
    OSError: the file does not read back as it was to be written.
  """
  kind = float_dtype(dtype)
  path = Path(path)
  layout = _layout(tensors, kind)
  with replacing(path) as temporary:
    with temporary.open('wb') as file:
      file.write(_header(layout, {'format': 'pt', **(metadata or {})}))
      for name in layout:
        file.write(_bytes(cast(name, tensors[name], kind)).data)
      file.flush()
      os.fsync(file.fileno())
    _check_same(_read_safetensors(temporary)[0], path, tensors, kind)


def write_torch(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  dtype: str,
  also: Mapping[str, str],
  counters: Mapping[str, np.ndarray],
  notes: Mapping[str, Any],
) -> None:
  """Writes `{'state_dict': ..., **notes}` by torch.save, atomically, floats cast to `dtype`.

  Args:
    also: further names of tensors, {new: old}; they take no more room.
    counters: further tensors, kept as they are.

  Raises:
    InputError: torch is not installed, or as `write_safetensors`.
    OSError: the file does not read back as it was to be written.
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
  with replacing(path) as temporary:
    with temporary.open('wb') as file:
      torch.save({'state_dict': state, **notes}, file)
      file.flush()
      os.fsync(file.fileno())
    found, _ = _read_torch(temporary)
    _check_same(found, path, tensors, kind)


def need_torch(path: Path) -> Any:
  """torch, or an InputError that says for which file it is needed."""
  try:
    import torch
  except ImportError:
    raise InputError(f'{path}: reading and writing {path.suffix} files needs PyTorch; pip install '
                     'torch, or use a .safetensors file.') from None  # fmt: skip
  return torch


def float_dtype(dtype: str) -> np.dtype:
  """The numpy dtype of 'float32', 'float16' or 'bfloat16'; InputError for any other name."""
  if dtype not in DTYPES:
    raise InputError(f'dtype {dtype!r} is unknown; use {", ".join(DTYPES)}.')
  return DTYPES[dtype]


def _layout(tensors, dtype):
  """Name -> (dtype, shape) in the file's order."""
  layout = {}
  for name in tensors:
    array = tensors[name]
    layout[name] = dtype if array.dtype in FLOATS else array.dtype, array.shape
  # Wide types first, so that every tensor is aligned; then by name, so that files are repeatable.
  return dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _header(layout, metadata):
  header: dict[str, Any] = {'__metadata__': metadata}
  end = 0
  for name, (dtype, shape) in layout.items():
    begin, end = end, end + dtype.itemsize * math.prod(shape)
    header[name] = {
      'dtype': _SAFETENSORS_NAMES[dtype],
      'shape': list(shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def _check_same(found, path, tensors, dtype):
  for name in tensors:
    wanted = cast(name, tensors[name], dtype)
    same = found[name].dtype == wanted.dtype and found[name].shape == wanted.shape
    if not same or not np.array_equal(_bytes(found[name]), _bytes(wanted)):
      raise OSError(f'{path}: {name} does not read back as it was written; is the disk sound?')


def _bytes(array):
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A temporary name beside `path` that takes its place at the end, or vanishes on any error.

  It is for a file or a folder. Of several that do so at the same time, the last one stays.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.temporary_name(path) as temporary:
    yield temporary
    if temporary.is_dir():
      _replace_folder(temporary, path)
    else:
      os.replace(temporary, path)


def _replace_folder(new, path):
  # Folders cannot be replaced in one step: the old one steps aside, and returns if that fails.
  while True:
    with storage.temporary_name(path) as old:
      with contextlib.suppress(FileNotFoundError):
        os.rename(path, old)
      try:
        os.rename(new, path)
        return
      except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
          continue  # another one took its place meanwhile
        if old.exists():
          os.rename(old, path)
        raise
