"""What is wrong with a file of triplets, row by row, and how varied its instructions are."""

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ip2p_jax import triplets
from ip2p_jax.captions import fits, plain
from ip2p_jax.errors import InputError
from ip2p_jax.triplets import Triplet

NEAR = 0.8  # Jaccard index of the words of two captions that are nearly the same
RELATED = 0.2  # least part of the caption's words, or of the edited one's, that the other has too
RECENT = 500  # captions with a word, that another with it is compared with
MOST_WORDS = 25  # of an instruction
SHOWN_VERBS = 12
LENGTHS = (3, 6, 9, 12, 16, 25)  # words: last of each bar of the histogram
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SMALL_WORDS = frozenset(
  'a an and are as at be by for from has have in into is it its of on or that the their this to'
  ' was were with'.split()
)
# What pairs of pictures that share attention cannot show. Words, and what they ask for.
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


def check(
  path: Path, report: Callable[[str], None], progress: Callable[[int, int], None]
) -> tuple[list[Triplet], int]:
  """Reports a line per finding, 'FILE: line 7: what'. Returns (rows that can be read, findings).

  Finds texts that are missing or that the formats cannot hold, the same caption twice or nearly so,
  edits that change nothing or everything, texts that are too long, and edits that the method cannot
  do: of places, of numbers, of the camera. InputError for a file that cannot be opened.
  """
  rows = triplets.Rows(path)
  places, read, findings = [], [], 0
  for i in range(len(rows)):
    try:
      place, triplet = rows.read(i)
    except InputError as error:
      report(str(error))
      findings += 1
    else:
      places.append(place)
      read.append(triplet)
      for problem in problems(triplet):
        report(f'{place}: {problem}')
        findings += 1
    progress(i + 1, len(rows))
  for later, earlier, is_same in repeated([triplet.caption for triplet in read]):
    what = 'the same caption as' if is_same else 'nearly the caption of'
    report(f'{places[later]}: {what} {places[earlier].removeprefix(f"{path}: ")}')
    findings += 1
  return read, findings


def problems(triplet: Triplet) -> Iterator[str]:
  """Of a triplet by itself."""
  if fault := triplets.fault(triplet):
    yield fault
    return
  caption, instruction, edited = triplet
  for name, text in triplets.by_name(triplet).items():
    if not fits(text):
      yield f'the {name} is longer than the 77 tokens that CLIP reads'
    if '\n' in text:
      yield f'the {name} has more than one line'
    if triplets.is_garbled(text):
      yield f'the {name} has control characters, or signs that stand for broken ones'
  if plain(instruction) in (plain(caption), plain(edited)):
    yield 'the instruction is one of the captions'
  if plain(caption) == plain(edited):
    yield 'the edited caption is the caption'
  elif is_unrelated(caption, edited):
    yield f'the edited caption {edited!r} has little to do with the caption {caption!r}'
  if (count := len(instruction.split())) > MOST_WORDS:
    yield f'the instruction has {count} words; use at most {MOST_WORDS}'
  for what, pattern in PATTERNS.items():
    if found := pattern.search(instruction):
      yield f'the instruction asks for a change of {what} ({found[0]!r}), which pairs cannot show'


def is_unrelated(caption: str, edited: str) -> bool:
  """Whether two captions share next to no words that mean something."""
  one, other = words(caption) - SMALL_WORDS, words(edited) - SMALL_WORDS
  if min(len(one), len(other)) < 2:  # one thing may become another; or of other writing systems
    return False
  return len(one & other) < RELATED * min(len(one), len(other))


def words(text: str) -> frozenset[str]:
  return frozenset(word.lower() for word in WORD.findall(text))


def repeated(captions: Sequence[str]) -> Iterator[tuple[int, int, bool]]:
  """(later, earlier, whether they are the same) of every caption that was there before.

  Nearly the same is a Jaccard index of words of NEAR or more. Two such sets share one of the rarest
  few words of either, so that only few are compared (Chaudhuri et al. 2006, prefix filtering); of a
  word that is in very many captions, the last RECENT of them.
  """
  sets = [words(caption) for caption in captions]
  counts = collections.Counter(word for found in sets for word in found)
  same: dict[str, int] = {}
  by_word: Mapping[str, list[int]] = collections.defaultdict(list)
  for i, (caption, own) in enumerate(zip(captions, sets, strict=True)):
    earlier = same.setdefault(plain(caption), i) if caption.strip() else i
    if earlier != i:
      yield i, earlier, True
      continue
    if not own:
      continue
    rarest = sorted(own, key=lambda word: (counts[word], word))
    rarest = rarest[: len(own) - math.ceil(NEAR * len(own) - 1e-9) + 1]
    near = (j for word in rarest for j in by_word[word][-RECENT:])
    found = next((j for j in near if jaccard(own, sets[j]) >= NEAR), None)
    if found is not None:
      yield i, found, False
    for word in rarest:
      by_word[word].append(i)


def jaccard(one: frozenset, other: frozenset) -> float:
  return len(one & other) / max(len(one | other), 1)


def diversity(instructions: Sequence[str]) -> Iterator[str]:
  """Lines for people: different instructions, their first words, their lengths."""
  total = max(len(instructions), 1)
  percent = lambda count: f'{100 * count / total:.0f}%'
  different = len({plain(text) for text in instructions})
  yield f'instructions: {different:,} different of {len(instructions):,}'
  verbs = collections.Counter((text.split() or [''])[0].lower() for text in instructions)
  shown = ', '.join(f'{verb} {percent(n)}' for verb, n in verbs.most_common(SHOWN_VERBS))
  yield f'first words: {len(verbs):,} different; {shown}'
  lengths = [len(text.split()) for text in instructions]
  bars, first = [], 1
  for last in LENGTHS:
    count = sum(first <= length <= last for length in lengths)
    bars.append(f'{first} to {last} {percent(count)}')
    first = last + 1
  yield f'words of an instruction: {", ".join(bars)}'
