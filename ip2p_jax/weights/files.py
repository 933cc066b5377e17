"""Files that hold tensors: `.safetensors`, shards of them, and torch files.

Reading is lazy: a `Tensors` reads an array on each access, so that a 4 GB file needs memory for one
tensor only. A file is written to a temporary name beside the destination, read back and compared,
and only then renamed.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.weights import torch_file
from ip2p_jax.weights.tensors import (
  FLOATS,
  Tensors,
  as_bytes,
  cast,
  check_same,
  damaged,
  float_dtype,
)

_NAMES = {
  np.dtype(np.float64): 'F64',
  np.dtype(np.float32): 'F32',
  np.dtype(np.float16): 'F16',
  np.dtype(ml_dtypes.bfloat16): 'BF16',
  np.dtype(np.int64): 'I64',
  np.dtype(np.int32): 'I32',
  np.dtype(np.int16): 'I16',
  np.dtype(np.int8): 'I8',
  np.dtype(np.uint8): 'U8',
  np.dtype(np.bool_): 'BOOL',
}


def read_tensors(path: str | os.PathLike) -> tuple[Tensors, dict[str, str]]:
  """The tensors and the metadata of a `.safetensors`, `.safetensors.index*.json` or torch file.

  Raises:
    InputError: the file is missing, damaged, of another kind, or would run code when loaded.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f'{path}: no such file.')
  if path.suffix == '.safetensors':
    return _read_safetensors(path)
  if path.suffix == '.json':
    return _read_shards(path), {}
  if path.suffix in torch_file.SUFFIXES:
    return torch_file.read(path)
  suffixes = ', '.join(('.safetensors', *torch_file.SUFFIXES))
  raise InputError(f'{path}: not a checkpoint file; give one that ends in {suffixes}, or a folder.')


def _read_safetensors(path):
  try:
    file = safe_open(path, 'numpy')
  except SafetensorError as error:
    raise damaged(path, str(error).removeprefix('Error while deserializing header: ')) from None
  for name in file.keys():
    if (kind := file.get_slice(name).get_dtype()) not in _NAMES.values():
      raise InputError(f'{path}: {name} is stored as {kind}, which is not supported; use a '
                       'float32, float16 or bfloat16 version of the file.')  # fmt: skip
  makers = {name: lambda name=name: file.get_tensor(name) for name in file.offset_keys()}
  return Tensors(makers), file.metadata() or {}


def _read_shards(index):
  files: dict[str, Tensors] = {}
  makers = {}
  weight_map = storage.read_json(index, dict).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(f'{index}: has no weight_map, so it is not an index of weight files.')
  for name, file in weight_map.items():
    if file not in files:
      files[file] = read_tensors(index.with_name(file))[0]
    if name not in files[file]:
      raise InputError(f'{index}: says that {name} is in {file}, which does not hold it.')
    makers[name] = lambda shard=files[file], name=name: shard[name]
  return Tensors(makers)


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  dtype: str = 'float32',
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes one safetensors file, atomically, tensor by tensor, floats cast to `dtype`.

  Raises:
    InputError: `dtype` is unknown, or a tensor is not finite or does not fit it.
    OSError: the file does not read back as it was written.
  """
  kind = float_dtype(dtype)
  path = Path(path)
  layout = _layout(tensors, kind)
  with storage.replacing(path) as temporary:
    with temporary.open('wb') as file:
      file.write(_header(layout, {'format': 'pt', **(metadata or {})}))
      for name in layout:
        file.write(as_bytes(cast(name, tensors[name], kind)).data)
      file.flush()
      os.fsync(file.fileno())
    check_same(_read_safetensors(temporary)[0], path, tensors, kind)


def _layout(tensors, dtype):
  """Name -> (dtype, shape) in the file's order."""
  layout = {}
  for name in tensors:
    array = tensors[name]
    layout[name] = dtype if array.dtype in FLOATS else array.dtype, array.shape
  # Wide types first, so that every tensor is aligned; then by name, so that the order is fixed.
  return dict(sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _header(layout, metadata):
  header: dict[str, Any] = {'__metadata__': metadata}
  end = 0
  for name, (dtype, shape) in layout.items():
    begin, end = end, end + dtype.itemsize * math.prod(shape)
    header[name] = {
      'dtype': _NAMES[dtype],
      'shape': list(shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text
