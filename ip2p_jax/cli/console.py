"""What our commands have in common: one line for a mistake, and compiled programs that are kept."""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from ip2p_jax.errors import InputError

MISTAKE = 2  # exit status


@contextlib.contextmanager
def one_line(name: str, when_out_of_memory: str) -> Iterator[None]:
  """Turns what a user can mend into one line on stderr and exit status 2; shows our log there."""
  try:
    with _log_shown(name):
      yield
    return
  except InputError as error:
    complain(name, f'error: {error}')
  except OSError as error:  # no space, no permission, a name too long, a file in the way
    complain(name, f'error: {error.filename or "the disk"}: {error.strerror or error}.')
  except Exception as error:
    if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    complain(name, f'error: out of memory; {when_out_of_memory}')
  sys.exit(MISTAKE)


@contextlib.contextmanager
def _log_shown(name: str) -> Iterator[None]:
  """Shows what our modules log, as lines on the first process's stderr."""
  ours, handler = logging.getLogger('ip2p_jax'), logging.Handler()

  def emit(record):
    kind = 'warning: ' if record.levelno >= logging.WARNING else ''
    if jax.process_index() == 0:
      complain(name, kind + record.getMessage())

  handler.emit, before = emit, (ours.level, ours.propagate)
  ours.addHandler(handler)
  ours.setLevel(logging.INFO)
  ours.propagate = False  # absl's handler would show it again
  try:
    yield
  finally:
    ours.removeHandler(handler)
    ours.level, ours.propagate = before


def complain(name: str, text: str) -> None:
  print(f'{name}: {" ".join(text.split())}', file=sys.stderr, flush=True)


def cache_compilations() -> None:
  """Keeps compiled programs on disk, so that the next start is fast."""
  if not jax.config.jax_compilation_cache_dir:
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'ip2p-jax'
    with contextlib.suppress(OSError):  # then we go without
      folder.mkdir(parents=True, exist_ok=True)
      jax.config.update('jax_compilation_cache_dir', str(folder))
      _drop_damaged(folder)


def _drop_damaged(folder: Path) -> None:
  """Removes from a cache what jax cannot read, so that it is written anew.

  jax writes its files in place, so a kill or a full disk leaves part of one, and never writes over.
  """
  show = warnings.showwarning

  def shown(message, *rest):
    if found := re.match(r"Error reading persistent compilation cache.*'([\w<>]+)'", str(message)):
      for file in folder.glob(f'{found[1]}-*'):
        file.unlink(missing_ok=True)
    show(message, *rest)

  warnings.showwarning = shown
