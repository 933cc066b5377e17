"""Writes an instruction and an edited caption for each of many captions, by a language model.

  OUT/captions.json                  the settings; another run with others is refused
  OUT/answers-00000-of-00001.jsonl   all that this worker was answered, in the order it came
  OUT/prompts.jsonl                  what was kept, in the order of the captions, once all workers
                                     are done: `ip2p pairs` reads it

Answers are on disk as they come. Killed at any time and started again, a run
asks only for what is missing, and ends with the very same prompts.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ip2p_jax import storage
from ip2p_jax.captions import triplets
from ip2p_jax.captions.rules import fits, plain, problems
from ip2p_jax.data.columns import ALIASES
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress, unwatched

SETTINGS, PROMPTS = 'captions.json', 'prompts.jsonl'
COLUMNS = (*ALIASES['caption'], *ALIASES['text'])  # groups; LAION's 'TEXT' is among them
LINES = ('', '.txt')  # suffixes of files with a caption per line
CHUNK = 4096  # captions per call of a backend, which runs half empty at the end of each
SYNC = 1.0  # seconds of answers that may be lost with the machine
MOST_TOKENS = 2**15 - 1
SAMPLING = ('temperature', 'top_p', 'frequency_penalty', 'max_tokens')  # in every line of prompts
# Why an answer is refused.
REASONS = {
  'empty': 'no answer',
  'unfinished': 'not written to the end',
  'parts': 'not an instruction and a caption',
  'unchanged': 'the caption unchanged',
  'long': 'too long',
  'unrelated': 'the caption of something else',
  'undrawable': 'of places, numbers or the camera',
  'flagged': 'flagged by moderation',
}
# Why a caption gets no (other) answer.
FLAGGED_CAPTION, UNWELCOME_CAPTION = 'flagged caption', 'unwelcome caption'
HOPELESS = {
  FLAGGED_CAPTION: 'flagged by moderation',
  UNWELCOME_CAPTION: 'that the model would not take',
}

# (captions, seeds) -> (index, text) of each, in any order. The text is what follows
# `triplets.prompt(caption)`, with `triplets.STOP` if it was written to its end; None if the model
# does not take this caption at all.
Complete = Callable[[Sequence[str], Sequence[int]], Iterator[tuple[int, str | None]]]
Moderate = Callable[[str], bool]  # whether a text must not be used
Task = tuple['Caption', int]  # a caption, and which attempt at it is next


class Caption(NamedTuple):
  row: int  # of its file, from 0
  text: str
  url: str = ''


@dataclasses.dataclass(frozen=True)
class Writing:
  """How texts are written; the defaults are the original's.

  Attributes:
    seed: of the whole run.
    attempts: answers to ask for, each with another seed, until one is kept.
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
      raise InputError('top_p is 0, which leaves no token; use more, or a temperature of 0.')
    for name, low, high in (('temperature', 0, 2), ('top_p', 0, 1), ('frequency_penalty', -2, 2)):
      if not low <= getattr(self, name) <= high:
        raise InputError(f'{name} is {getattr(self, name)}; use {low} to {high}.')

  def seed_of(self, caption: str, attempt: int) -> int:
    """31 bits, by a hash, so that no answer depends on what else was asked for."""
    digest = hashlib.blake2b(f'{self.seed} {attempt} {caption}'.encode(), digest_size=4).digest()
    return int.from_bytes(digest, 'little') >> 1


class Captions(NamedTuple):
  """Those to write for, and how many more there were."""

  kept: list[Caption]
  left_out: dict[str, int]  # by reason: 'empty', 'duplicate', 'long', 'garbled', ...


def read_captions(path: Path, column: str = '') -> Captions:
  """Captions of a .jsonl, .csv or .parquet file, a folder of .parquet, or one per line of a text.

  Of captions that are the same but for case, white space and a last stop, or that have the same
  URL, the first stays. InputError for a file or row that cannot be read.
  """
  left_out, kept, seen = collections.Counter(), [], set()
  for row, (text, url) in enumerate(_texts(path, column)):
    text = ' '.join(text.split())
    keys = {plain(text)} | ({f'url {url}'} if url else set())
    if not text:
      left_out['empty'] += 1
    elif keys & seen:
      left_out['duplicate'] += 1
    elif triplets.mark_in(text):
      left_out['like a mark of the formats'] += 1
    elif triplets.is_garbled(text):
      left_out['garbled'] += 1
    elif not fits(text):
      left_out['long'] += 1
    else:
      kept.append(Caption(row, text, url))
      seen |= keys
  if not kept:
    raise InputError(f'{path}: has no caption that could be used.')
  return Captions(kept, dict(left_out))


