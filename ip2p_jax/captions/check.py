"""What is wrong with a file of triplets, row by row, and how varied its instructions are."""

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import plain, problems, words
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress

NEAR = 0.8  # Jaccard index of the words of two captions that are nearly the same
RECENT = 500  # captions with a word, that another with it is compared with
SHOWN_VERBS = 12
LENGTHS = (3, 6, 9, 12, 16, 25)  # words: last of each bar of the histogram


def check_triplets(
  path: Path, report: Callable[[str], None], progress: Progress
) -> tuple[list[Triplet], int]:
  """Reports a line per finding, 'FILE: line 7: what'. Returns (rows that can be read, findings).

  Finds texts that are missing or that the formats cannot hold, the same caption twice or nearly so,
  edits that change nothing or everything, texts that are too long, and edits that the method cannot
  do: of places, of numbers, of the camera. InputError for a file that cannot be opened.
  """
  rows = triplets.TripletRows(path)
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
        report(f'{place}: {problem.text}')
        findings += 1
    progress(i + 1, len(rows))
  for later, earlier, is_same in repeated([triplet.caption for triplet in read]):
    what = 'the same caption as' if is_same else 'nearly the caption of'
    report(f'{places[later]}: {what} {places[earlier].removeprefix(f"{path}: ")}')
    findings += 1
  return read, findings


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
