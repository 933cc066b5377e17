"""Reads the drawn world's sentences back, to tell whether three of them belong together.

  python examples/miniature/grammar.py out/captions/prompts.jsonl

Prints how many triplets of a file are sentences of the world, and how many of the edited captions
say what the instruction makes of the caption.
"""

import argparse
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import world
from phrases import BACKDROPS, JOINTS, NEW, STYLED, TRAINED

PICTURE_OF = 'a picture of '
NIGHT, DAY = (' at night', ' by night', ', it is night'), (' by day', ' in daylight')


class Thing(NamedTuple):
  """What is said of an object; '' is what is not said."""

  size: str
  colour: str
  shape: str
  place: str = ''


class Said(NamedTuple):
  """What a caption says. An outline drawing has no background and no time of day."""

  style: str
  is_night: bool
  background: str
  pattern: str
  things: tuple[Thing, ...]


class Asked(NamedTuple):
  """One edit of an instruction: `it` is what it is about, `new` what is added."""

  kind: str
  word: str = ''
  it: Thing | None = None
  new: Thing | None = None


def read_caption(text: str) -> Said | None:
  """What a caption says; None if it is no sentence of the world."""
  rest = text.removeprefix(PICTURE_OF)
  style = ''
  for name, phrasings in STYLED.items():
    for phrasing in phrasings:
      if rest.startswith(start := phrasing.replace('{}', '')):
        style, rest = name, rest.removeprefix(start)
  is_night = rest.endswith(NIGHT)
  for end in (*NIGHT, *DAY):
    rest = rest.removesuffix(end)
  background = pattern = ''
  for name, regex in _BACKDROPS:
    if found := regex.search(rest):
      background, pattern, rest = found['colour'], name, rest[: found.start()]
      break
  if (style == 'outline') != (not background) or (style == 'outline' and is_night):
    return None
  parts = re.split(', | and ', rest)
  found = [_THING.fullmatch(part) for part in parts]
  if not all(found):
    return None
  return Said(style, is_night, background, pattern, tuple(map(_thing, found)))


def read_instruction(text: str) -> tuple[Asked, ...] | None:
  """One edit or two; None if it is no sentence of the world."""
  one = _read_edit(text)
  if one:
    return (one,)
  for regex in _JOINTS:
    for first, second in _splits(regex, text):
      both = _read_edit(first), _read_edit(second)
      if all(both):
        return both
  return None


def applied(said: Said, asked: Asked) -> Said | None:
  """What a caption of the edited picture says if it leaves nothing out; None if it cannot be."""
  if asked.kind in ('night', 'day'):
    is_night = asked.kind == 'night'
    return (
      None if is_night == said.is_night or not said.background else said._replace(is_night=is_night)
    )
  if asked.kind == 'background':
    if asked.word == said.background or not said.background:
      return None
    return said._replace(background=asked.word)
  if asked.kind == 'outline':
    return None if said.style else Said('outline', False, '', '', said.things)
  if asked.kind in ('greyscale', 'negative'):
    return None if said.style else said._replace(style=asked.kind)
  if asked.kind == 'add':
    taken = {thing.shape for thing in said.things} | {thing.place for thing in said.things}
    if asked.new.shape in taken or asked.new.place in taken:
      return None
    return said._replace(things=(*said.things, asked.new))
  meant = [thing for thing in said.things if _agree(asked.it._replace(place=''), thing)]
  if len(meant) != 1:
    return None
  others = tuple(thing for thing in said.things if thing != meant[0])
  if asked.kind == 'remove':
    return said._replace(things=others) if others else None
  field, word = {
    'recolour': ('colour', asked.word), 'reshape': ('shape', asked.word),
    'grow': ('size', 'large'), 'shrink': ('size', 'small'),
  }[asked.kind]  # fmt: skip
  if getattr(meant[0], field) == word:
    return None
  return said._replace(things=(*others, meant[0]._replace(**{field: word})))


def belongs(caption: str, instruction: str, edited: str) -> bool:
  """Whether `edited` says of the picture what the instruction makes of it."""
  said, asked, result = read_caption(caption), read_instruction(instruction), read_caption(edited)
  if said is None or asked is None or result is None:
    return False
  for one in asked:
    said = applied(said, one) if said else None
  if said is None or said._replace(things=()) != result._replace(things=()):
    return False
  return len(said.things) == len(result.things) and any(
    all(map(_agree, said.things, order)) for order in itertools.permutations(result.things)
  )


