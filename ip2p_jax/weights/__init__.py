"""Checkpoints as files: read from and written to diffusers folders and single LDM files.

Both formats share one form in memory, `Checkpoint`: diffusers' names and configs. `to_params` and
`to_tensors` convert between those names and our parameter trees.
"""

import os
from pathlib import Path

from ip2p_jax import storage
from ip2p_jax.diffusion.noise import PREDICTION_TYPES
from ip2p_jax.errors import InputError
from ip2p_jax.models.learned_tokens import learned_tokens
from ip2p_jax.weights import diffusers_folder, ldm_file, torch_file
from ip2p_jax.weights.files import read_tensors, write_safetensors
from ip2p_jax.weights.ldm_file import without_learned
from ip2p_jax.weights.names import to_params, to_tensors, with_input_channels
from ip2p_jax.weights.tensors import Checkpoint, Tensors, float_dtype
from ip2p_jax.weights.tokenizer_files import clip_tokenizer

__all__ = [
  'SUFFIXES',
  'Checkpoint',
  'Tensors',
  'check_destination',
  'clip_tokenizer',
  'learned_tokens',
  'read',
  'read_tensors',
  'to_params',
  'to_tensors',
  'with_input_channels',
  'without_learned',
  'write',
  'write_safetensors',
]

SUFFIXES = {'ldm': '.safetensors', 'original': '.ckpt'}  # of single files, by format


def read(
  path: str | os.PathLike,
  variant: str | None = None,
  ema: bool | None = None,
  prediction_type: str | None = None,
) -> Checkpoint:
  """Reads a Stable Diffusion 1.x or 2.x checkpoint: a diffusers folder or a single file.

  Args:
    path: a local folder, `.safetensors` or `.ckpt`.
    variant: for a folder: its weight files ('fp16', 'non_ema').
    ema: for a file with a moving average: whether to take it. None takes it unless the live weights
      were changed without it, as by a merge.
    prediction_type: 'epsilon' or 'v_prediction'; None takes the checkpoint's. Most single files
      have none and count as epsilon; SD 2.x at 768 px is v_prediction.

  Raises:
    InputError: names the file and the problem.
  """
  path = Path(path)
  if prediction_type not in (None, *PREDICTION_TYPES):
    raise InputError(
      f'prediction_type {prediction_type!r} is unknown; use epsilon or v_prediction.'
    )
  if not path.exists():
    raise InputError(f'{path}: no such file or folder; download the checkpoint first.')
  if path.is_dir():
    if ema is not None:
      raise InputError(f'{path}: a folder holds one set of weights, so ema={ema} cannot choose; '
                       'leave out --ema or --no-ema, or name files by --variant.')  # fmt: skip
    checkpoint = diffusers_folder.read(path, variant)
  elif variant is not None:
    raise InputError(f'{path}: a single file has no variants; leave out variant {variant!r}.')
  else:
    checkpoint = ldm_file.read(path, ema)
  if prediction_type is not None:
    checkpoint.configs['scheduler']['prediction_type'] = prediction_type
  return checkpoint


def write(
  checkpoint: Checkpoint,
  path: str | os.PathLike,
  to: str = 'diffusers',
  dtype: str = 'float32',
  variant: str | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a checkpoint as a diffusers folder or as one LDM file.

  A failed write leaves nothing. The written file is read back and compared.

  Args:
    checkpoint: what to write.
    path: the folder ('diffusers'), the `.safetensors` ('ldm') or the `.ckpt` file ('original').
    to: 'diffusers', 'ldm' (A1111 and ComfyUI load it), or 'original' (InstructPix2Pix's own code
      loads it; writing needs torch).
    dtype: of all written weights: 'float32', 'float16' or 'bfloat16'.
    variant: for a folder: 'fp16' puts it into the names of the weight files.
    overwrite: whether an older file, or an older diffusers folder, may be replaced.

  Raises:
    InputError: the destination is taken, an argument is unknown, or a weight does not fit `dtype`.
    OSError: the disk failed.
  """
  check_destination(path, to, dtype, variant, overwrite)
  if to == 'diffusers':
    diffusers_folder.write(checkpoint, path, dtype, variant, overwrite)
  elif to == 'ldm':
    ldm_file.write(checkpoint, path, dtype)
  else:
    ldm_file.write_original(checkpoint, path, dtype)


def check_destination(
  path: str | os.PathLike, to: str, dtype: str, variant: str | None, overwrite: bool
) -> None:
  """Raises the InputError that `write` would, before anything is read or written."""
  path = Path(path)
  float_dtype(dtype)
  if to == 'diffusers':
    if path.suffix in SUFFIXES.values():
      raise InputError(f'{path}: is the name of a file; diffusers needs a folder.')
    diffusers_folder.check_free(path, overwrite)
    return
  if to not in SUFFIXES:
    raise InputError(f'to {to!r} is unknown; use diffusers, {" or ".join(SUFFIXES)}.')
  if path.suffix != SUFFIXES[to] or variant is not None:
    kind = 'an LDM file' if to == 'ldm' else "the original's file"
    raise InputError(f'{path}: {kind} must end in {SUFFIXES[to]}, and has no variant.')
  if to == 'original':
    torch_file.need_torch(path)
  if path.is_dir() or (path.exists() and not overwrite):
    storage.refuse_existing(path)
