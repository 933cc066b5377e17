"""The answers that the workers of a folder got, one per line, and their counts."""

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

SYNC = 1.0  # seconds between writes to disk: answers since the last may be lost with the machine
# Why a caption gets no answer, or no other answer.
FLAGGED_CAPTION, UNWELCOME_CAPTION = 'flagged caption', 'unwelcome caption'
HOPELESS = {
  FLAGGED_CAPTION: 'flagged by moderation',
  UNWELCOME_CAPTION: 'refused by the model',
}

Task = tuple[Caption, int]  # a caption, and the number of its next attempt


def answers_file(folder: Path, shard: tuple[int, int]) -> Path:
  return folder / f'answers-{shard[0]:05d}-of-{shard[1]:05d}.jsonl'


def read_answers(file: Path) -> Iterator[dict[str, Any]]:
  """Yields the lines of a file of answers without an incomplete last one; none without a file."""
  if not file.exists():
    return
  with file.open('rb') as opened:
    for number, line in enumerate(opened, 1):
      if not line.endswith(b'\n'):
        return
      try:
        answer = json.loads(line)
        is_valid = type(answer['row']) is int and type(answer['attempt']) is int
        texts = ('refused',) if 'refused' in answer else ('edit', 'output')
        is_valid = is_valid and all(isinstance(answer[name], str) for name in texts)
      except (ValueError, KeyError, TypeError, RecursionError):
        is_valid = False
      if not is_valid:
        raise InputError(
          f'{file}: line {number} is damaged; delete it, and the next run asks for it again.'
        ) from None
      yield answer


@contextlib.contextmanager
def journal(file: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
  """Gives a function that adds a line to the file at once; locks the file for other processes."""
  with storage.one_writer(file, 'give it another --shard'), file.open('a+b') as opened:
    opened.seek(0)
    size = 0  # bytes of complete lines
    for line in opened:
      size += len(line) if line.endswith(b'\n') else 0
    opened.truncate(size)
    synced = time.monotonic()

    def record(line):
      nonlocal synced
      opened.write(json.dumps(line).encode() + b'\n')
      opened.flush()  # now the line stays even if the process dies
      if time.monotonic() > synced + SYNC:
        os.fsync(opened.fileno())
        synced = time.monotonic()

    yield record
    os.fsync(opened.fileno())


def remaining(
  folder: str | Path, captions: Sequence[Caption], writing: Writing, shard: tuple[int, int]
) -> list[Task]:
  """The tasks left: captions without a kept answer, and the number of their next attempt."""
  attempts, done = collections.Counter(), set()
  for line in read_answers(answers_file(Path(folder), shard)):
    attempts[line['row']] = max(attempts[line['row']], line['attempt'] + 1)
    if line.get('refused') is None or line['refused'] in HOPELESS:
      done.add(line['row'])
  mine = captions[shard[0] :: shard[1]]
  return [
    (caption, attempts[caption.row])
    for caption in mine
    if caption.row not in done and attempts[caption.row] < writing.attempts
  ]


class Yield(NamedTuple):
  """Counts of the answers that the workers of a folder got so far."""

  captions: int  # that have an answer or were flagged
  answers: int
  refused: dict[str, int]  # answers, by reason
  hopeless: dict[str, int]  # captions that got no answer, by reason
  instructions: list[str]  # of the answers that were kept


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


def describe(result: Yield) -> Iterator[str]:
  """Yields the counts as lines of text."""
  part = lambda count, total: f'{count:,} of {total:,} ({100 * count / max(total, 1):.1f}%)'
  kept = len(result.instructions)
  yield f'captions with an edit: {part(kept, result.captions)}'
  yield f'answers kept: {part(kept, result.answers)}'
  for reason, count in sorted(result.refused.items(), key=lambda item: -item[1]):
    yield f'answers refused, {REASONS.get(reason, reason)}: {part(count, result.answers)}'
  for reason, count in result.hopeless.items():
    yield f'captions {HOPELESS[reason]}: {part(count, result.captions)}'
