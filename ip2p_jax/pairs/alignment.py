"""Aligns the tokens of two captions for prompt-to-prompt.

L tokens of a caption (77 with CLIP): start, words, end, padding. A word may be several tokens.
Case does not matter. Signs are separate words, so 'burger' is found in 'burger,'.

(Hertz et al. 2022, section 3.2.) Their aligner maps every token after the last replaced word to the
token at the same position, which is another word if the captions have different numbers of tokens.
This aligner follows words and padding. With equal numbers of tokens, both give the same matrix.
"""

import difflib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer

Span = float | tuple[float, float]


class Alignment(NamedTuple):
  """Maps the attention to a source's tokens to a target's tokens.

  Attributes:
    matrix: float32 [L, L], from source (rows) to target (columns).
    has_source: float32 [L]; 0 for tokens of the target that keep their own attention.
  """

  matrix: np.ndarray
  has_source: np.ndarray


def align(tokenizer: ClipTokenizer, source: str, target: str) -> tuple[str, Alignment]:
  """('replace', ...) if the captions differ only in swapped words, else ('refine', ...)."""
  is_replace = (
    _swapped(tokenizer, source, target) or _pieces_in_order(tokenizer, source, target) is not None
  )
  if is_replace:
    return 'replace', replace(tokenizer, source, target)
  return 'refine', refine(tokenizer, source, target)


def replace(tokenizer: ClipTokenizer, source: str, target: str) -> Alignment:
  """Every word of the target gets the attention of the word in its place in the source.

  If both captions have the same number of words between spaces, signs included, these are paired,
  as in the released code. Else single words and signs are paired, if their order allows it. Words
  with equal numbers of tokens map token by token. Else each token of the new word gets an equal
  share of the attention to all tokens of the old word. Raises InputError if words were inserted or
  left out.
  """
  words, target_words = tokenizer.spaced_words(source), tokenizer.spaced_words(target)
  pairs = list(zip(words, target_words, strict=False))
  if len(words) != len(target_words):
    pairs = _pieces_in_order(tokenizer, source, target)
  if pairs is None:
    raise InputError(
      f'{source!r} has {len(words)} words and {target!r} has {len(target_words)}, so words cannot'
      ' be replaced one by one; use refine.'
    )
  matrix = _ends(tokenizer, source, target)
  for old, new in pairs:
    if len(old) == len(new):
      matrix[old, new] = 1
    elif old and new:
      matrix[np.ix_(old, new)] = 1 / len(new)
  return Alignment(matrix, (matrix.sum(0) > 0).astype(np.float32))


def refine(tokenizer: ClipTokenizer, source: str, target: str) -> Alignment:
  """Tokens that both captions have, in order, get the source's attention. Others keep their own.

  (Needleman and Wunsch 1970, with 1 for a match, -1 for a mismatch, 0 for a gap.)
  """
  ids, target_ids = tokenizer([source, target])
  length, target_length = _used(tokenizer, source), _used(tokenizer, target)
  matrix = _ends(tokenizer, source, target)
  matrix[:length, :target_length] = 0
  for i, j in _common(ids[:length], target_ids[:target_length]):
    matrix[i, j] = 1
  return Alignment(matrix, matrix.sum(0))


def places(tokenizer: ClipTokenizer, text: str, phrase: str) -> list[int]:
  """The tokens of all occurrences of a word or phrase. Raises InputError if there is none."""
  words, wanted = tokenizer.words(text), [word for word, _ in tokenizer.words(phrase)]
  indices = []
  for first in range(len(words) - len(wanted) + 1):
    candidate = words[first : first + len(wanted)]
    if wanted and [word for word, _ in candidate] == wanted:
      indices += [i for _, tokens in candidate for i in tokens]
  if not indices:
    raise InputError(f'the word {phrase!r} is not in {text!r}; use one of its words.')
  return sorted(set(indices))


def mask(tokenizer: ClipTokenizer, text: str, phrases: list[str]) -> np.ndarray:
  """float32 [L], 1 for the tokens of the phrases."""
  result = np.zeros(tokenizer.length, np.float32)
  for phrase in phrases:
    result[places(tokenizer, text, phrase)] = 1
  return result


