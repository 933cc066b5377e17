"""Writes packed data sets. A run can be killed anywhere, repeated, or shared by machines.

The plan (settings, and which rows go into which file) depends only on the arguments and the source,
and is written first. Every file is written under a temporary name, then renamed, then gets a note.
A file holds only its own rows. So a second run writes the files without a note, and each of n
machines writes every n-th file. The machine that finds all notes writes the metadata, which make
the folder a data set (if two do so, they write the same bytes).
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core import dataset_info
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.splits import SplitDict

from ip2p_jax import storage
from ip2p_jax.data import shards
from ip2p_jax.data.pack_plan import Shard, differences, shards_of
from ip2p_jax.errors import InputError
from ip2p_jax.progress import Progress

SHOWN = 10  # broken rows named in one message


class Job(NamedTuple):
  """This machine's part of a pack. `skipped` grows during the work.

  Attributes:
    mine, todo: the files of this machine, and those that it has not written yet.
    skipped: broken rows left out of all finished files, a line each.
  """

  folder: Path
  plan: dict
  mine: list[Shard]
  todo: list[Shard]
  skipped: list[str]
  max_corrupt: int


class Summary(NamedTuple):
  """The data set after a run.

  Attributes:
    rows: number of rows so far, by split.
    skipped: broken rows that were left out, a line each.
    is_complete: False if shards of other machines are missing.
  """

  rows: dict[str, int]
  skipped: tuple[str, ...]
  is_complete: bool


@contextlib.contextmanager
def working(folder: str | os.PathLike, plan: dict, part: str, max_corrupt: int) -> Iterator[Job]:
  """Does `begin`, and keeps the part locked until the end.

  Raises InputError if another process works on the part, or packs here with another n; or as
  `begin`.
  """
  start = lambda is_shared: begin(folder, plan, part, max_corrupt)
  if '://' in str(folder) or (Path(folder) / shards.COMPLETE).is_file():  # refused, or complete
    yield start(False)
    return
  with contextlib.ExitStack() as stack:
    with _writing(folder):
      job = storage.at_work(storage.folder(folder), parse_shard(part), 'files', start)
      job = stack.enter_context(job)
    yield job


def begin(folder: str | os.PathLike, plan: dict, part: str, max_corrupt: int) -> Job:
  """Claims the folder for the plan, or continues there; `part` is 'i/n', this machine of n.

  Raises InputError if the folder holds something else, or a pack with other settings.
  """
  if '://' in str(folder):
    raise InputError(f'{folder}: give a folder of this machine; buckets can be mounted as one.')
  folder, (index, count) = Path(folder), parse_shard(part)
  with _writing(folder):
    plan = _claim(folder, plan)
    wanted = shards_of(plan)
    mine = wanted[index::count]
    if (folder / shards.COMPLETE).is_file():
      return Job(folder, plan, mine, [], [], max_corrupt)
    (folder / shards.PROGRESS).mkdir(exist_ok=True)
    notes = _notes(folder, wanted)
    if len(_skipped(notes)) > max_corrupt:  # that stopped the last run; try them again
      for shard in [shard for shard in mine if notes.get(shard, {}).get('skipped')]:
        _note(folder, shard).unlink()
        del notes[shard]
    for shard in mine:  # files that a killed run left
      for file in (folder / shards.PROGRESS).glob(f'*{shard.file}.*.tmp'):
        file.unlink(missing_ok=True)
  todo = [shard for shard in mine if shard not in notes]
  return Job(folder, plan, mine, todo, _skipped(notes), max_corrupt)


def write_shard(
  folder: Path, plan: dict, shard: Shard, examples: Iterable[dict[str, Any] | InputError]
) -> list[str]:
  """Writes one file from the examples of its rows, in order. Returns a line per error."""
  features = shards.features_of(plan)
  serializer = ExampleSerializer(features.get_serialized_info())
  skipped, rows = [], 0
  with storage.temporary_name(folder / shards.PROGRESS / shard.file) as temporary:
    with _writing(folder):
      options = 'group_size:1,uncompressed'
      writer = array_record_module.ArrayRecordWriter(str(temporary), options)
    for example in examples:
      if isinstance(example, InputError):
        skipped.append(str(example))
        continue
      record = serializer.get_tf_example(features.encode_example(example))
      with _writing(folder):
        writer.write(record.SerializeToString(deterministic=True))
      rows += 1
    with _writing(folder):
      writer.close()
      size = _settle(temporary, rows)
      os.replace(temporary, folder / shard.file)
      note = {'rows': rows, 'bytes': size, 'skipped': skipped}
      storage.write_json(_note(folder, shard), note)
  return skipped


def work(
  job: Job,
  results: Iterable[tuple[Shard, list[str]]],
  say: Callable[[str], None],
  progress: Progress,
) -> None:
  """Consumes all `results` (file, its broken rows). Stops if too many rows are broken."""
  rows = lambda files: sum(shard.stop - shard.start for shard in files)
  total, left = rows(job.mine), rows(job.todo)
  say(f'{job.folder}: {total:,} rows in {len(job.mine)} files, {len(job.todo)} of them to write')
  check_skipped(job)
  for shard, skipped in results:
    for line in skipped:
      say(f'left out: {line}')
    job.skipped.extend(skipped)
    left -= rows([shard])
    progress(total - left, total)
    check_skipped(job)


def check_skipped(job: Job) -> None:
  """Raises InputError if more than `max_corrupt` rows are broken."""
  count = len(job.skipped)
  if count > job.max_corrupt:
    more = f' ... and {count - SHOWN} more' if count > SHOWN else ''
    raise InputError(
      f'{count} broken {"row" if count == 1 else "rows"}, but --max-corrupt allows'
      f' {job.max_corrupt}: {" | ".join(line.rstrip(".") for line in job.skipped[:SHOWN])}{more}.'
      ' Repair the files (ip2p check lists all) or allow more, and run this again to continue. To'
      ' remove rows, start with a new folder.'
    )


def finish(job: Job) -> Summary:
  """Writes the metadata of the data set if all files of all machines are there."""
  wanted, complete = shards_of(job.plan), job.folder / shards.COMPLETE
  with contextlib.ExitStack() as stack:
    if not complete.is_file():  # the lock keeps others from removing the notes meanwhile
      with _writing(job.folder):
        lock = storage.locked(storage.folder(job.folder) / '.lock', '', waits=True)
        stack.enter_context(lock)
    notes = {} if complete.is_file() else _notes(job.folder, wanted)
    if len(notes) == len(wanted):
      check_skipped(job._replace(skipped=_skipped(notes)))
      with _writing(job.folder):
        try:
          _write_metadata(job, notes)
        except OSError:
          if not complete.is_file():  # else another machine was first, and removed the notes
            raise
    if complete.is_file():
      _tidy(job.folder)
  if complete.is_file():
    description = shards.describe(job.folder)
    return Summary(description['splits'], tuple(description['skipped']), True)
  rows = dict.fromkeys(job.plan['splits'], 0)
  for shard, note in notes.items():
    rows[shard.split] += note['rows']
  return Summary(rows, tuple(_skipped(notes)), False)


def parse_shard(part):
  index, slash, count = part.partition('/')
  is_number = slash and all(text.isdecimal() and len(text) < 6 for text in (index, count))
  if is_number and int(index) < int(count):
    return int(index), int(count)
  raise InputError(f"shard is {part!r}; use 'i/n' for machine i, counted from 0, of n: '0/4'.")


def _claim(folder, plan) -> dict:
  """The folder's plan. A new folder gets `plan`."""
  file = folder / shards.PLAN
  if not file.is_file():
    folder.mkdir(parents=True, exist_ok=True)
    contents = [name for name in os.listdir(folder) if not name.startswith('.')]
    if contents and not file.is_file():  # another machine may have been first
      raise InputError(f'{folder}: is not empty; give a new folder.')
    storage.claim(file, plan)
  existing = shards.read_plan(folder)
  different = differences(existing, plan)
  if different:
    raise InputError(
      f'{folder}: was begun otherwise: {", ".join(different)}; to continue, use the same source'
      ' and settings, or give a new folder.'
    )
  return existing


