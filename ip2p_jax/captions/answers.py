"""What the workers of a folder were answered, a line each, and what it came to."""

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ip2p_jax import storage
from ip2p_jax.captions.judge import REASONS, Writing
from ip2p_jax.captions.read import Caption
from ip2p_jax.errors import InputError

SYNC = 1.0  # seconds of answers that may be lost with the machine
# Why a caption gets no (other) answer.
FLAGGED_CAPTION, UNWELCOME_CAPTION = 'flagged caption', 'unwelcome caption'
HOPELESS = {
  FLAGGED_CAPTION: 'flagged by moderation',
  UNWELCOME_CAPTION: 'that the model would not take',
}

Task = tuple[Caption, int]  # a caption, and which attempt at it is next


def answers_file(folder: Path, shard: tuple[int, int]) -> Path:
  return folder / f'answers-{shard[0]:05d}-of-{shard[1]:05d}.jsonl'


def read_answers(file: Path) -> Iterator[dict[str, Any]]:
  """Lines of a file of answers, but for a last one that was cut short; none if there is no file."""
  if not file.exists():
    return
  with file.open('rb') as opened:
    for number, line in enumerate(opened, 1):
      if not line.endswith(b'\n'):
        return
      try:
        found = json.loads(line)
        is_sound = type(found['row']) is int and type(found['attempt']) is int
        texts = ('refused',) if 'refused' in found else ('edit', 'output')
        is_sound = is_sound and all(isinstance(found[name], str) for name in texts)
      except (ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
      if not is_sound:
        raise InputError(
          f'{file}: line {number} is damaged; delete it, and that answer is asked for again.'
        ) from None
      yield found


@contextlib.contextmanager
def journal(file: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
  """A function that adds a line to the file at once; no other process can at the same time."""
  with storage.one_writer(file, 'give it another --shard'), file.open('a+b') as opened:
    opened.seek(0)
    whole = 0
    for line in opened:
      whole += len(line) if line.endswith(b'\n') else 0
    opened.truncate(whole)
    synced = time.monotonic()

    def record(line):
      nonlocal synced
      opened.write(json.dumps(line).encode() + b'\n')
      opened.flush()  # from here on it outlives the process
      if time.monotonic() > synced + SYNC:
        os.fsync(opened.fileno())
        synced = time.monotonic()

    yield record
    os.fsync(opened.fileno())


def remaining(
  folder: str | Path, captions: Sequence[Caption], writing: Writing, shard: tuple[int, int]
) -> list[Task]:
  """What is still to be asked for: a caption without a kept answer, and its next attempt."""
  made, done = collections.Counter(), set()
  for line in read_answers(answers_file(Path(folder), shard)):
    made[line['row']] = max(made[line['row']], line['attempt'] + 1)
    if line.get('refused') is None or line['refused'] in HOPELESS:
      done.add(line['row'])
  mine = captions[shard[0] :: shard[1]]
  return [
    (caption, made[caption.row])
    for caption in mine
    if caption.row not in done and made[caption.row] < writing.attempts
  ]


class Yield(NamedTuple):
  """What the workers of a folder were answered so far."""

  captions: int  # asked for, or flagged
  answers: int
  refused: dict[str, int]  # answers, by reason
  hopeless: dict[str, int]  # captions that got no answer, by reason
  instructions: list[str]  # that were kept


def read_yield(folder: str | Path) -> Yield:
  rows, refused, instructions = set(), collections.Counter(), []
  for file in sorted(Path(folder).glob('answers-*.jsonl')):
    for line in read_answers(file):
      rows.add(line['row'])
      if 'refused' in line:
        refused[line['refused']] += 1
      else:
        instructions.append(line['edit'])
  hopeless = {reason: refused.pop(reason) for reason in HOPELESS if reason in refused}
  answers = len(instructions) + sum(refused.values())
  return Yield(len(rows), answers, dict(refused), hopeless, instructions)


def describe(found: Yield) -> Iterator[str]:
  """Lines for people."""
  part = lambda count, whole: f'{count:,} of {whole:,} ({100 * count / max(whole, 1):.1f}%)'
  kept = len(found.instructions)
  yield f'captions with an edit: {part(kept, found.captions)}'
  yield f'answers kept: {part(kept, found.answers)}'
  for reason, count in sorted(found.refused.items(), key=lambda item: -item[1]):
    yield f'answers refused, {REASONS.get(reason, reason)}: {part(count, found.answers)}'
  for reason, count in found.hopeless.items():
    yield f'captions {HOPELESS[reason]}: {part(count, found.captions)}'
