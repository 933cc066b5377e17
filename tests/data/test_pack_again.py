"""A pack that is killed, repeated or shared by machines gives the same data set, byte for byte."""

import concurrent.futures
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_pairs

from ip2p_jax import storage
from ip2p_jax.data import shard_writing, shards
from ip2p_jax.data.pack import pack
from ip2p_jax.errors import InputError

QUIET = {'say': lambda line: None, 'workers': 0}
BYTES = 10_000  # of a shard, so that a few rows fill several


@pytest.fixture(scope='module')
def rows():
  return tiny_pairs.rows(12)


def files(folder: Path) -> dict[str, bytes]:
  """All files of a folder, hidden or not."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


class Killed(BaseException):
  pass


def dies_at(monkeypatch, number: int, after: bool, work) -> bool:
  """Runs `work` and kills it at the numbered rename or link. False if there were fewer."""
  calls = iter(range(1000))

  def dying(act):
    def acts(source, destination):
      is_last = next(calls) == number
      if after or not is_last:
        act(source, destination)
      if is_last:
        raise Killed

    return acts

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', dying(os.replace))
    patch.setattr(os, 'link', dying(os.link))
    try:
      work()
    except Killed:
      return True
  return False


@pytest.mark.parametrize('after', [False, True])
def test_a_pack_killed_at_a_rename_continues_to_the_same_bytes(tmp_path, rows, monkeypatch, after):
  sources, options = {'train': rows[:6], 'test': rows[6:8]}, {'shard_bytes': BYTES} | QUIET
  pack(sources, tmp_path / 'whole', **options)
  number, folder = 0, tmp_path / '0'
  while dies_at(monkeypatch, number, after, functools.partial(pack, sources, folder, **options)):
    if shards.is_shards(folder) and not (folder / 'dataset_info.json').exists():
      with pytest.raises(InputError, match='run ip2p pack again to finish it'):
        shards.open_shards(folder, 'train')
    summary = pack(sources, folder, **options)
    assert summary.is_complete and summary.rows == {'train': 6, 'test': 2}
    assert files(folder) == files(tmp_path / 'whole')
    number += 1
    folder = tmp_path / str(number)
  assert number >= 10  # the plan, three files with their notes, and the metadata


class Mortal(list):
  """Rows; the process dies after `left` reads."""

  def __init__(self, rows, left):
    super().__init__(rows)
    self.left = left

  def __getitem__(self, i):
    self.left -= 1
    if self.left < 0:
      raise Killed
    return list.__getitem__(self, i)


def test_only_damaged_files_are_written_again(tmp_path, rows):
  folder, options = tmp_path / 'set', {'shard_bytes': BYTES} | QUIET
  with pytest.raises(Killed):  # the plan reads all 12, then they are read one by one
    pack({'train': Mortal(rows, 12 + 10)}, folder, **options)
  intact, damaged, *more = sorted(folder.glob('edits-*'))
  written = intact.stat().st_mtime_ns
  assert len(more) == 1 and not list(folder.glob('*/*.tmp'))
  os.truncate(damaged, 1000)
  pack({'train': rows}, folder, **options)
  assert intact.stat().st_mtime_ns == written
  assert list(shards.open_shards(folder, 'train')) == rows


def test_the_last_machine_completes_shared_work(tmp_path, rows):
  options = {'shard_bytes': BYTES} | QUIET
  pack({'train': rows}, tmp_path / 'one', **options)
  for part in ('2/3', '0/3'):
    assert not pack({'train': rows}, tmp_path / 'three', shard=part, **options).is_complete
    with pytest.raises(InputError, match='interrupted'):
      shards.describe(tmp_path / 'three')
  summary = pack({'train': rows}, tmp_path / 'three', shard='1/3', **options)
  assert summary.is_complete and summary.rows == {'train': 12}
  assert files(tmp_path / 'one') == files(tmp_path / 'three')


def test_machines_that_end_together_complete_the_work(tmp_path, rows, monkeypatch):
  ends, finish, read_json = threading.Barrier(4), shard_writing.finish, storage.read_json

  def slowly(path):
    time.sleep(0.02)
    return read_json(path)

  def together(job):
    ends.wait()
    return finish(job)

  monkeypatch.setattr(storage, 'read_json', slowly)
  monkeypatch.setattr(shard_writing, 'finish', together)
  work = lambda i: pack(
    {'train': rows[:4]}, tmp_path, shard=f'{i}/4', **{'shard_bytes': BYTES} | QUIET
  )
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert all(summary.is_complete for summary in pool.map(work, range(4)))


@pytest.mark.parametrize('part', ['3/3', '1', 'a/b', '-1/2', '0/0'])
def test_a_bad_shard_is_refused(tmp_path, rows, part):
  with pytest.raises(InputError, match="use 'i/n'"):
    pack({'train': rows}, tmp_path / 'set', shard=part, **QUIET)


def test_a_complete_data_set_is_left_alone(tmp_path, rows):
  first = pack({'train': rows}, tmp_path / 'set', **QUIET)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'set').iterdir()}
  assert pack({'train': rows}, tmp_path / 'set', **QUIET) == first
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'set').iterdir()} == before


def test_another_pack_in_the_same_folder_is_refused(tmp_path, rows):
  folder = tmp_path / 'set'
  pack({'train': rows}, folder, size=256, **QUIET)
  with pytest.raises(InputError, match='size was 256 and is 128 now'):
    pack({'train': rows}, folder, size=128, **QUIET)
  with pytest.raises(InputError, match='train had 12 rows and has 11 now'):
    pack({'train': rows[:11]}, folder, size=256, **QUIET)
  with pytest.raises(InputError, match='some rows are not the same now'):
    pack({'train': rows[::-1]}, folder, size=256, **QUIET)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('')
  with pytest.raises(InputError, match='not empty'):
    pack({'train': rows}, tmp_path / 'mine', **QUIET)


def test_an_unwritable_folder_is_refused(tmp_path, rows):
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='file: cannot be written'):
    pack({'train': rows}, tmp_path / 'file', **QUIET)
  with pytest.raises(InputError, match='give a folder of this machine'):
    pack({'train': rows}, 'gs://bucket/set', **QUIET)


def test_processes_write_the_same_bytes(tmp_path, rows):
  seen, options = [], {'shard_bytes': BYTES, 'size': 32}
  pack({'train': rows}, tmp_path / 'alone', **options, **QUIET)
  options |= {'workers': 2, 'say': lambda line: None, 'progress': lambda *at: seen.append(at)}
  pack({'train': rows}, tmp_path / 'two', **options)
  assert files(tmp_path / 'alone') == files(tmp_path / 'two')
  assert seen == sorted(seen) and seen[-1] == (12, 12) and len(seen) > 1


class Deadly(list):
  def __getitem__(self, i):
    if 'MainProcess' not in str(__import__('multiprocessing').current_process()):
      os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    return list.__getitem__(self, i)


def test_a_worker_that_dies_is_reported(tmp_path, rows):
  with pytest.raises(InputError, match='worker process was killed'):
    pack({'train': Deadly(rows)}, tmp_path / 'set', workers=1, say=lambda line: None)


PROGRAM = """
import sys, tiny_pairs
from ip2p_jax.data.pack import pack
if __name__ == '__main__':
  size, folder = int(sys.argv[1]), sys.argv[2]
  rows = tiny_pairs.rows(40, size=(600, 400))
  pack({"train": rows}, folder, size=64, shard_bytes=size, workers=2)
