"""What our commands have in common: one line for a mistake, a clock, compiled programs kept."""

import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import jax
from PIL import Image
from tqdm import tqdm

from ip2p_jax import xla_alarms
from ip2p_jax.errors import InputError
from ip2p_jax.images import save

MISTAKE, INTERRUPTED = 2, 130  # exit statuses
MAX_TEXT = 10_000  # characters; more would not fit into the metadata of a JPEG


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


@contextlib.contextmanager
def waiting(what: str, is_quiet: bool = False, after: float = 2.0) -> Iterator[None]:
  """Says on stderr what takes longer than `after` seconds: with a clock, or once in a log file.

  Keeps XLA's advice to file a bug about it from the screen; all else that is written there, stays.

  Args:
    what: as in 'compiling, about a minute'.
    is_quiet: says nothing; for all processes but one.
  """
  done, began = threading.Event(), time.monotonic()

  def tell(screen):
    text = ''
    if done.wait(after):
      return
    if not screen.isatty():
      print(what, file=screen, flush=True)
      return
    while True:
      text = f'{what}: {time.monotonic() - began:.0f} s'
      print(f'\r{text}', end='', file=screen, flush=True)
      if done.wait(1):
        break
    print(f'\r{" " * len(text)}\r', end='', file=screen, flush=True)

  with _without_alarms() as screen:
    teller = threading.Thread(target=tell, args=(screen,), daemon=True)
    if not is_quiet:
      teller.start()
    try:
      yield
    finally:
      done.set()
      if not is_quiet:
        teller.join()


@contextlib.contextmanager
def _without_alarms() -> Iterator[TextIO]:
  """Lets what this process writes to stderr, in Python or not, run through `xla_alarms`.

  Gives what writes past it.
  """
  sys.stderr.flush()
  try:
    screen = os.fdopen(os.dup(2), 'w')
  except OSError:  # closed
    yield sys.stderr
    return
  with screen:
    # In a session of its own, since Ctrl-C is for us.
    command = [sys.executable, '-I', '-S', xla_alarms.__file__]
    copying = subprocess.Popen(
      command, stdin=subprocess.PIPE, stderr=screen, start_new_session=True
    )
    os.dup2(copying.stdin.fileno(), 2)
    copying.stdin.close()
    try:
      yield screen
    finally:
      sys.stderr.flush()
      os.dup2(screen.fileno(), 2)
      # A child of ours that was started meanwhile may still write to it.
      with contextlib.suppress(subprocess.TimeoutExpired):
        copying.wait(timeout=5)


def say(text: str) -> None:
  """A line on stdout, above a progress bar if there is one."""
  tqdm.write(text)


def save_image(image: Image.Image, path: Path, settings: dict) -> None:
  """Writes an image with the settings that made it, and says so."""
  save(image, path, settings)
  say(f'wrote {path}')


@contextlib.contextmanager
def progress_bar(unit: str, compiles: bool = False) -> Iterator[Callable[[int, int], None] | None]:
  """Counts steps, or rows, on a terminal; None where nobody is looking.

  `compiles`: whether the first of them waits for the compiler, and is to say so.
  """
  is_watched = sys.stderr.isatty()
  with contextlib.ExitStack() as stack:
    starting = stack.enter_context(contextlib.ExitStack())
    if compiles:
      starting.enter_context(waiting(f'compiling, about a minute, then the first {unit}'))
    if not is_watched:
      yield None
      return
    bars = []

    def count(done, total):
      if not bars:
        starting.close()
        bars.append(stack.enter_context(tqdm(unit=unit, dynamic_ncols=True)))
      bars[0].total = total
      bars[0].update(done - bars[0].n)

    yield count
