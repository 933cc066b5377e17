"""Settings for writing edits of captions, and the rules for which answers are kept."""

import dataclasses
import hashlib
from collections.abc import Callable

from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import problems
from ip2p_jax.defaults import MOST_TOKENS
from ip2p_jax.errors import InputError

# Why an answer is refused.
REASONS = {
  'empty': 'no answer',
  'unfinished': 'incomplete',
  'parts': 'not an instruction and a caption',
  'unchanged': 'the caption unchanged',
  'long': 'too long',
  'unrelated': 'the caption of something else',
  'undrawable': 'about places, numbers or the camera',
  'flagged': 'flagged by moderation',
}

Moderate = Callable[[str], bool]  # whether a text must not be used


@dataclasses.dataclass(frozen=True)
class Writing:
  """Settings for writing texts; the defaults are the original's.

  Attributes:
    seed: of the whole run.
    attempts: the most answers to ask for until one is kept, each with another seed.
    max_tokens: of an answer.
    max_words: of an instruction. Captions and instructions must fit into CLIP's 77 tokens, too.
  """

  seed: int = 0
  attempts: int = 4
  temperature: float = 0.7
  top_p: float = 1.0
  frequency_penalty: float = 0.1
  max_tokens: int = 256
  max_words: int = 25

  def __post_init__(self):
    for name in ('attempts', 'max_tokens', 'max_words'):
      if not 1 <= getattr(self, name) <= MOST_TOKENS:
        raise InputError(f'{name} is {getattr(self, name)}; use 1 to {MOST_TOKENS}.')
    if self.top_p == 0:
      raise InputError('top_p is 0, which leaves no token; use a larger one, or temperature 0.')
    for name, low, high in (('temperature', 0, 2), ('top_p', 0, 1), ('frequency_penalty', -2, 2)):
      if not low <= getattr(self, name) <= high:
        raise InputError(f'{name} is {getattr(self, name)}; use {low} to {high}.')

  def seed_of(self, caption: str, attempt: int) -> int:
    """31 bits of a hash, so that no answer depends on the other captions."""
    digest = hashlib.blake2b(f'{self.seed} {attempt} {caption}'.encode(), digest_size=4).digest()
    return int.from_bytes(digest, 'little') >> 1


def judge(
  caption: str, answer: str, writing: Writing, is_flagged: Moderate | None
) -> tuple[str, tuple[str, str] | None]:
  """(key of REASONS, None) for a refused answer, else ('', (instruction, edited caption))."""
  if not answer:
    return 'empty', None
  if triplets.STOP not in answer:
    return 'unfinished', None
  parts = triplets.parse(answer)
  if parts is None or any('\n' in part or triplets.is_garbled(part) for part in parts):
    return 'parts', None
  parts = tuple(' '.join(part.split()) for part in parts)
  for problem in problems(triplets.Triplet(caption, *parts), writing.max_words):
    return problem.kind, None
  if is_flagged and any(map(is_flagged, parts)):
    return 'flagged', None
  return '', parts