def _texts(path: Path, column: str) -> Iterator[tuple[str, str]]:
  """(caption, URL or '') of every row."""
  if path.suffix.lower() in LINES and not path.is_dir():
    if column:
      raise InputError(f'{path}: is a text without columns; leave out --column {column}.')
    try:
      if path.exists() and not path.is_file():
        raise InputError(f'{path}: is no file.')
      content = path.read_bytes().decode('utf-8-sig')
      lines = content.removesuffix('\n').split('\n')  # no other sign ends a line
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, 'strerror', None) or 'is not UTF-8'
      raise InputError(f'{path}: cannot be read as a text ({reason}).') from None
    yield from ((line, '') for line in lines)
    return
  reader = triplets.open_table(path)
  name = column if column in reader.names else None if column else triplets.pick(
    reader.names, COLUMNS
  )  # fmt: skip
  if name is None:
    raise InputError(
      f'{path}: has no column {column or "caption"}; the columns are {", ".join(reader.names)}; say'
      ' which by --column.'
    )
  url = triplets.pick(reader.names, (('url', 'image_url'),))
  wanted = tuple(filter(None, (name, url)))
  for i in range(len(reader)):
    values = reader.read(i, wanted)[2]
    yield triplets.text(values.get(name)), triplets.text(values.get(url))


def judge(
  caption: str, answer: str, writing: Writing, is_flagged: Moderate | None
) -> tuple[str, tuple[str, str] | None]:
  """Why an answer is refused, of REASONS, and None; or '' and (instruction, edited caption)."""
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


def write_all(
  captions: Sequence[Caption],
  out: str | Path,
  complete: Complete,
  writing: Writing,
  identity: Mapping[str, Any],
  shard: tuple[int, int] = (0, 1),
  limit: int | None = None,
  is_flagged: Moderate | None = None,
  progress: Progress = unwatched,
  confirm: Callable[[Sequence[str]], None] = lambda texts: None,
) -> bool:
  """Writes for all captions of this worker, from where an earlier try stopped.

  `identity` tells models apart, so that no run goes on with another; its 'model' stands in every
  line, and what of the sampling is 'taken_out', of which the model was told nothing, is null there.
  `shard` (i, n) is worker i of n, which has every n-th caption. `limit` is of captions, the
  first; a later run may have more. `confirm` is called with the captions to ask for, before
  anything is written, and may raise. Returns whether all workers are done, and the prompts written.
  """
  folder = local_folder(out)
  digest = hashlib.blake2b(json.dumps(captions).encode(), digest_size=8).hexdigest()
  settings = dataclasses.asdict(writing) | dict(identity)
  settings.pop('taken_out', None)  # the request tells
  if 'weights' in settings:  # tell more than the name of a folder
    del settings['model']
  settings |= {'captions': digest, 'shards': shard[1]}
  is_new = _check_settings(folder, settings)
  wanted = captions[:limit]
  if todo := remaining(folder, wanted, writing, shard):
    confirm([caption.text for caption, _ in todo])
  if is_new:
    _check_same(folder / SETTINGS, storage.claim(folder / SETTINGS, settings), settings)
  total = len(wanted[shard[0] :: shard[1]])
  with _journal(answers_file(folder, shard)) as record:
    todo = collections.deque(remaining(folder, wanted, writing, shard))  # nobody else writes now
    if todo:  # else what is there is of fewer captions, and looks whole
      (folder / PROMPTS).unlink(missing_ok=True)
    done = total - len(todo)
    progress(done, total)
    while todo:
      tasks = [todo.popleft() for _ in range(min(CHUNK, len(todo)))]
      asked = []
      for caption, attempt in tasks:
        if attempt == 0 and is_flagged and is_flagged(caption.text):
          record({'row': caption.row, 'attempt': 0, 'refused': FLAGGED_CAPTION})
        else:
          asked.append((caption, attempt))
      done += len(tasks) - len(asked)
      again = []
      for task, answer in _answers(complete, asked, writing):
        caption, attempt = task
        line = {'row': caption.row, 'attempt': attempt}
        refused, parts = UNWELCOME_CAPTION, None
        if answer is not None:
          refused, parts = judge(caption.text, answer, writing, is_flagged)
        if refused:
          record(line | {'refused': refused, 'answer': answer})
        else:
          record(line | {'edit': parts[0], 'output': parts[1]})
        if refused and refused not in HOPELESS and attempt + 1 < writing.attempts:
          again.append((caption, attempt + 1))
        else:
          done += 1
          progress(done, total)
      todo.extendleft(reversed(again))  # so that the next call is full, and the last one short
  sampling = {name: None if name in identity.get('taken_out', ()) else getattr(writing, name)
              for name in SAMPLING}  # fmt: skip
  about = {'model': identity['model'], 'sampling': sampling}
  return _gather(folder, captions, len(wanted), writing, about, shard)


