"""Writes an instruction and an edited caption for each of many captions, by a language model.

  OUT/captions.json                  the settings; a run with others is refused
  OUT/answers-00000-of-00001.jsonl   all answers to this worker, in the order they came
  OUT/prompts.jsonl                  the kept answers in the order of the captions, written when all
                                     workers are done: `ip2p pairs` reads it

Answers are on disk as they come. A run that was killed and is started again asks only for what is
missing, and ends with the same prompts.
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
CHUNK = 4096  # captions per call of a backend; at the end of a call, its batch is half empty
SAMPLING = ('temperature', 'top_p', 'frequency_penalty', 'max_tokens')  # in every line of prompts
# (captions, seeds) -> (index, text) of each, in any order. The text continues
# `triplets.prompt(caption)`; it has `triplets.STOP` if it is complete. None if the model refuses
# the caption.
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
  """Writes for all captions of this worker, continuing where an earlier run stopped.

  `identity` tells models apart, so that no run continues with another model. Every line has its
  'model'; settings of the sampling in its 'taken_out', which the model did not get, are null there.
  `shard` (i, n) is worker i of n, which has every n-th caption. `limit` takes only the first
  captions; a later run may take more. `confirm` gets the captions to ask for, before anything is
  written, and may raise. Returns whether all workers are done and the prompts are written.
  """
  folder, wanted = storage.local_folder(out), captions[:limit]
  settings = _settings(captions, writing, identity, shard)
  is_new = _check_settings(folder, settings)
  if todo := remaining(folder, wanted, writing, shard):
    confirm([caption.text for caption, _ in todo])
  if is_new:
    _check_same(folder / SETTINGS, storage.claim(folder / SETTINGS, settings), settings)
  with journal(answers_file(folder, shard)) as record:
    todo = remaining(folder, wanted, writing, shard)  # no other process writes now
    if todo:  # an older file has fewer captions and would look complete
      (folder / PROMPTS).unlink(missing_ok=True)
    total = len(wanted[shard[0] :: shard[1]])
    for left in _write(todo, complete, writing, is_flagged, record):
      progress(total - left, total)
  sampling = {name: None if name in identity.get('taken_out', ()) else getattr(writing, name)
              for name in SAMPLING}  # fmt: skip
  about = {'model': identity['model'], 'sampling': sampling}
  return _gather(folder, captions, len(wanted), writing, about, shard)


def _settings(captions, writing, identity, shard) -> dict[str, Any]:
  """The settings that may not change between runs in one folder."""
  digest = hashlib.blake2b(json.dumps(captions).encode(), digest_size=8).hexdigest()
  settings = dataclasses.asdict(writing) | dict(identity)
  settings.pop('taken_out', None)  # the settings of the request show it
  if 'weights' in settings:  # they identify the model better than a folder's name
    del settings['model']
  return settings | {'captions': digest, 'shards': shard[1]}


def _write(todo, complete, writing, is_flagged, record) -> Iterator[int]:
  """Records an answer to each task, asks again for refused ones; yields how many are left."""
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
    todo.extendleft(reversed(again))  # so that every call but the last is full


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
    missing.remove(index)  # KeyError if a backend answers twice
    yield asked[index], answer
  if missing:
    raise RuntimeError(f'the backend left out {len(missing)} of {len(asked)} captions')


def _gather(folder, captions, least, writing, about, shard) -> bool:
  """Writes the prompts of the first captions, until one that is not done.

  Writes nothing if these are fewer than `least`.
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
  has_answers = any(folder.glob('answers-*.jsonl'))  # first, since another worker may begin now
  if not file.exists():
    if has_answers:
      raise InputError(
        f'{folder}: has answers, but no {SETTINGS} with their settings; use another folder.'
      )
    return True
  _check_same(file, storage.read_json(file), settings)
  return False


def _check_same(file, saved, settings) -> None:
  """InputError if a run was begun with other settings."""
  if not isinstance(saved, dict):
    raise InputError(f'{file}: holds no settings; use another folder.')
  for name in storage.differing(saved, json.loads(json.dumps(settings))):
    if name == 'bytes' and name not in saved:  # older versions did not write it
      continue
    if name == 'captions':
      raise InputError(
        f'{file.parent}: was begun with other captions, or another column; use another folder, and'
        ' then `ip2p captions merge`.'
      )
    raise InputError(
      f'{file.parent}: was begun with {name} {saved.get(name)!r}, not {settings.get(name)!r}; use'
      ' another folder, or the same settings.'
    )
