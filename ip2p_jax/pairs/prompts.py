"""Reads pairs of captions to draw images of, from a file of JSON lines.

  {"caption": "a cat", "edit": "make it a lion", "output": "a lion"}

'input' may replace 'caption'. More keys are kept. Prompt-to-prompt reads these:

  "weights": {"lion": 2.0}           of words of the edited caption
  "cross_steps": {"lion": 0.4}       the controlled share of the steps, or [0.1, 0.4]
  "blend": [["cat"], ["lion"]]       words of either caption, for a local blend
  "image": "cat.jpg"                 the first image of the pair, beside this file
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ip2p_jax.errors import InputError
from ip2p_jax.pairs.alignment import Span, step_window

NOTHING = MappingProxyType({})
DRAWN_FROM = ('output', 'weights', 'cross_steps', 'blend', 'image')  # and the caption
# Names of the instruction in other data sets.
INSTRUCTIONS = ('instruction', 'edit_prompt', 'edit_instruction', 'instructions', 'prompt')
SHOWN = 5  # faults named in one message


class Prompt(NamedTuple):
  """A line of the file. `index` counts lines from 0, and `line` is the unchanged text."""

  index: int
  line: str
  caption: str
  edited_caption: str
  weights: Mapping[str, float] = NOTHING
  spans: Mapping[str, Span] = NOTHING
  blend: tuple[list[str], list[str]] | None = None
  image: Path | None = None


def read_prompts(
  path: Path, faults_of: Callable[[Prompt], Iterable[str]] = lambda prompt: ()
) -> list[Prompt]:
  """Reads every line. Raises InputError with all wrong lines, and why.

  `faults_of` finds more faults of a prompt. It also gets lines with faults, without their
  unreadable keys, so that one message has all faults.
  """
  try:
    lines = path.read_bytes().decode('utf-8-sig').split('\n')  # only this ends a line
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'is not UTF-8'
    raise InputError(f'{path}: cannot be read ({reason}).') from None
  prompts, faults = [], []
  for index, line in enumerate(lines):
    if not line.strip():
      continue
    value, problems = _value(line.strip(), path.parent)
    unread = {key for key, _ in problems}
    line_faults = [fault for _, fault in problems]
    if not unread & {'caption', 'output'}:
      readable = {key: part for key, part in value.items() if key not in unread}
      prompts.append(_prompt(index, line.removesuffix('\r'), readable, path.parent))
      line_faults += [f': {fault}' for fault in faults_of(prompts[-1])]
    faults += [f'line {index + 1}{fault}' for fault in line_faults]
  if len({prompt.image is None for prompt in prompts}) > 1 and not faults:
    faults = ['some lines have an image and some have none; use a file for each']
  if faults:
    raise InputError(f'{path}: {listed(faults)}; mend this first.')
  if not prompts:
    raise InputError(f'{path}: has no prompt; write a JSON object per line.')
  return prompts


def listed(faults: Sequence[str]) -> str:
  """The first faults in one sentence, and the number of the others."""
  more = len(faults) - SHOWN
  return '; '.join(faults[:SHOWN]) + (f'; and {more} more' if more > 0 else '')


def drawn_from(line: str) -> list[Any]:
  """The values of a line that its images depend on. The others may change after drawing."""
  value = json.loads(line)
  return [_caption(value), *(value.get(key) or None for key in DRAWN_FROM)]


def instruction_fault(value: Mapping[str, Any]) -> str | None:
  """The fault of a prompt's instruction, as the text after its place; None if it has none."""
  text = value.get('edit')
  if isinstance(text, str) and text.strip():
    return None
  alias = next((name for name in INSTRUCTIONS if value.get(name)), None)
  if 'edit' not in value and alias:
    return f"has no text 'edit', the instruction; rename {alias!r} to 'edit'"
  return "has no text 'edit', the instruction"


def _caption(value):
  return value.get('caption', value.get('input'))


def _value(line, folder) -> tuple[dict[str, Any], list[tuple[str, str]]]:
  """The JSON of a line, and its faults: (unreadable key, fault).

  A fault is the text after 'line 7'.
  """
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    return {}, [('caption', ' is not JSON')]
  if not isinstance(value, dict):
    return {}, [('caption', ' is not a JSON object')]
  return value, list(_faults(value, folder))


def _faults(value, folder) -> Iterator[tuple[str, str]]:
  for key, text in (('caption', _caption(value)), ('output', value.get('output'))):
    if not isinstance(text, str) or not text.strip():
      yield key, f' has no text {key!r}'
  if 'caption' in value and value.get('input', value['caption']) != value['caption']:
    yield 'caption', " has a 'caption' and an 'input', which differ"
  if fault := instruction_fault(value):
    yield 'edit', f' {fault}'
  try:
    ''.join(map(str, (_caption(value), value.get('edit'), value.get('output')))).encode()
  except UnicodeEncodeError as error:
    yield 'caption', f' has text that is not Unicode ({error.reason})'
  for key in ('weights', 'cross_steps'):
    if not _are_words(value, key):
      yield key, f': {key} is not an object of words and numbers'
  spans = value.get('cross_steps')
  for span in spans.values() if spans and _are_words(value, 'cross_steps') else ():
    try:
      step_window(tuple(span) if isinstance(span, list) else span, 1)
    except InputError as error:
      yield '', f': cross_steps: {str(error).rstrip(".")}'
  blend = value.get('blend')
  if blend is not None and not _is_blend(blend):
    yield 'blend', ': blend is not two lists of words, such as [["cat"], ["dog"]]'
  image = value.get('image')
  if image is not None and not (folder / str(image)).is_file():
    yield '', f': there is no image {folder / str(image)}'


def _are_words(value, key) -> bool:
  """Whether the value is numbers by word. Steps may also be pairs of numbers."""
  words = value.get(key) or {}
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
  is_pair = lambda x: (
    key == 'cross_steps' and isinstance(x, list) and len(x) == 2 and all(map(is_number, x))
  )
  return isinstance(words, dict) and all(is_number(x) or is_pair(x) for x in words.values())


def _is_blend(blend) -> bool:
  is_words = lambda side: isinstance(side, list) and all(isinstance(word, str) for word in side)
  return isinstance(blend, list) and len(blend) == 2 and all(map(is_words, blend)) and any(blend)


def _prompt(index, line, value, folder) -> Prompt:
  spans = value.get('cross_steps') or {}
  blend, image = value.get('blend'), value.get('image')
  return Prompt(
    index,
    line,
    _caption(value),
    value['output'],
    weights=value.get('weights') or {},
    spans={word: tuple(x) if isinstance(x, list) else x for word, x in spans.items()},
    blend=None if blend is None else tuple(blend),
    image=None if image is None else folder / str(image),
  )
