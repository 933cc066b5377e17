"""What is wrong with one triplet. The same rules hold for texts of people and of models."""

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

from ip2p_jax.captions import triplets
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.weights import clip_tokenizer

RELATED = 0.2  # least share of the words of the shorter caption that the longer one has, too
MOST_WORDS = 25  # of an instruction
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SMALL_WORDS = frozenset(
  'a an and are as at be by for from has have in into is it its of on or that the their this to'
  ' was were with'.split()
)
# Changes that pairs of images with shared attention cannot show, and the words that ask for them.
SPATIAL = {
  'the camera': r"""(?:move|turn|tilt|lower|raise|change)\ the\ camera|zoom(?:s|ed|ing)?\b
    |close-?\s?up|wide[- ](?:angle|shot)|(?:low|high|bird['’]?s)[- ](?:angle|eye)|bird['’]s[- ]eye
    |(?:aerial|top-down|drone|overhead)\ (?:view|shot)|macro\ shot|fish-?\s?eye|viewpoint
    |point\ of\ view|perspective|camera\ angle|crop(?:ped)?\ (?:it|the\ (?:picture|image|photo))
    |crop\ (?:out|to)|closer|further\ away|farther|from\ a\ distance
    |from\ (?:above|below|behind|the\ (?:side|back|front))|pan\ (?:to|left|right|up|down)""",
  'places': r"""moves?|moved|relocat\w*|slide\ (?:it|the)|shift(?:s|ed)?(?!.*colou?rs?)
    |swap\w*(?!.*\ (?:for|with)\ )|switch\ (?:places|positions|sides)|rearrange\w*|rotat\w*
    |flip(?:s|ped)?(?![-\w]|\ (?:phone|chart))|mirror\ (?:it|the|image)|reflect\ (?:it|the\ image)
    |upside[- ]down|turn(?:ed)?\ around|(?:other|opposite)\ (?:way|side)
    |(?:to|on)\ the\ right|left(?![-\w])|right[- ](?:side|hand)|to\ the\ foreground
    |(?:at|in)\ the\ (?:bottom|top|cent(?:er|re)|middle|corners?)(?!\ (?:of|ages|east|class))
    |(?:put|place|bring|stand|set)\ (?:it|him|her|them|the\ \w+)
     \ (?:behind|in\ front|next\ to|beside)
    |cent(?:er|re)\ (?:it|the)|enlarge\w*|shrink\w*|resize\w*|bigger|smaller|scale\ (?:it|the)""",
  'numbers': r"""(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)(?![- ]?piece|-)
    |(?:a\ )?hundreds?|several|dozens?|twice|triple\ the|double\ the|a\ couple\ of|one\ more
    |a\ (?:second|third)|(?<!formula\ )(?<!windows\ )
     \d{1,3}(?!\ ?(?:mm|th|st|nd|rd|°|%|am|pm|years?|o'clock)|[-:.,]?\d)""",
}
PATTERNS = {
  what: re.compile(rf'\b(?:{words})\b', re.IGNORECASE | re.VERBOSE)
  for what, words in SPATIAL.items()
}


class Problem(NamedTuple):
  kind: str  # 'parts', 'unchanged', 'long', 'unrelated' or 'undrawable'
  text: str  # the end of a sentence that begins with the triplet's place


def problems(triplet: Triplet, most_words: int = MOST_WORDS) -> Iterator[Problem]:
  """What the formats, CLIP, or pairs of images cannot hold; nothing for a good triplet.

  `most_words` is the limit for the instruction.
  """
  if fault := triplets.fault(triplet):
    yield Problem('parts', fault)
    return
  caption, instruction, edited = triplet
  texts = triplets.by_name(triplet)
  for name, text in texts.items():
    if '\n' in text:
      yield Problem('parts', f'the {name} has more than one line')
    if triplets.is_garbled(text):
      what = 'control characters, or characters that stand for broken bytes'
      yield Problem('parts', f'the {name} has {what}')
  if plain(instruction) in (plain(caption), plain(edited)):
    yield Problem('parts', 'the instruction is one of the captions')
  if plain(caption) == plain(edited):
    yield Problem('unchanged', 'the edited caption is the caption')
  for name, text in texts.items():
    if not fits(text):
      yield Problem('long', f'the {name} is longer than the 77 tokens that CLIP reads')
  if (count := len(instruction.split())) > most_words:
    yield Problem('long', f'the instruction has {count} words; use at most {most_words}')
  if plain(caption) != plain(edited) and is_unrelated(caption, edited):
    what = f'the edited caption {edited!r} has little to do with the caption {caption!r}'
    yield Problem('unrelated', what)
  for what, pattern in PATTERNS.items():
    if match := pattern.search(instruction):
      change = f'the instruction asks for a change of {what} ({match[0]!r})'
      yield Problem('undrawable', f'{change}, which pairs cannot show')


def fits(text: str) -> bool:
  """Whether the whole text fits into the 77 tokens that CLIP reads."""
  return not _clip_tokenizer().cut_off(text)


@functools.cache
def _clip_tokenizer() -> ClipTokenizer:
  return ClipTokenizer(clip_tokenizer())


def plain(text: str) -> str:
  """A caption without what makes no difference: case, white space, punctuation at the end."""
  text = ' '.join(text.split()).lower()
  return text.rstrip(' .!?') or text


def is_unrelated(caption: str, edited: str) -> bool:
  """Whether two captions share almost no words, small words aside."""
  before, after = words(caption) - SMALL_WORDS, words(edited) - SMALL_WORDS
  # One thing may become another. Some writing systems have no spaces between words.
  if min(len(before), len(after)) < 2:
    return False
  return len(before & after) < RELATED * min(len(before), len(after))


def words(text: str) -> frozenset[str]:
  return frozenset(word.lower() for word in WORD.findall(text))
