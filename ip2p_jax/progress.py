"""What takes long says so, and how far it is."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from ip2p_jax import xla_alarms

Progress = Callable[[int, int], None]  # called with (what is done, what there is in all)


def unwatched(done: int, total: int) -> None:
  """The progress of a job that nobody watches."""


def part_of(progress: Progress | None, done: int, parts: int) -> Progress | None:
  """Progress over several runs as one; `done` of the `parts` are over."""
  if progress is None:
    return None
  return lambda step, steps: progress(done * steps + step, parts * steps)


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

  with xla_alarms.diverted() as screen:
    teller = threading.Thread(target=tell, args=(screen,), daemon=True)
    if not is_quiet:
      teller.start()
    try:
      yield
    finally:
      done.set()
      if not is_quiet:
        teller.join()
