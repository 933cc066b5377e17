"""What our commands have in common: one line for a mistake, and compiled programs kept on disk."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from ip2p_jax.errors import InputError

MISTAKE, INTERRUPTED = 2, 130  # exit statuses


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


@contextlib.contextmanager
def ticking(name: str, every: float = 30.0) -> Iterator[None]:
  """Tells on stderr, from time to time, how long something has taken that cannot tell itself."""
  done, began = threading.Event(), time.monotonic()

  def tell():
    while not done.wait(every):
      print(f'{name}, {(time.monotonic() - began) / 60:.1f} min', file=sys.stderr, flush=True)

  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()
