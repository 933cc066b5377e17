"""CLIP's tokenizer as files: the standard one, and one layout for all versions.

Tokens that textual inversion adds to the vocabulary are in `added_tokens.json` (names and ids), in
`tokenizer_config.json` under `added_tokens_decoder` (with their flags, since transformers 4.34), or
in the one `tokenizer.json` of transformers 5. Every reader knows the first two, so we use those.
"""

import gzip
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.models.learned_tokens import (
  ADDED,
  CONFIG,
  MERGES,
  ONE_FILE,
  SPECIAL,
  VOCABULARY,
  learned_tokens,
)

FILES = (VOCABULARY, MERGES, CONFIG, SPECIAL, ADDED)

# Keys that only transformers 5 writes; version 4 fails on the list of extra_special_tokens.
_NOT_FOR_ALL = ('backend', 'is_local', 'local_files_only')


def read(folder: Path) -> dict[str, bytes]:
  """A tokenizer's folder as `FILES`; the first two are always there.

  Raises:
    InputError: the folder or one of its files is missing or damaged.
  """
  if not folder.is_dir():
    raise InputError(f'{folder}: no such folder; a diffusers checkpoint has one per component.')
  names = (*FILES, ONE_FILE)
  files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
  if VOCABULARY not in files and ONE_FILE in files:
    files = _split(folder / ONE_FILE) | files
  for name in (VOCABULARY, MERGES):
    if name not in files:
      raise InputError(f'{folder / name}: no such file, and no tokenizer.json in its place.')
  for name, content in files.items():
    try:
      content.decode()
    except UnicodeDecodeError:
      raise InputError(f'{folder / name}: not UTF-8 text; fetch the file again.') from None
    if name.endswith('.json') and (folder / name).is_file():
      storage.read_json(folder / name, dict)  # raises if it is damaged
  return _in_one_layout(files, str(folder))


def without_learned(files: Mapping[str, bytes]) -> dict[str, bytes]:
  """The tokenizer without its added tokens."""
  if not learned_tokens(files):
    return dict(files)
  learned = {token.content for token in learned_tokens(files)}
  config = json.loads(files.get(CONFIG, b'{}'))
  notes = config.get('added_tokens_decoder') or {}
  rest = {number: note for number, note in notes.items() if note['content'] not in learned}
  special = json.loads(files.get(SPECIAL, b'{}'))
  for note in (config, special):
    note.pop('additional_special_tokens', None)
  result = {name: content for name, content in files.items() if name != ADDED}
  return result | {CONFIG: _json(config | {'added_tokens_decoder': rest}), SPECIAL: _json(special)}


def clip_tokenizer(pad_token: str | None = None) -> dict[str, bytes]:
  """The files of CLIP's tokenizer (49,408 tokens), which SD 1.x and SD 2.x use.

  Args:
    pad_token: SD 1.x pads with the end token (None), SD 2.x with '!'.
  """
  packed = resources.files('ip2p_jax.weights').joinpath('clip_merges.txt.gz').read_bytes()
  merges = gzip.decompress(packed)
  pairs = merges.decode().splitlines()[1:]
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  # Every byte has a printable character: its own, or one above 255.
  characters = [chr(byte) for byte in printable] + [
    chr(256 + i) for i in range(256 - len(printable))
  ]
  tokens = characters + [f'{character}</w>' for character in characters]
  tokens += [pair.replace(' ', '') for pair in pairs] + ['<|startoftext|>', '<|endoftext|>']
  special = {
    'bos_token': '<|startoftext|>',
    'eos_token': '<|endoftext|>',
    'unk_token': '<|endoftext|>',
    'pad_token': pad_token or '<|endoftext|>',
  }
  config = {
    'add_prefix_space': False,
    'do_lower_case': True,
    'errors': 'replace',
    'model_max_length': 77,
    'tokenizer_class': 'CLIPTokenizer',
    **special,
  }
  vocabulary = {token: i for i, token in enumerate(tokens)}
  return {
    VOCABULARY: json.dumps(vocabulary, ensure_ascii=False).encode(),
    MERGES: merges,
    CONFIG: _json(config),
    SPECIAL: _json(special),
  }


def _in_one_layout(files: dict[str, bytes], source: str) -> dict[str, bytes]:
  """`FILES` from any layout; a tokenizer without learned tokens stays, byte for byte."""
  learned = learned_tokens(files, source)
  result = {name: files[name] for name in FILES if name in files}
  if not learned:
    return result
  config = json.loads(files.get(CONFIG, b'{}'))
  config = {key: value for key, value in config.items() if key not in _NOT_FOR_ALL}
  if isinstance(config.get('extra_special_tokens'), list):
    config['additional_special_tokens'] = config.pop('extra_special_tokens')
  notes = dict(config.get('added_tokens_decoder') or {})
  for token in learned:
    flags = token._asdict()
    notes[str(flags.pop('id'))] = flags
  config['added_tokens_decoder'] = notes
  added = json.loads(files.get(ADDED, b'{}')) | {token.content: token.id for token in learned}
  return result | {CONFIG: _json(config), ADDED: _json(added)}


def _split(path: Path) -> dict[str, bytes]:
  """The vocabulary and merges from the one file of transformers 5."""
  model = storage.read_json(path, dict).get('model', {})
  if model.get('type') != 'BPE':
    raise InputError(f"{path}: is not a BPE tokenizer, as CLIP's is.")
  pairs = [pair if isinstance(pair, str) else ' '.join(pair) for pair in model['merges']]
  return {
    VOCABULARY: json.dumps(model['vocab'], ensure_ascii=False).encode(),
    MERGES: '\n'.join(['#version: 0.2', *pairs, '']).encode(),
  }


def _json(value: Any) -> bytes:
  return json.dumps(value, indent=2).encode()
