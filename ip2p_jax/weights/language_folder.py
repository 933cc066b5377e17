"""The folder in which transformers keeps a language model: config, weights, tokenizer."""

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
# Of use to others, and carried along as they are.
_GENERATION = 'generation_config.json'
_OTHERS = ('tokenizer_config.json', _GENERATION, 'special_tokens_map.json',
           'chat_template.jinja')  # fmt: skip


@dataclasses.dataclass
class LanguageCheckpoint:
  """A language model as transformers has it.

  Attributes:
    config: what config.json says, but for `eos_token_id` where generation_config.json has one:
      transformers goes by that, and models that chat name more ends there.
    tensors: transformers name -> array in torch's layout, read when asked for. A head that is the
      embedding (`tie_word_embeddings`) is not among them.
    tokenizer: contents of tokenizer.json.
    source: where it came from, for messages.
    others: file name -> contents, of files that are only carried along.
  """

  config: dict[str, Any]
  tensors: Mapping[str, np.ndarray]
  tokenizer: bytes
  source: str
  others: dict[str, bytes] = dataclasses.field(default_factory=dict)


def read_language(path: str | os.PathLike) -> LanguageCheckpoint:
  """Reads a local folder, its weights in one file or in shards.

  Raises:
    InputError: naming the file that is missing or damaged.
  """
  path = Path(path)
  if not path.is_dir():
    raise InputError(f'{path}: no such folder; give one as transformers saves a language model.')
  config = storage.read_json(path / _CONFIG, dict)
  if not (path / _TOKENIZER).is_file():
    raise InputError(f'{path / _TOKENIZER}: no such file; a language model needs its tokenizer in '
                     'the one-file form (AutoTokenizer.from_pretrained(...).save_pretrained(...) '
                     'of transformers writes it).')  # fmt: skip
  found = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
  if found is None:
    raise InputError(f'{path}: has no weights; expected {" or ".join(_WEIGHTS[:2])}.')
  tensors, _ = read_tensors(found)
  kept = [name for name in tensors if not _is_surplus(name, config)]
  others = {name: (path / name).read_bytes() for name in _OTHERS if (path / name).is_file()}
  if _GENERATION in others:
    ends = storage.read_json(path / _GENERATION, dict).get('eos_token_id')
    if ends is not None:
      config['eos_token_id'] = ends
  tokenizer = (path / _TOKENIZER).read_bytes()
  return LanguageCheckpoint(
    config, renamed(tensors, dict(zip(kept, kept, strict=True))), tokenizer, str(path), others
  )


def write_language(
  checkpoint: LanguageCheckpoint,
  path: str | os.PathLike,
  dtype: str = 'float32',
  overwrite: bool = False,
) -> None:
  """Writes the folder that transformers' `from_pretrained` loads, at once or not at all.

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
  kept = [name for name in tensors if not _is_surplus(name, config)]
  with storage.replacing(path) as folder:
    folder.mkdir()
    text = json.dumps({**config, 'torch_dtype': dtype}, indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(text + '\n', encoding='utf-8')
    (folder / _TOKENIZER).write_bytes(checkpoint.tokenizer)
    for name, content in checkpoint.others.items():
      (folder / name).write_bytes(content)
    write_safetensors(
      folder / _WEIGHTS[0], renamed(tensors, dict(zip(kept, kept, strict=True))), dtype
    )


def _is_surplus(name, config):
  """A tensor that says nothing new: a copy of the embedding, or a buffer of old versions."""
  is_copy = name == 'lm_head.weight' and config.get('tie_word_embeddings') is True
  return is_copy or name.endswith('rotary_emb.inv_freq')


def _check_free(path, overwrite):
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  if not overwrite:
    raise InputError(f'{path}: already exists; choose another name, or say to overwrite it.')
  if not all((path / name).is_file() for name in (_CONFIG, _TOKENIZER)):
    raise InputError(f'{path}: is not a language model, so it is not overwritten; remove it '
                     'yourself or choose another name.')  # fmt: skip