"""


@pytest.mark.slow
def test_a_killed_pack_leaves_no_worker_and_can_continue(tmp_path):
  program, size = tmp_path / 'program.py', 2000
  program.write_text(PROGRAM)
  here = Path(__file__).parents[1]
  environment = os.environ | {'PYTHONPATH': f'{here}:{here.parent}'}
  run = lambda folder: subprocess.Popen(
    [sys.executable, program, str(size), tmp_path / folder], env=environment, process_group=0
  )
  assert run('whole').wait() == 0
  deaths = 0
  while True:
    process = run('killed')
    begun = len(list((tmp_path / 'killed').glob('edits-*')))
    while process.poll() is None and len(list((tmp_path / 'killed').glob('edits-*'))) < begun + 17:
      time.sleep(0.001)
    if process.poll() is not None:
      break
    process.kill()  # the parent alone
    process.wait()
    deaths += 1
    deadline = time.monotonic() + 10
    while alive(process.pid):
      assert time.monotonic() < deadline, 'a worker outlived its parent'
      time.sleep(0.01)
  assert process.returncode == 0 and deaths > 1
  assert files(tmp_path / 'whole') == files(tmp_path / 'killed')


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks at processes in /proc')
def test_ctrl_c_while_workers_start_is_no_traceback(tmp_path):
  tiny_pairs.write_metadata(tmp_path / 'set', 20)
  argv = [sys.executable, '-m', 'ip2p_jax.cli', 'pack', 'set', 'out', '--workers', '2']
  signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
  process = subprocess.Popen(
    argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0,
    env=os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])},
  )  # fmt: skip
  while not commands(process.pid) and process.poll() is None:
    time.sleep(0.01)
  os.killpg(process.pid, signal.SIGINT)
  assert (process.communicate(timeout=60)[1], process.returncode) == ('ip2p: stopped\n', 130)


def commands(group: int) -> list[str]:
  """Command lines of a group's workers."""
  lines = []
  for file in Path('/proc').glob('[0-9]*/cmdline'):
    with contextlib.suppress(OSError):
      if os.getpgid(int(file.parent.name)) == group and 'spawn_main' in (text := file.read_text()):
        lines.append(text)
  return lines


def alive(group: int) -> bool:
  """Whether a process of the group runs. Zombies do not count."""
  for stat in Path('/proc').glob('[0-9]*/stat'):
    try:
      state, _, pgrp = stat.read_text().rpartition(')')[2].split()[:3]
    except OSError:
      continue
    if int(pgrp) == group and state != 'Z':
      return True
  return False
