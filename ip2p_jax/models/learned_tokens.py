"""Tokens added to a tokenizer's vocabulary, as by textual inversion."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ip2p_jax.errors import InputError

# The files of a tokenizer, in all layouts.
VOCABULARY, MERGES, ONE_FILE = 'vocab.json', 'merges.txt', 'tokenizer.json'
CONFIG, SPECIAL, ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'


class AddedToken(NamedTuple):
  """A text that is always one token, for any merges; flags as in `tokenizers`."""

  id: int
  content: str
  single_word: bool = False  # not within a word
  lstrip: bool = False  # includes spaces before it
  rstrip: bool = False
  normalized: bool = True  # matches in any case
  special: bool = False


def learned_tokens(files: Mapping[str, bytes], source: str = 'tokenizer') -> list[AddedToken]:
  """The added tokens that the vocabulary lacks, by id: each has its own row in the embedding.

  Args:
    files: contents by name, in any layout.
    source: path, for messages.

  Raises InputError if an entry cannot be read, or two entries contradict each other.
  """
  tokens: dict[str, AddedToken] = {}
  try:
    one_file = json.loads(files.get(ONE_FILE, b'{}'))
    config = json.loads(files.get(CONFIG, b'{}'))
    vocabulary = (
      json.loads(files[VOCABULARY]) if VOCABULARY in files else one_file['model']['vocab']
    )
    special = json.loads(files.get(SPECIAL, b'{}')).get('additional_special_tokens') or ()
    flags = {x['content']: x for x in special if isinstance(x, dict)}
    flags |= {x: {} for x in special if isinstance(x, str)}
    for content, number in json.loads(files.get(ADDED, b'{}')).items():
      tokens[content] = _token(content, number, content in flags, flags.get(content, {}))
    for note in one_file.get('added_tokens', ()):
      tokens[note['content']] = _token(note['content'], note['id'], note['special'], note)
    for number, note in (config.get('added_tokens_decoder') or {}).items():
      tokens[note['content']] = _token(note['content'], int(number), note['special'], note)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f'{source}: the added tokens cannot be read ({error!r}).') from None
  for token in tokens.values():
    number = vocabulary.get(token.content, token.id)
    if number != token.id:
      raise InputError(f'{source}: the token {token.content!r} is {token.id} among the added ones '
                       f'and {number} in the vocabulary; save the tokenizer again.')  # fmt: skip
  taken = {number: content for content, number in vocabulary.items()}
  learned = [token for token in tokens.values() if token.content not in vocabulary]
  for token in learned:
    first = taken.setdefault(token.id, token.content)
    if first != token.content:
      raise InputError(f'{source}: the tokens {first!r} and {token.content!r} have the same id, '
                       f'{token.id}; save the tokenizer again.')  # fmt: skip
  return sorted(learned)


def _token(content: str, number: int, special: bool, flags: Mapping[str, Any]) -> AddedToken:
  if not isinstance(number, int) or not content:
    raise ValueError(f'{content!r}: {number!r}')
  own = {x: bool(flags[x]) for x in ('single_word', 'lstrip', 'rstrip', 'normalized') if x in flags}
  return AddedToken(number, content, **{'normalized': not special} | own, special=bool(special))
