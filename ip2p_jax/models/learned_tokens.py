"""Tokens that were added to a tokenizer's vocabulary, as textual inversion does."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ip2p_jax.errors import InputError

# The files of a tokenizer, in the old layouts and the new one.
VOCABULARY, MERGES, ONE_FILE = 'vocab.json', 'merges.txt', 'tokenizer.json'
CONFIG, SPECIAL, ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'


class AddedToken(NamedTuple):
  """A piece of text that is one token, whatever the merges say; flags as in `tokenizers`."""

  id: int
  content: str
  single_word: bool = False  # not within a word
  lstrip: bool = False  # takes spaces before it along
  rstrip: bool = False
  normalized: bool = True  # found in the text in lower case, and then in any case
  special: bool = False


def learned_tokens(files: Mapping[str, bytes], source: str = 'tokenizer') -> list[AddedToken]:
  """The added tokens that the vocabulary lacks, by id: each has a row of its own in the embedding.

  Args:
    files: contents by name, in any layout.
    source: for messages.

  Raises InputError if a note of them cannot be read, or two of them contradict each other.
  """
  found: dict[str, AddedToken] = {}
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
      found[content] = _token(content, number, content in flags, flags.get(content, {}))
    for note in one_file.get('added_tokens', ()):
      found[note['content']] = _token(note['content'], note['id'], note['special'], note)
    for number, note in (config.get('added_tokens_decoder') or {}).items():
      found[note['content']] = _token(note['content'], int(number), note['special'], note)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f'{source}: the added tokens cannot be read ({error!r}).') from None
  for token in found.values():
    known = vocabulary.get(token.content, token.id)
    if known != token.id:
      raise InputError(f'{source}: the token {token.content!r} is {token.id} among the added ones '
                       f'and {known} in the vocabulary; save the tokenizer again.')  # fmt: skip
  taken = {number: content for content, number in vocabulary.items()}
  learned = [token for token in found.values() if token.content not in vocabulary]
  for token in learned:
    other = taken.setdefault(token.id, token.content)
    if other != token.content:
      raise InputError(f'{source}: the tokens {other!r} and {token.content!r} have the same id, '
                       f'{token.id}; save the tokenizer again.')  # fmt: skip
  return sorted(learned)


def _token(content: str, number: int, special: bool, flags: Mapping[str, Any]) -> AddedToken:
  if not isinstance(number, int) or not content:
    raise ValueError(f'{content!r}: {number!r}')
  own = {x: bool(flags[x]) for x in ('single_word', 'lstrip', 'rstrip', 'normalized') if x in flags}
  return AddedToken(number, content, **{'normalized': not special} | own, special=bool(special))
