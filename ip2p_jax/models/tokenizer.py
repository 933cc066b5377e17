"""CLIP's tokenizer: text -> token ids, from the files of a checkpoint.

It uses only the `tokenizers` library: importing transformers takes seconds (and loads torch if it
is installed). The ids are those of transformers' CLIPTokenizer.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ip2p_jax.errors import InputError
from ip2p_jax.models.learned_tokens import learned_tokens

START, END = '<|startoftext|>', '<|endoftext|>'
# Contractions, words, single digits, and runs of other characters except spaces.
PIECES = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class ClipTokenizer:
  """`tokenizer(texts)` -> int32 [B, length]: start, at most length - 2 tokens, end, padding."""

  def __init__(
    self,
    files: Mapping[str, bytes],
    length: int = 77,
    vocab_size: int | None = None,
    source: str = 'tokenizer',
  ):
    """Builds it from file names and contents (`vocab.json` and `merges.txt`, or `tokenizer.json`).

    Args:
      files: contents by file name; `tokenizer_config.json` or `special_tokens_map.json` may name
        the padding token (SD 2.x pads with '!', all others with the end). Each learned token is one
        id, in any file.
      length: tokens per text, the text encoder's max_position_embeddings.
      vocab_size: of the text encoder, to check the ids.
      source: path, for messages.

    Raises InputError if files are missing or damaged, or contradict each other.
    """
    vocab, merges = _vocab_and_merges(files, source)
    _check_vocab(vocab, merges, vocab_size, source)
    learned = learned_tokens(files, source)
    if lacking := [token.content for token in learned if token.id >= (vocab_size or math.inf)]:
      raise InputError(
        f'{source}: the text encoder has {vocab_size} rows, none for the learned tokens'
        f' {", ".join(lacking)}; save the whole pipeline again, with the embedding in it.'
      )
    self.length, self.learned = length, [token.content for token in learned]
    vocab = vocab | {token.content: token.id for token in learned}
    pad = _pad_token(files)
    for token in (START, END, pad):
      if token not in vocab:
        raise InputError(f'{source}: the vocabulary lacks the token {token!r}.')
    self._start, self._end, self._pad = vocab[START], vocab[END], vocab[pad]
    self._bpe = _bpe(vocab, merges, pad, learned)
    self._vectors = {vocab[name]: (name, ' '.join(_vectors(name, vocab))) for name in self.learned}

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    ids = np.full((len(texts), self.length), self._pad, np.int32)
    texts = [self._spelled_out(text) for text in texts]
    for row, encoding in zip(ids, self._bpe.encode_batch(texts), strict=True):
      tokens = [self._start, *encoding.ids[: self.length - 2], self._end]
      row[: len(tokens)] = tokens
    return ids

  def decode(self, token_ids: np.ndarray) -> str:
    """The text of ids [L], in lower case, without start, end and padding."""
    return self._bpe.decode(token_ids.tolist()).strip()

  def words(self, text: str) -> list[tuple[str, range]]:
    """The words that fit, in lower case, each with the places of its tokens in `self(texts)`.

    Punctuation is separate: 'A cat, asleep' has the words 'a', 'cat', ',' and 'asleep'.
    """
    text = self._spelled_out(text)
    encoding = self._bpe.encode(text)
    fitting = range(min(len(encoding.ids), self.length - 2))
    words = []
    for _, group in itertools.groupby(fitting, lambda i: encoding.word_ids[i]):
      tokens = list(group)
      first, last = encoding.offsets[tokens[0]][0], encoding.offsets[tokens[-1]][1]
      words.append((text[first:last].strip().lower(), range(tokens[0] + 1, tokens[-1] + 2)))
    return words

  def spaced_words(self, text: str) -> list[range]:
    """The token places of each word between spaces, with punctuation; empty if it is cut off."""
    encoding, places, stop = self._bpe.encode(text), [], 0
    offsets = []
    for token, offset in zip(encoding.ids, encoding.offsets, strict=True):
      _, vectors = self._vectors.get(token, ('', 'one'))
      offsets += [offset] * len(vectors.split(' '))
    del offsets[self.length - 2 :]
    for word in re.finditer(r'\S+', text):
      start = stop
      while stop < len(offsets) and offsets[stop][0] < word.end():
        stop += 1
      places.append(range(start + 1, stop + 1))
    return places

  def cut_off(self, text: str) -> str:
    """The end of `text` that does not fit and is ignored; '' if all of it fits."""
    return self._bpe.decode(self._bpe.encode(self._spelled_out(text)).ids[self.length - 2 :])

  def _spelled_out(self, text):
    """The text with each learned token of several vectors replaced by all of its tokens."""
    if self.learned:
      for token in sorted(self._vectors.keys() & self._bpe.encode(text).ids):
        text = text.replace(*self._vectors[token])
    return text


def _vocab_and_merges(files, source):
  try:
    if 'vocab.json' in files and 'merges.txt' in files:
      lines = files['merges.txt'].decode('utf8').splitlines()
      merges = [
        tuple(line.split(' ')) for line in lines if line and not line.startswith('#version')
      ]
      return json.loads(files['vocab.json']), merges
    if 'tokenizer.json' in files:
      model = json.loads(files['tokenizer.json'])['model']
      return model['vocab'], [tuple(m.split(' ') if isinstance(m, str) else m)
                              for m in model['merges']]  # fmt: skip
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(f'{source}: the tokenizer files cannot be read ({error}).') from None
  raise InputError(f'{source}: needs vocab.json and merges.txt, or tokenizer.json.')


def _check_vocab(vocab, merges, vocab_size, source):
  if not isinstance(vocab, dict):
    raise InputError(f'{source}: the vocabulary is not a list of tokens and ids.')
  ids = list(vocab.values())
  if not all(isinstance(i, int) and 0 <= i < (vocab_size or len(ids) * 2) for i in ids):
    raise InputError(f'{source}: the vocabulary has ids that the text encoder has no rows for.')
  if any(len(merge) != 2 or ''.join(merge) not in vocab for merge in merges):
    raise InputError(f'{source}: merges.txt does not fit the vocabulary; fetch both again.')
  merged = {''.join(merge) for merge in merges}
  rest = [token for token in vocab if token not in merged and len(token.removesuffix('</w>')) > 1]
  # A real vocabulary is bytes, merges and two marks; no text gives any other token. Small
  # vocabularies of tests may have others; in a large one, merges.txt was cut short.
  if len(vocab) > 1000 and len(rest) > len(vocab) // 100:
    raise InputError(f'{source}: merges.txt is cut short; {len(rest)} tokens have no merge.')


def _vectors(name, vocab) -> list[str]:
  """The tokens of all vectors of a learned token: '<cat>', '<cat>_1', '<cat>_2', ..."""
  further = (f'{name}_{i}' for i in itertools.count(1))
  return [name, *itertools.takewhile(vocab.__contains__, further)]


def _bpe(vocab, merges, pad, learned) -> Tokenizer:
  bpe = Tokenizer(models.BPE(vocab, merges, unk_token=END, end_of_word_suffix='</w>'))
  bpe.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r'\s+'), ' '), normalizers.Lowercase()]
  )
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(PIECES), 'removed', invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace('</w>', ' ')])
  bpe.add_special_tokens([START, END, pad])  # SD 2.x's '!' is a separate token in a text, too
  for token in learned:  # the vocabulary has them already, so that each keeps its id
    flags = token._asdict()
    del flags['id']
    bpe.add_tokens([AddedToken(**flags)])
  return bpe


def _pad_token(files) -> str:
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    token = json.loads(files.get(name, b'{}')).get('pad_token')
    if token:
      return token if isinstance(token, str) else token['content']
  return END
