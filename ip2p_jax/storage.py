"""Files in a local folder or in a bucket (gs://bucket/folder).

Any number of processes, on any number of machines, may write to one folder. A file appears whole or
not at all, no two writers share a temporary name, and only one process can `claim` a file.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import fsspec
from etils import epath

from ip2p_jax.errors import InputError

CLAIM_WAIT = 5.0  # seconds to wait for the content of a claimed file
# A file in each folder of pairs that `ip2p filter` wrote.
FILTERED = 'filter.json'
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a disk without locks


def folder(path: str | os.PathLike) -> epath.Path:
  """An absolute path; InputError for a bucket whose library is not installed."""
  if is_local(path):
    return epath.Path(os.path.abspath(os.path.expanduser(path)))
  try:
    epath.Path(path).exists()
  except ImportError as error:  # 'Please install gcsfs ...'
    raise InputError(f'{path}: {error}.') from None
  return epath.Path(path)


def is_local(path: str | os.PathLike) -> bool:
  return '://' not in str(path)


def local_folder(path: str | os.PathLike) -> Path:
  """An absolute path of this machine; InputError for a bucket, or no name."""
  return Path(folder(local_path(path)))


def local_path(path: str | os.PathLike) -> str:
  """A path of this machine; InputError for a bucket, or no name."""
  if not str(path) or not is_local(path):
    raise InputError(f'{str(path)!r}: give a path of this machine, not of a bucket.')
  return str(path)


def write_bytes(file: epath.Path, content: bytes) -> None:
  """Writes the whole file or nothing. If several write at the same time, the last one wins."""
  file.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(file):
    file.write_bytes(content)  # a bucket shows no part of a file
    return
  with replacing(Path(file)) as temporary:
    temporary.write_bytes(content)


def write_json(file: epath.Path, value: Any) -> None:
  """Writes the whole file or nothing."""
  write_bytes(file, (json.dumps(value, indent=2) + '\n').encode())


def read_json(file: epath.Path | Path, kind: type = object) -> Any:
  """The value in a JSON file; InputError if the file is missing, damaged or holds no `kind`."""
  try:
    value = json.loads(file.read_bytes())
  except FileNotFoundError:
    raise InputError(f'{file}: no such file.') from None
  except OSError as error:
    raise InputError(f'{file}: cannot be read ({error.strerror or error}).') from None
  except (ValueError, RecursionError) as error:
    raise InputError(f'{file}: not valid JSON ({error}).') from None
  if not isinstance(value, kind):
    wanted = 'object' if kind is dict else kind.__name__
    raise InputError(f'{file}: holds a JSON {type(value).__name__} where an {wanted} is expected.')
  return value


def create(file: epath.Path, content: bytes) -> None:
  """Writes a new file, whole; FileExistsError if it exists. One of several writers succeeds.

  This holds between threads, processes and machines. It uses a hard link. Disks without hard links
  use exclusive creation: a reader may then see an empty file. In a bucket the store decides
  (fsspec's mode 'create'): on Google's and Amazon's one writer wins; on others two may.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(file):
    try:
      system, name = fsspec.core.url_to_fs(str(file))
    except ImportError as error:
      raise InputError(f'{file}: {error}.') from None
    system.pipe_file(name, content, mode='create')
    return
  with temporary_name(file) as temporary:
    temporary.write_bytes(content)
    try:
      os.link(temporary, file)
    except FileExistsError:
      raise
    except OSError:
      with open(file, 'xb') as opened:
        opened.write(content)


def claim(file: epath.Path, value: Any) -> Any:
  """The value of the first process that claimed this file, as JSON has it.

  A process that gets its own value back owns the file. As safe as `create`.
  """
  content = (json.dumps(value, indent=2) + '\n').encode()
  with contextlib.suppress(FileExistsError):
    create(file, content)
  until = time.monotonic() + CLAIM_WAIT
  while True:
    try:
      return read_json(file)
    except InputError:  # half written, on a disk without hard links; or damaged
      if time.monotonic() > until:
        raise
    time.sleep(0.05)


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Names of settings that differ, sorted; a missing setting counts as None."""
  return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


def refuse_existing(path: str | os.PathLike) -> NoReturn:
  """Raises InputError for a file or folder that exists and must not be overwritten."""
  raise InputError(
    f'{path}: already exists; choose another name, or add --overwrite (overwrite=True).'
  )


@contextlib.contextmanager
def one_writer(dst: str | os.PathLike, instead: str = 'choose another name') -> Iterator[None]:
  """Lets only one process write a file or folder; InputError if another process writes it.

  Deletes temporary files and folders (`temporary_name`) of killed processes.
  """
  place = Path(dst).resolve()  # the same for every name of the file
  busy = f'{dst}: another process writes it; wait for that, or {instead}.'
  is_leftover = re.compile(rf'\.{re.escape(place.name)}(\.[0-9a-f]{{16}})?\.tmp').fullmatch
  with locked(place.with_name(f'.{place.name}.lock'), busy):
    for file in place.parent.iterdir():
      if is_leftover(file.name):
        _remove(file)
    yield


@contextlib.contextmanager
def locked(file: epath.Path, message: str, waits: bool = False) -> Iterator[None]:
  """Holds the lock of a lock file; InputError(message) if another process holds it.

  The lock is the system's, and ends with the process. It holds between threads and processes, and
  between machines on disks that share locks (NFS). On other disks, and in buckets, there is no
  lock. With `waits`, it waits instead of raising.
  """
  if not is_local(file):
    yield
    return
  file.parent.mkdir(parents=True, exist_ok=True)
  opened = _lock(file, waits)
  if opened is None:
    raise InputError(message)
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      os.unlink(file)  # while the lock is held, so that no other lock file is removed
    os.close(opened)


@contextlib.contextmanager
def at_work(
  folder: epath.Path, shard: tuple[int, int], what: str, begin: Callable[[bool], Any]
) -> Iterator[Any]:
  """Registers worker i of n in this folder until the end; yields the result of `begin`.

  Args:
    shard: (i, n); all workers that run at the same time must have the same n.
    what: the work that the workers share, for messages.
    begin: called with whether other workers run, while no other worker begins.

  InputError if worker i runs already, or workers with another n do (on disks with locks; see
  `locked`).
  """
  own = folder / f'.worker-{shard[0]:05d}-of-{shard[1]:05d}.lock'
  taken = (
    f'{folder}: another process is at work on shard {shard[0]}/{shard[1]} here; wait for it, or'
    ' give another --shard.'
  )
  with contextlib.ExitStack() as stack:
    with locked(folder / '.lock', '', waits=True):
      stack.enter_context(locked(own, taken))
      others = {
        file.name for file in folder.glob('.worker-*.lock') if file != own and is_locked(file)
      }
      if any(not name.endswith(f'-of-{shard[1]:05d}.lock') for name in others):
        raise InputError(
          f'{folder}: other workers here split the {what} by another number than {shard[1]};'
          ' give the same n in --shard i/n, or wait until they are done.'
        )
      result = begin(bool(others))
    yield result


def is_locked(file: epath.Path) -> bool:
  """Whether a process holds the lock. Deletes the lock file of a dead process."""
  try:
    with locked(file, ''):
      return False
  except InputError:
    return True


def _lock(file, waits) -> int | None:
  """The descriptor of the locked file; None if another process holds the lock."""
  while True:
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
      os.close(opened)
      return None
    except OSError as error:
      if error.errno not in NO_LOCKS:
        os.close(opened)
        raise
      return opened
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.stat(file), os.fstat(opened)):
        return opened
    os.close(opened)  # the last holder removed the file, so this is no lock; try again


@contextlib.contextmanager
def temporary_name(file: epath.Path | Path) -> Iterator[epath.Path | Path]:
  """A unique name beside a file or folder; deleted at the end with its content."""
  temporary = file.with_name(f'.{file.name}.{os.urandom(8).hex()}.tmp')
  try:
    yield temporary
  finally:
    _remove(temporary)


def _remove(path):
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A temporary name beside `path` that replaces it at the end, and is deleted on any error.

  For a file or a folder. If several processes do so at the same time, the last one wins.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with temporary_name(path) as temporary:
    yield temporary
    if temporary.is_dir():
      _replace_folder(temporary, path)
    else:
      os.replace(temporary, path)


def _replace_folder(new, path):
  # A folder cannot be replaced in one step: the old one is renamed, and comes back on an error.
  while True:
    with temporary_name(path) as old:
      with contextlib.suppress(FileNotFoundError):
        os.rename(path, old)
      try:
        os.rename(new, path)
        return
      except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
          continue  # another process wrote the folder meanwhile
        if old.exists():
          os.rename(old, path)
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """A hidden folder beside `folder` to fill and then rename; deleted at the end if it still exists.

  InputError if `folder` exists, or if another process writes it.
  """
  with one_writer(folder):
    if folder.exists():
      raise InputError(f'{folder} exists; give a new folder, or delete it.')
    place = folder.with_name(f'.{folder.name}.tmp')
    place.mkdir(parents=True)
    try:
      yield place
    finally:
      shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def sent(file: epath.Path) -> Iterator[Path]:
  """A local name to write to; at the end the file is copied to its place."""
  if is_local(file):
    yield Path(file)
    return
  with tempfile.TemporaryDirectory() as local:
    yield Path(local, file.name)
    epath.Path(local, file.name).copy(file, overwrite=True)


@contextlib.contextmanager
def fetched(file: epath.Path) -> Iterator[Path]:
  """A local name to read from. A memory-mapped file stays readable after the name is deleted."""
  if is_local(file):
    yield Path(file)
    return
  with tempfile.TemporaryDirectory() as local:
    file.copy(epath.Path(local, file.name))
    yield Path(local, file.name)