def _answers(complete, asked, writing) -> Iterator[tuple[Task, str]]:
  if not asked:
    return
  seeds = [writing.seed_of(caption.text, attempt) for caption, attempt in asked]
  missing = set(range(len(asked)))
  for index, answer in complete([caption.text for caption, _ in asked], seeds):
    missing.remove(index)  # a KeyError if a backend answers twice
    yield asked[index], answer
  if missing:
    raise RuntimeError(f'the backend left out {len(missing)} of {len(asked)} captions')


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
def _journal(file: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
  """A function that adds a line to the file at once; no other process can at the same time."""
  with file.open('a+b') as opened:
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that dies
    except BlockingIOError:
      raise InputError(
        f'{file}: another process writes it; wait for that, or give it another --shard.'
      ) from None
    except OSError:  # a disk without locks
      pass
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


def _gather(folder, captions, least, writing, about, shard) -> bool:
  """Writes the prompts of the first captions, up to one that a worker has still to do.

  Writes nothing if these are not `least`.
  """
  workers = [(i, shard[1]) for i in range(shard[1])]
  missing = {
    caption.row for worker in workers for caption, _ in remaining(folder, captions, writing, worker)
  }
  captions = list(itertools.takewhile(lambda caption: caption.row not in missing, captions))
  if len(captions) < least:
    return False
  answers = (line for worker in workers for line in read_answers(answers_file(folder, worker)))
  kept = {line['row']: line for line in answers if 'edit' in line}
  lines = []
  for caption in captions:
    if answer := kept.get(caption.row):
      line = {'caption': caption.text, 'edit': answer['edit'], 'output': answer['output']}
      line |= {'url': caption.url} if caption.url else {}
      line |= {'row': caption.row, 'model': about['model'], 'attempt': answer['attempt']}
      line |= {'seed': writing.seed_of(caption.text, answer['attempt'])}
      lines.append(json.dumps(line | about['sampling']) + '\n')
  if lines:
    storage.write_bytes(folder / PROMPTS, ''.join(lines).encode())
  return True


def _check_settings(folder, settings) -> bool:
  """Whether the folder is new; InputError if it was begun with other settings."""
  file = folder / SETTINGS
  if folder.exists() and not folder.is_dir():
    raise InputError(f'{folder}: is a file; give a folder.')
  has_answers = any(folder.glob('answers-*.jsonl'))  # first: another worker may begin right now
  if not file.exists():
    if has_answers:
      raise InputError(
        f'{folder}: has answers, but no {SETTINGS} that tells how they were written; use another'
        ' folder.'
      )
    return True
  _check_same(file, storage.read_json(file), settings)
  return False


def _check_same(file, known, settings) -> None:
  """InputError if a run was begun with other settings."""
  if not isinstance(known, dict):
    raise InputError(f'{file}: holds no settings; use another folder.')
  for name in storage.differing(known, json.loads(json.dumps(settings))):
    if name == 'captions':
      raise InputError(
        f'{file.parent}: was begun with other captions, or another column; use another folder, and'
        ' `ip2p captions merge` in the end.'
      )
    raise InputError(
      f'{file.parent}: was begun with {name} {known.get(name)!r}, not {settings.get(name)!r}; use'
      ' another folder, or the same settings.'
    )


def local_folder(out: str | Path) -> Path:
  return Path(storage.folder(local_path(out)))


def local_path(path: str | Path) -> str:
  """A path of this machine; InputError for a bucket, or none."""
  if not str(path) or not storage.is_local(path):
    raise InputError(f'{str(path)!r}: give a path of this machine, not of a bucket.')
  return str(path)


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


def merge_answers(files: Sequence[str | Path], out: str | Path) -> tuple[int, int]:
  """Writes the triplets of all files that were not there before: (lines written, duplicates).

  Columns are called as in the prompts of `write_all`; others come along, if JSON has their values.
  Duplicates have the same caption, but for case, white space and a last stop, or the same URL.
  """
  out = Path(local_path(out)).expanduser()
  taken = InputError(f'{out}: exists, or does not end in .jsonl; give a new file that does.')
  if out.exists() or out.suffix.lower() != '.jsonl':
    raise taken
  seen, lines, duplicates = set(), [], 0
  for file in files:
    rows = triplets.TripletRows(local_path(file))
    for i in range(len(rows)):
      place, triplet, others = rows.read_whole(i)
      if fault := triplets.fault(triplet):
        raise InputError(f'{place} {fault}; mend it or take it out.')
      url = triplets.text(others.get('url'))
      keys = {plain(triplet.caption)} | ({f'url {url}'} if url else set())
      if keys & seen:
        duplicates += 1
        continue
      seen |= keys
      line = dict(zip(('caption', 'edit', 'output'), triplet, strict=True))
      line |= {name: value for name, value in others.items() if _is_plain(value)}
      lines.append(json.dumps(line) + '\n')
  try:
    storage.create(storage.folder(out), ''.join(lines).encode())
  except FileExistsError:  # another merge came first
    raise taken from None
  return len(lines), duplicates


def _is_plain(value) -> bool:
  """Whether JSON has it."""
  return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
