"""Checks a file of triplets row by row, and measures how varied its instructions are."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import plain, problems, words
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress

NEAR = 0.8  # two captions with this Jaccard index of their words, or more, are nearly the same
RECENT = 500  # for each rare word, a caption is compared with at most so many others
SHOWN_VERBS = 12
LENGTHS = (3, 6, 9, 12, 16, 25)  # words: the upper ends of the bars of the histogram


def check_triplets(
  path: Path, report: Callable[[str], None], progress: Progress
) -> tuple[list[Triplet], int]:
  """Reports a line per finding, 'FILE: line 7: what'. Returns (readable rows, number of findings).

  It finds texts that are missing or that the formats cannot hold, captions that are the same or
  nearly so, edits that change nothing or everything, texts that are too long, and edits that the
  method cannot do: of places, of numbers, of the camera. InputError if the file cannot be opened.
  """
  rows = triplets.TripletRows(path)
  places, readable, findings = [], [], 0
  for i in range(len(rows)):
    try:
      place, triplet = rows.read(i)
    except InputError as error:
      report(str(error))
      findings += 1
    else:
      places.append(place)
      readable.append(triplet)
      for problem in problems(triplet):
        report(f'{place}: {problem.text}')
        findings += 1
    progress(i + 1, len(rows))
  for later, earlier, is_same in repeated([triplet.caption for triplet in readable]):
    what = 'the same caption as' if is_same else 'nearly the same caption as'
    report(f'{places[later]}: {what} {places[earlier].removeprefix(f"{path}: ")}')
    findings += 1
  return readable, findings


def repeated(captions: Sequence[str]) -> Iterator[tuple[int, int, bool]]:
  """Yields (index, earlier index, whether they are the same) of captions that repeat earlier ones.

  Two captions are nearly the same if the Jaccard index of their words is NEAR or more. They then
  share one of the few rarest words of each, so only captions that share one are compared (prefix
  filtering, Chaudhuri et al. 2006). If very many captions have a word, the last RECENT of them are.
  """
  sets = [words(caption) for caption in captions]
  counts = collections.Counter(word for word_set in sets for word in word_set)
  same: dict[str, int] = {}
  by_word: Mapping[str, list[int]] = collections.defaultdict(list)
  for i, (caption, word_set) in enumerate(zip(captions, sets, strict=True)):
    earlier = same.setdefault(plain(caption), i) if caption.strip() else i
    if earlier != i:
      yield i, earlier, True
      continue
    if not word_set:
      continue
    rarest = sorted(word_set, key=lambda word: (counts[word], word))
    rarest = rarest[: len(word_set) - math.ceil(NEAR * len(word_set) - 1e-9) + 1]
    candidates = (j for word in rarest for j in by_word[word][-RECENT:])
    match = next((j for j in candidates if jaccard(word_set, sets[j]) >= NEAR), None)
    if match is not None:
      yield i, match, False
    for word in rarest:
      by_word[word].append(i)


def jaccard(a: frozenset, b: frozenset) -> float:
  return len(a & b) / max(len(a | b), 1)


def diversity(instructions: Sequence[str]) -> Iterator[str]:
  """Yields lines of text: how many instructions differ, their first words, their lengths."""
  total = max(len(instructions), 1)
  percent = lambda count: f'{100 * count / total:.0f}%'
  different = len({plain(text) for text in instructions})
  yield f'instructions: {different:,} different of {len(instructions):,}'
  verbs = collections.Counter((text.split() or [''])[0].lower() for text in instructions)
  most = sorted(verbs.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_VERBS]
  shown = ', '.join(f'{verb} {percent(n)}' for verb, n in most)
  yield f'first words: {len(verbs):,} different; {shown}'
  lengths = [len(text.split()) for text in instructions]
  bars, first = [], 1
  for last in LENGTHS:
    count = sum(first <= length <= last for length in lengths)
    bars.append(f'{first} to {last} {percent(count)}')
    first = last + 1
  yield f'words of an instruction: {", ".join(bars)}'
