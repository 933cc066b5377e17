"""Progress of long jobs, and notes on stderr while something takes long."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from ip2p_jax import xla_alarms

Progress = Callable[[int, int], None]  # called with (done, total)


def unwatched(done: int, total: int) -> None:
  """The progress of a job that nobody watches."""


def part_of(progress: Progress | None, done: int, parts: int) -> Progress | None:
  """The progress of one run in a job of `parts` runs, of which `done` have ended."""
  if progress is None:
    return None
  return lambda step, steps: progress(done * steps + step, parts * steps)


@contextlib.contextmanager
def waiting(what: str, is_quiet: bool = False, after: float = 2.0) -> Iterator[None]:
  """Prints `what` on stderr after `after` seconds: with a clock, or once in a log file.

  XLA's advice to file a bug is not shown; all other output is.

  Args:
    what: as in 'compiling, about a minute'.
    is_quiet: prints nothing; for all processes but one.
  """
  done, began = threading.Event(), time.monotonic()

  def show(screen):
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

  with xla_alarms.diverted() as screen:
    thread = threading.Thread(target=show, args=(screen,), daemon=True)
    if not is_quiet:
      thread.start()
    try:
      yield
    finally:
      done.set()
      if not is_quiet:
        thread.join()