def equalizer(tokenizer: ClipTokenizer, text: str, weights: Mapping[str, float]) -> np.ndarray:
  """float32 [L]: factors of the attention to each token, from weights of words."""
  result = np.ones(tokenizer.length, np.float32)
  for phrase, weight in weights.items():
    result[places(tokenizer, text, phrase)] = weight
  return result


def windows(
  tokenizer: ClipTokenizer, text: str, steps: int, span: Span, words: Mapping[str, Span]
) -> np.ndarray:
  """int32 [2, L]: each token's control begins at step [0] and ends before step [1].

  A span is two fractions of steps + 1, or only the second; `words` have their own spans. The table
  of the released code has one row more than steps, so 0.95 of 10 steps are all ten.
  """
  window = lambda span: np.minimum(step_window(span, steps + 1), steps)[:, None]
  result = np.tile(window(span).astype(np.int32), (1, tokenizer.length))
  for phrase, span in words.items():
    result[:, places(tokenizer, text, phrase)] = window(span)
  return result


def step_window(span: Span, steps: int) -> tuple[int, int]:
  """The first step of a span and the step after its last. Raises InputError outside of 0 to 1.

  Rounds down in double precision, exactly as the released code: 0.29 of 100 steps are 28.
  """
  start, stop = span if isinstance(span, tuple) else (0.0, span)
  if not 0 <= start <= stop <= 1:
    raise InputError(f'{span} is not a part of the steps; give fractions of 0 to 1: (0, 0.8).')
  return int(start * steps), int(stop * steps)


def _swapped(tokenizer, source, target) -> bool:
  """Whether words between spaces were swapped, and none grew or shrank ('snow' to 'snow,')."""
  names, target_names = (
    [tuple(name for name, at in tokenizer.words(text) if at.start in tokens)
     for tokens in tokenizer.spaced_words(text)]
    for text in (source, target)
  )  # fmt: skip
  pairs = _in_order(names, target_names)
  return pairs is not None and all(
    names[i] == target_names[j]
    or not (set(names[i]) <= set(target_names[j]) or set(target_names[j]) <= set(names[i]))
    for i, j in pairs
  )


def _pieces_in_order(tokenizer, source, target) -> list[tuple[range, range]] | None:
  """The tokens of paired words and signs; None if some have no partner."""
  words, target_words = tokenizer.words(source), tokenizer.words(target)
  pairs = _in_order([name for name, _ in words], [name for name, _ in target_words])
  return None if pairs is None else [(words[i][1], target_words[j][1]) for i, j in pairs]


def _in_order(names, target_names) -> list[tuple[int, int]] | None:
  """The positions of paired names, in order; None if some have no partner."""
  pairs = []
  matcher = difflib.SequenceMatcher(None, names, target_names, autojunk=False)
  for _, i, i_end, j, j_end in matcher.get_opcodes():
    if i_end - i != j_end - j:
      return None
    pairs += zip(range(i, i_end), range(j, j_end), strict=True)
  return pairs


def _used(tokenizer, text) -> int:
  """The number of tokens, with start and end."""
  words = tokenizer.words(text)
  return (words[-1][1].stop if words else 1) + 1


def _ends(tokenizer, source, target) -> np.ndarray:
  """Maps start, end, and padding (to the same position, or to the first padding)."""
  length, target_length = _used(tokenizer, source), _used(tokenizer, target)
  matrix = np.zeros((tokenizer.length,) * 2, np.float32)
  matrix[0, 0] = matrix[length - 1, target_length - 1] = 1
  if length < tokenizer.length:
    for j in range(target_length, tokenizer.length):
      matrix[max(j, length), j] = 1
  return matrix


def _common(a, b) -> list[tuple[int, int]]:
  """The positions of equal items in the best alignment of two sequences. Prefers a gap in `b`."""
  scores = np.zeros((len(a) + 1, len(b) + 1), np.int32)
  for i in range(1, len(a) + 1):
    for j in range(1, len(b) + 1):
      fit = 1 if a[i - 1] == b[j - 1] else -1
      scores[i, j] = max(scores[i - 1, j], scores[i, j - 1], scores[i - 1, j - 1] + fit)
  matches, i, j = [], len(a), len(b)
  while i and j:
    if scores[i, j] == scores[i, j - 1]:
      j -= 1
    elif scores[i, j] == scores[i - 1, j]:
      i -= 1
    else:
      i, j = i - 1, j - 1
      if a[i] == b[j]:
        matches.append((i, j))
  return matches[::-1]