def _note(folder, shard):
  return folder / shards.PROGRESS / f'{shard.file}.json'


def _notes(folder, wanted) -> dict[Shard, dict]:
  """The notes of the files that are complete."""
  notes = {}
  for shard in wanted:
    file, note = folder / shard.file, _note(folder, shard)
    if file.is_file() and note.is_file():
      content = storage.read_json(note)
      if content['bytes'] == file.stat().st_size:
        notes[shard] = content
  return notes


def _skipped(notes) -> list[str]:
  return [line for note in notes.values() for line in note['skipped']]


def _settle(file, rows) -> int:
  """Makes sure that the file is safely on the disk. Returns its size in bytes."""
  with open(file, 'rb') as opened:
    os.fsync(opened.fileno())
  reader = array_record_module.ArrayRecordReader(str(file))
  count = reader.num_records()
  reader.close()
  if count != rows:
    raise OSError(f'{count} of {rows} records arrived')
  return file.stat().st_size


def _write_metadata(job, notes):
  template = tfds.core.ShardedFileTemplate(
    data_dir=epath.Path(job.folder), dataset_name=shards.NAME, filetype_suffix='array_record'
  )
  infos = []
  for split in job.plan['splits']:
    split_notes = [note for shard, note in notes.items() if shard.split == split]
    lengths, sizes = [note['rows'] for note in split_notes], [note['bytes'] for note in split_notes]
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        num_bytes=sum(sizes),
        filename_template=template.replace(split=split),
      )
    )
  metadata = {'kind': job.plan['kind'], 'settings': job.plan['settings']}
  info = dataset_info.DatasetInfo(
    builder=dataset_info.DatasetIdentity(
      name=shards.NAME,
      version=tfds.core.Version('1.0.0'),
      data_dir=str(job.folder),
      module_name='',
    ),
    description='Packed by ip2p pack.',
    features=shards.features_of(job.plan),
    metadata=tfds.core.MetadataDict(metadata | {'skipped': _skipped(notes)}),
  )
  info.set_file_format('array_record')
  info.set_splits(SplitDict(infos))
  with storage.temporary_name(job.folder / 'metadata') as temporary:
    temporary.mkdir()
    info.write_to_directory(temporary)
    for name in sorted(os.listdir(temporary), key=lambda name: (name == shards.COMPLETE, name)):
      os.replace(temporary / name, job.folder / name)


def _tidy(folder):
  """Removes files that are useless once the data set is complete."""
  for leftover in (folder / shards.PROGRESS, *folder.glob('.*.tmp')):
    if leftover.is_dir():
      shutil.rmtree(leftover, ignore_errors=True)
    else:
      leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(folder):
  """Turns errors of the disk into an InputError. ArrayRecord raises RuntimeError."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(
      f'{folder}: cannot be written ({reason}); mend this, then run it again to continue.'
    ) from error