def _agree(one: Thing, other: Thing) -> bool:
  return all(a == b or not a or not b for a, b in zip(one, other, strict=True))


def _thing(found) -> Thing | None:
  if not found:
    return None
  words = {name: word or '' for name, word in found.groupdict().items()}
  return Thing(**words)._replace(place=words.get('place', '').replace('centre', 'middle'))


def _read_edit(text):
  for kind, regex in _EDITS:
    if found := regex.fullmatch(text):
      words = found.groupdict()
      it = _thing(_THE.fullmatch(words['it'])) if 'it' in words else None
      new = _thing(_THING.fullmatch(f'{words["new"]} {words["at"]}')) if 'new' in words else None
      if ('it' in words) == bool(it) and ('new' in words) == bool(new):
        return Asked(kind, words.get('word', ''), it, new)
  return None


def _splits(regex, text):
  """All ways to cut at a joint: its words may be within a phrasing, too."""
  start, middle, _ = regex
  if text.startswith(start):
    text = text.removeprefix(start)
    for found in re.finditer(re.escape(middle), text):
      yield text[: found.start()], text[found.end() :]


def _any(words):
  return '|'.join(sorted(map(re.escape, words), key=len, reverse=True))


_CORNERS = [place for place in world.PLACES if ' ' in place]
_AT = (
  rf'(?:in the (?:middle|centre)|at the (?:{_any(_CORNERS)})|in the (?:{_any(_CORNERS)}) corner)'
)
_SIZE, _COLOUR = rf'(?P<size>{_any(world.SIZES)})', rf'(?P<colour>{_any(world.COLOURS)})'
_SHAPE = rf'(?P<shape>{_any(world.SHAPES)})'
_PLACE = rf'(?:(?:at|in) the (?P<place>middle|centre|{_any(_CORNERS)})(?: corner)?)'
_THING = re.compile(rf'an? (?:{_SIZE} )?{_COLOUR} {_SHAPE}(?: {_PLACE})?')
_THE = re.compile(rf'the (?:{_SIZE} )?(?:{_COLOUR} )?{_SHAPE}')
_GROUND = f'(?P<colour>{_any(world.BACKGROUNDS)})'
_BACKDROPS = [
  (name, re.compile(f' {phrasing.format(a="an?", colour=_GROUND)}$'))
  for name in ('striped', 'gradient', 'plain')
  for phrasing in BACKDROPS[name]
]  # fmt: skip
_WORDS = {
  'recolour': _any(world.COLOURS), 'reshape': _any(world.SHAPES),
  'background': _any(world.BACKGROUNDS),
}  # fmt: skip
_JOINTS = [joint.split('{}') for joint in sorted(JOINTS, key=len, reverse=True)]


def _phrasing(kind, phrasing):
  word = f'(?P<word>{_WORDS.get(kind, "")})'
  return re.compile(
    re.escape(phrasing).replace(r'\{', '{').replace(r'\}', '}').format(
      it=r'(?P<it>the [a-z ]+?)', word=word, a_word=f'an? {word}',
      new=r'(?P<new>an? [a-z]+ [a-z]+ [a-z]+)', at=f'(?P<at>{_AT})',
    )
  )  # fmt: skip


_EDITS = [
  (kind, _phrasing(kind, phrasing))
  for phrasings in (TRAINED, NEW)
  for kind, all_of_kind in phrasings.items()
  for phrasing in all_of_kind
]


def main(file: Path) -> None:
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  triplets = [(row.get('caption', row.get('input')), row['edit'], row['output']) for row in rows]
  found = Counter()
  for caption, instruction, edited in triplets:
    found['sentences'] += bool(read_instruction(instruction) and read_caption(edited))
    found['belong'] += belongs(caption, instruction, edited)
  share = lambda name: (
    f'{found[name]} of {len(rows)} ({100 * found[name] / max(len(rows), 1):.1f}%)'
  )
  print(f'{file}: instruction and edited caption are sentences of the world: {share("sentences")}')
  print(f'{file}: the edited caption is what the instruction makes of it: {share("belong")}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('file', type=Path, help='JSON lines with caption (or input), edit and output')
  main(parser.parse_args().file)
