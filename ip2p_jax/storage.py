"""Files that lie in a local folder or in a bucket (gs://bucket/folder)."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from ip2p_jax.errors import InputError


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


def write_bytes(file: epath.Path, content: bytes) -> None:
  """Writes it at once or not at all."""
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(f'.{file.name}.tmp')
  temporary.write_bytes(content)
  temporary.replace(file)


def write_json(file: epath.Path, value: Any) -> None:
  """Writes it at once or not at all."""
  write_bytes(file, (json.dumps(value, indent=2) + '\n').encode())


def read_json(file: epath.Path) -> Any:
  """What `write_json` wrote; InputError naming the file if it is damaged."""
  try:
    return json.loads(file.read_text())
  except ValueError as error:
    raise InputError(f'{file}: not valid JSON ({error}).') from None


@contextlib.contextmanager
def sent(file: epath.Path) -> Iterator[Path]:
  """A local name to write to, from where the file is then sent to its place."""
  if is_local(file):
    yield Path(file)
    return
  with tempfile.TemporaryDirectory() as local:
    yield Path(local, file.name)
    epath.Path(local, file.name).copy(file, overwrite=True)


@contextlib.contextmanager
def fetched(file: epath.Path) -> Iterator[Path]:
  """A local name to read from. What is memory-mapped stays readable when the name is gone."""
  if is_local(file):
    yield Path(file)
    return
  with tempfile.TemporaryDirectory() as local:
    file.copy(epath.Path(local, file.name))
    yield Path(local, file.name)
