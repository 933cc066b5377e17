"""The folder of a language model as transformers saves it: config, weights, tokenizer."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.weights.files import read_tensors, write_safetensors
from ip2p_jax.weights.tensors import float_dtype, renamed

_CONFIG, _TOKENIZER = 'config.json', 'tokenizer.json'
_WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin',
            'pytorch_model.bin.index.json')  # fmt: skip
# Files for other programs; they are copied unchanged.
_GENERATION = 'generation_config.json'
_OTHERS = ('tokenizer_config.json', _GENERATION, 'special_tokens_map.json',
           'chat_template.jinja')  # fmt: skip


@dataclasses.dataclass
class LanguageCheckpoint:
  """A language model in transformers' form.

  Attributes:
    config: config.json, with `eos_token_id` of generation_config.json if it has one: transformers
      uses that, and chat models name more end tokens there.
    tensors: transformers name -> array in torch's layout, read on each access. A head that equals
      the embedding (`tie_word_embeddings`) is left out.
    tokenizer: contents of tokenizer.json.
    source: its path, for messages.
    others: file name -> contents, of files that are only copied.
  """

  config: dict[str, Any]
  tensors: Mapping[str, np.ndarray]
  tokenizer: bytes
  source: str
  others: dict[str, bytes] = dataclasses.field(default_factory=dict)


def read_language(path: str | os.PathLike) -> LanguageCheckpoint:
  """Reads a local folder, its weights in one file or in shards.

  Raises:
    InputError: names the file that is missing or damaged.
  """
  path = Path(path)
  if not path.is_dir():
    raise InputError(f'{path}: no such folder; give a language model that transformers saved.')
  if not (path / _CONFIG).is_file():
    raise InputError(f'{path}: has no config.json; give a language model that transformers saved.')
  config = storage.read_json(path / _CONFIG, dict)
  if not (path / _TOKENIZER).is_file():
    raise InputError(f'{path / _TOKENIZER}: no such file; a language model needs its tokenizer in '
                     'the one-file form (AutoTokenizer.from_pretrained(...).save_pretrained(...) '
                     'of transformers writes it).')  # fmt: skip
  file = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
  if file is None:
    raise InputError(f'{path}: has no weights; expected {" or ".join(_WEIGHTS[:2])}.')
  tensors, _ = read_tensors(file)
  names = [name for name in tensors if not _is_surplus(name, config)]
  others = {name: (path / name).read_bytes() for name in _OTHERS if (path / name).is_file()}
  if _GENERATION in others:
    ends = storage.read_json(path / _GENERATION, dict).get('eos_token_id')
    if ends is not None:
      config['eos_token_id'] = ends
  tokenizer = (path / _TOKENIZER).read_bytes()
  return LanguageCheckpoint(
    config, renamed(tensors, dict(zip(names, names, strict=True))), tokenizer, str(path), others
  )


def write_language(
  checkpoint: LanguageCheckpoint,
  path: str | os.PathLike,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> None:
  """Writes the folder that transformers' `from_pretrained` loads; a failed write leaves nothing.

  Args:
    checkpoint: what to write.
    path: the folder, which may exist if it is empty.
    dtype: 'float32', 'float16' or 'bfloat16'.
    overwrite: replace an older language model.

  Raises:
    InputError: the destination is taken, `dtype` is unknown, or a tensor does not fit it.
  """
  path = Path(path).resolve()
  float_dtype(dtype)
  _check_free(path, overwrite)
  config = {key: value for key, value in checkpoint.config.items() if key != 'dtype'}
  tensors = checkpoint.tensors
  names = [name for name in tensors if not _is_surplus(name, config)]
  with storage.replacing(path) as folder:
    folder.mkdir()
    text = json.dumps({**config, 'torch_dtype': dtype}, indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(text + '\n', encoding='utf-8')
    (folder / _TOKENIZER).write_bytes(checkpoint.tokenizer)
    for name, content in checkpoint.others.items():
      (folder / name).write_bytes(content)
    write_safetensors(
      folder / _WEIGHTS[0], renamed(tensors, dict(zip(names, names, strict=True))), dtype
    )


def _is_surplus(name, config):
  """Whether a tensor is redundant: a copy of the embedding, or a buffer of old versions."""
  is_copy = name == 'lm_head.weight' and config.get('tie_word_embeddings') is True
  return is_copy or name.endswith('rotary_emb.inv_freq')


def _check_free(path, overwrite):
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  if not overwrite:
    storage.refuse_existing(path)
  if not all((path / name).is_file() for name in (_CONFIG, _TOKENIZER)):
    raise InputError(f'{path}: is not a language model, so it is not overwritten; remove it '
                     'yourself or choose another name.')  # fmt: skip
