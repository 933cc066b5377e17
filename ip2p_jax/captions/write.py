"""Writes an instruction and an edited caption for each of many captions, by a language model.

  OUT/captions.json                  the settings; another run with others is refused
  OUT/answers-00000-of-00001.jsonl   all that this worker was answered, in the order it came
  OUT/prompts.jsonl                  what was kept, in the order of the captions, once all workers
                                     are done: `ip2p pairs` reads it

Answers are on disk as they come. Killed at any time and started again, a run
asks only for what is missing, and ends with the very same prompts.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ip2p_jax import storage
from ip2p_jax.captions.answers import (
  FLAGGED_CAPTION,
  HOPELESS,
  UNWELCOME_CAPTION,
  Task,
  answers_file,
  journal,
  read_answers,
  remaining,
)
from ip2p_jax.captions.judge import Moderate, Writing, judge
from ip2p_jax.captions.read import Caption
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress, unwatched

SETTINGS, PROMPTS = 'captions.json', 'prompts.jsonl'
CHUNK = 4096  # captions per call of a backend, which runs half empty at the end of each
SAMPLING = ('temperature', 'top_p', 'frequency_penalty', 'max_tokens')  # in every line of prompts
# (captions, seeds) -> (index, text) of each, in any order. The text is what follows
# `triplets.prompt(caption)`, with `triplets.STOP` if it was written to its end; None if the model
# does not take this caption at all.
Complete = Callable[[Sequence[str], Sequence[int]], Iterator[tuple[int, str | None]]]


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
  folder, wanted = storage.local_folder(out), captions[:limit]
  settings = _settings(captions, writing, identity, shard)
  is_new = _check_settings(folder, settings)
  if todo := remaining(folder, wanted, writing, shard):
    confirm([caption.text for caption, _ in todo])
  if is_new:
    _check_same(folder / SETTINGS, storage.claim(folder / SETTINGS, settings), settings)
  with journal(answers_file(folder, shard)) as record:
    todo = remaining(folder, wanted, writing, shard)  # nobody else writes now
    if todo:  # else what is there is of fewer captions, and looks whole
      (folder / PROMPTS).unlink(missing_ok=True)
    total = len(wanted[shard[0] :: shard[1]])
    for left in _write(todo, complete, writing, is_flagged, record):
      progress(total - left, total)
  sampling = {name: None if name in identity.get('taken_out', ()) else getattr(writing, name)
              for name in SAMPLING}  # fmt: skip
  about = {'model': identity['model'], 'sampling': sampling}
  return _gather(folder, captions, len(wanted), writing, about, shard)


def _settings(captions, writing, identity, shard) -> dict[str, Any]:
  """What may not change while a folder is filled."""
  digest = hashlib.blake2b(json.dumps(captions).encode(), digest_size=8).hexdigest()
  settings = dataclasses.asdict(writing) | dict(identity)
  settings.pop('taken_out', None)  # the request tells
  if 'weights' in settings:  # tell more than the name of a folder
    del settings['model']
  return settings | {'captions': digest, 'shards': shard[1]}


def _write(todo, complete, writing, is_flagged, record) -> Iterator[int]:
  """Records an answer to each task, and to what was refused again; gives how many are left."""
  todo, left = collections.deque(todo), len(todo)
  yield left
  while todo:
    tasks, asked, again = [todo.popleft() for _ in range(min(CHUNK, len(todo)))], [], []
    for caption, attempt in tasks:
      if attempt == 0 and is_flagged and is_flagged(caption.text):
        record({'row': caption.row, 'attempt': 0, 'refused': FLAGGED_CAPTION})
        left -= 1
      else:
        asked.append((caption, attempt))
    for (caption, attempt), answer in _answers(complete, asked, writing):
      line = {'row': caption.row, 'attempt': attempt}
      line |= _judged(caption.text, answer, writing, is_flagged)
      record(line)
      is_hopeless = line.get('refused') in HOPELESS or attempt + 1 == writing.attempts
      if 'refused' in line and not is_hopeless:
        again.append((caption, attempt + 1))
      else:
        left -= 1
        yield left
    todo.extendleft(reversed(again))  # so that the next call is full, and the last one short


def _judged(caption, answer, writing, is_flagged) -> dict[str, str | None]:
  if answer is None:
    return {'refused': UNWELCOME_CAPTION, 'answer': None}
  refused, parts = judge(caption, answer, writing, is_flagged)
  return {'refused': refused, 'answer': answer} if refused else dict(
    zip(('edit', 'output'), parts, strict=True)
  )  # fmt: skip


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
    if name == 'bytes' and name not in known:  # older versions did not write it
      continue
    if name == 'captions':
      raise InputError(
        f'{file.parent}: was begun with other captions, or another column; use another folder, and'
        ' `ip2p captions merge` in the end.'
      )
    raise InputError(
      f'{file.parent}: was begun with {name} {known.get(name)!r}, not {settings.get(name)!r}; use'
      ' another folder, or the same settings.'
    )
