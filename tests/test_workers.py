"""Workers that start at once in one new folder, and files that several write at once."""

import collections
import errno
import os
import subprocess
import sys
import threading
import time
import types

import pytest

from ip2p_jax import storage
from ip2p_jax.captions import write
from ip2p_jax.captions.judge import Writing
from ip2p_jax.captions.read import Caption
from ip2p_jax.data import shard_writing, shards
from ip2p_jax.errors import InputError
from ip2p_jax.pairs import pair_files

WORKERS = 4


def together(begin):
  """Calls `begin(i)` in WORKERS threads at once: counts of 'accepted' and of names of errors."""
  barrier, outcomes = threading.Barrier(WORKERS), []

  def work(i):
    barrier.wait()
    try:
      begin(i)
      outcomes.append('accepted')
    except Exception as error:
      outcomes.append(type(error).__name__)

  threads = [threading.Thread(target=work, args=(i,)) for i in range(WORKERS)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return collections.Counter(outcomes)


def begin_pairs(folder, run, i):
  settings = {'seed': run, 'prompts': 'a', 'samples': 1}
  with pair_files.working(storage.folder(folder), settings, [], (i, WORKERS)):
    pass


def begin_captions(folder, run, i):
  caption = Caption(0, 'a cat')
  complete = lambda texts, seeds: ((i, '') for i in range(len(texts)))
  writing = Writing(seed=run, attempts=1)
  write.write_all([caption], folder, complete, writing, {'model': 'm'}, (i, WORKERS))


def plan_of_pack(run):
  split = {'rows': 4, 'shards': 1, 'sample': [None]}
  plan = {'format': shards.FORMAT, 'kind': 'images', 'splits': {'train': split}}
  return plan | {'settings': {'size': run, 'quality': 95, 'has_input': True}}


def begin_pack(folder, run, i):
  with shard_writing.working(folder, plan_of_pack(run), f'{i}/{WORKERS}', 0):
    pass


@pytest.mark.parametrize('begin', [begin_pairs, begin_captions, begin_pack])
def test_exactly_one_of_concurrent_runs_is_accepted(begin, tmp_path):
  for trial in range(100):
    same, mixed = tmp_path / f'same-{trial}', tmp_path / f'mixed-{trial}'
    assert together(lambda i, here=same: begin(here, 1, i)) == {'accepted': WORKERS}
    outcomes = together(lambda i, here=mixed: begin(here, i % 2 + 1, i))
    assert outcomes == {'accepted': WORKERS // 2, 'InputError': WORKERS // 2}


def test_one_of_concurrent_runs_with_different_prompts_is_accepted(tmp_path):
  done = threading.Barrier(WORKERS)

  def begin(folder, run, i):
    settings = {'seed': 0, 'prompts': run, 'samples': 1}
    try:
      with pair_files.working(storage.folder(folder), settings, [], (i, WORKERS)):
        done.wait()  # all run until the last one is accepted or refused
    except InputError:
      done.wait()
      raise

  for trial in range(50):
    outcomes = together(lambda i, trial=trial: begin(tmp_path / str(trial), i % 2, i))
    assert outcomes == {'accepted': WORKERS // 2, 'InputError': WORKERS // 2}


# A process that claims many files, each at a set time, and prints their contents.
CLAIMS = """
import pathlib, sys, time
from ip2p_jax import storage
folder, own = sys.argv[1:]
print('ready', flush=True)
begins = float(sys.stdin.readline())
for trial in range(150):
  while time.time() < begins + trial * 0.01:
    pass
  print(storage.claim(storage.folder(folder) / f'{trial}.json', own))
"""


def test_exactly_one_of_concurrent_claims_wins(tmp_path):
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', CLAIMS, tmp_path, str(own)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )
    for own in range(3)
  ]  # fmt: skip
  assert all(process.stdout.readline() == 'ready\n' for process in processes)
  begins = f'{time.time() + 0.2}\n'
  for process in processes:
    process.stdin.write(begins)
    process.stdin.flush()
  claims = [process.communicate()[0].split() for process in processes]
  assert len(claims[0]) == 150
  assert all(len(set(of_file)) == 1 for of_file in zip(*claims, strict=True))
  assert {file.suffix for file in tmp_path.iterdir()} == {'.json'}


def test_without_hard_links_exactly_one_claim_wins(tmp_path, monkeypatch):
  def link(source, target):
    raise OSError(errno.EPERM, 'no hard links here')

  monkeypatch.setattr(os, 'link', link)
  for trial in range(100):
    file, claims = storage.folder(tmp_path) / f'{trial}.json', []
    assert together(lambda i, file=file, claims=claims: claims.append(storage.claim(file, i))) == {
      'accepted': WORKERS
    }
    assert len(set(claims)) == 1


def test_a_bucket_lets_one_writer_win():
  class File:
    parent = types.SimpleNamespace(mkdir=lambda **_: None)

    def __str__(self):
      return f'memory://bucket/{os.getpid()}.json'

  storage.create(File(), b'1')
  with pytest.raises(FileExistsError):
    storage.create(File(), b'2')


def test_many_may_write_one_file_without_leftovers(tmp_path):
  file = storage.folder(tmp_path) / 'some'
  for _ in range(50):
    assert together(lambda i: storage.write_bytes(file, bytes([i]) * 9999)) == {'accepted': WORKERS}
    content = file.read_bytes()
    assert len(content) == 9999 and len(set(content)) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['some']


def test_a_lock_excludes_others(tmp_path):
  file = storage.folder(tmp_path) / '.lock'
  with storage.locked(file, 'mine'):
    assert storage.is_locked(file)
    with pytest.raises(InputError, match='mine'), storage.locked(file, 'mine'):
      pass
  assert not storage.is_locked(file) and not file.exists()
  held = []

  def work(i):
    with storage.locked(file, '', waits=True):
      held.append(i)
      assert len(held) == 1
      held.remove(i)

  for _ in range(50):
    assert together(work) == {'accepted': WORKERS}


def test_a_worker_runs_once_and_all_have_one_n(tmp_path):
  settings, folder = {'prompts': 'a', 'samples': 1}, storage.folder(tmp_path)
  with pair_files.working(folder, settings, [], (0, 2)):
    for shard, message in (
      ((0, 2), 'another process is at work on shard 0/2'),
      ((1, 3), 'the same n'),
    ):
      with pytest.raises(InputError, match=message):
        pair_files.working(folder, settings, [], shard).__enter__()
    with (
      pair_files.working(folder, settings, [], (1, 2)),
      pytest.raises(InputError, match='the same n'),
    ):
      pair_files.working(folder, settings | {'samples': 2}, [], (0, 1)).__enter__()
  with pair_files.working(folder, settings | {'samples': 2}, [], (0, 1)):
    pass  # after the others have ended
  with pytest.raises(InputError, match='has 2 samples of each prompt, and --samples is 1'):
    pair_files.working(folder, settings, [], (0, 1)).__enter__()


def test_only_one_process_packs_a_part(tmp_path):
  pack = lambda part: shard_writing.working(tmp_path, plan_of_pack(1), part, 0)
  with pack('0/2') as job:
    half = tmp_path / shards.PROGRESS / f'{job.mine[0].file}.1234.tmp'
    half.write_bytes(b'half')
    for part, message in (
      ('0/2', 'another process is at work on shard 0/2'),
      ('0/1', 'the same n'),
    ):
      with pytest.raises(InputError, match=message):
        pack(part).__enter__()
    with pack('1/2'):
      pass
    assert half.exists()
  with pack('0/1'):  # after it has ended, its half-written file is deleted
    assert not half.exists()
  assert {file.name for file in tmp_path.iterdir()} == {shards.PLAN, shards.PROGRESS}


# Begins to pack, prints 'ready', and waits to be killed.
PACKS = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_workers
from ip2p_jax.data import shard_writing
with shard_writing.working(sys.argv[1], test_workers.plan_of_pack(1), '0/1', 0):
  print('ready', flush=True)
  time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
  command = [sys.executable, '-c', PACKS, tmp_path, os.path.dirname(__file__)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == 'ready\n'
    with pytest.raises(InputError, match='another process is at work'):
      begin_pack_alone(tmp_path)
    process.kill()
  assert (tmp_path / '.worker-00000-of-00001.lock').exists()
  begin_pack_alone(tmp_path)


def begin_pack_alone(folder):
  with shard_writing.working(folder, plan_of_pack(1), '0/1', 0):
    pass
