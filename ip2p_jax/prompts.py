"""Pairs of captions to draw pictures of: a file of JSON lines.

  {"caption": "a cat", "edit": "make it a lion", "output": "a lion"}

'input' is as good as 'caption'. More keys are kept, and some are read by prompt-to-prompt:

  "weights": {"lion": 2.0}           of words of the edited caption
  "cross_steps": {"lion": 0.4}       the part of the steps that is controlled, or [0.1, 0.4]
  "blend": [["cat"], ["lion"]]       words of either caption, for a local blend
  "image": "cat.jpg"                 a picture, beside the file, that the first of the pair shall be
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ip2p_jax.alignment import Span
from ip2p_jax.errors import InputError

NOTHING = MappingProxyType({})


class Prompt(NamedTuple):
  """A line of the file; `index` counts lines from 0, and `line` is as it came."""

  index: int
  line: str
  caption: str
  edited_caption: str
  weights: Mapping[str, float] = NOTHING
  spans: Mapping[str, Span] = NOTHING
  blend: tuple[list[str], list[str]] | None = None
  image: Path | None = None


def read_prompts(path: Path) -> list[Prompt]:
  """Every line; InputError that names the first that is wrong."""
  try:
    lines = path.read_text().splitlines()
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror or error}).') from None
  prompts = [
    _parsed(f'{path}: line {index + 1}', index, line, path.parent)
    for index, line in enumerate(lines)
    if line.strip()
  ]
  if not prompts:
    raise InputError(f'{path}: has no prompt; write a JSON object per line.')
  if len({prompt.image is None for prompt in prompts}) > 1:
    raise InputError(f'{path}: some lines have an image and some have none; use a file for each.')
  return prompts


def _parsed(where, index, line, folder) -> Prompt:
  try:
    value = json.loads(line)
  except ValueError:
    raise InputError(f'{where} is not JSON.') from None
  if not isinstance(value, dict):
    raise InputError(f'{where} is no JSON object.')
  texts = [value.get('caption', value.get('input')), value.get('output')]
  for key, text in zip(('caption', 'output'), texts, strict=True):
    if not isinstance(text, str) or not text.strip():
      raise InputError(f'{where} has no text {key!r}.')
  image = value.get('image')
  if image is not None and not (folder / str(image)).is_file():
    raise InputError(f'{where}: there is no picture {folder / str(image)}.')
  return Prompt(
    index,
    line,
    *texts,
    weights=_words(where, value, 'weights'),
    spans=_words(where, value, 'cross_steps'),
    blend=_blend(where, value.get('blend')),
    image=None if image is None else folder / str(image),
  )


def _words(where, value, key):
  """Numbers by word; for steps, also pairs of numbers."""
  words = value.get(key) or {}
  is_number = lambda x: isinstance(x, int | float)
  is_pair = lambda x: (
    key == 'cross_steps' and isinstance(x, list) and len(x) == 2 and all(map(is_number, x))
  )
  if not isinstance(words, dict) or not all(is_number(x) or is_pair(x) for x in words.values()):
    raise InputError(f'{where}: {key} is no object of words and numbers.')
  return {word: tuple(x) if isinstance(x, list) else x for word, x in words.items()}


def _blend(where, blend):
  if blend is None:
    return None
  is_words = lambda side: isinstance(side, list) and all(isinstance(word, str) for word in side)
  if not isinstance(blend, list) or len(blend) != 2 or not all(map(is_words, blend)):
    raise InputError(f'{where}: blend is not two lists of words, as in [["cat"], ["dog"]].')
  return tuple(blend)
