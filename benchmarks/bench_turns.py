"""Contenders of a benchmark, each in a process of its own: own memory, own threads, own start."""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPAWN = multiprocessing.get_context('spawn')


class Failed(Exception):
  """A contender raised, died, or ran out of time; says so in a line."""


class Contender:
  """What `make(*args)` gives, in another process; its methods are asked for by name."""

  def __init__(self, make: Callable[..., Any], *args: Any, threads: int | None, limit: float):
    """It runs on so many cores (None: on all); `limit` is for one answer, in seconds."""
    self.limit = limit
    self.pipe, theirs = SPAWN.Pipe()
    self.process = SPAWN.Process(target=_serve, args=(theirs, make, args, threads), daemon=True)
    self.process.start()
    theirs.close()

  def ask(self, method: str, *args: Any) -> Any:
    """What the method returns; Failed if there is no answer."""
    try:
      self.pipe.send((method, args))
      if not self.pipe.poll(self.limit):
        raise Failed(f'{method} took longer than {self.limit:.0f} s')
      went_well, answer = self.pipe.recv()
    except (EOFError, OSError):
      raise Failed('the process died; was there enough memory?') from None
    if not went_well:
      print(answer, file=sys.stderr)
      raise Failed(answer.strip().splitlines()[-1])
    return answer

  def stop(self) -> None:
    self.process.kill()
    self.process.join()


def _serve(pipe, make, args, threads):
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  warnings.simplefilter('ignore', FutureWarning)
  if threads:
    os.environ['OMP_NUM_THREADS'] = str(threads)
    if hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  try:
    contender = make(*args)
    while True:
      method, arguments = pipe.recv()
      pipe.send((True, getattr(contender, method)(*arguments)))
  except EOFError:
    pass
  except Exception:
    pipe.send((False, traceback.format_exc()))


def whole(text: str) -> int:
  """An argument of 1 or more."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is no whole number of 1 or more')
  return int(text)


def results(text: str) -> Path:
  """A file that lines can be added to, told before hours are spent on them."""
  if Path(text).is_dir() or not os.access(Path(text).absolute().parent, os.W_OK):
    raise argparse.ArgumentTypeError(f'{text} cannot be written; name a file in a folder there is')
  return Path(text)


def say(line: str) -> None:
  """To stderr, since stdout is for the table."""
  print(f'[{time.strftime("%H:%M:%S")}] {line}', file=sys.stderr, flush=True)


def peak_rss() -> int:
  """The most that this process has had in memory, in bytes."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> str:
  """Processor, cores and load, for the head of a table."""
  try:
    lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    model = next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
  except (OSError, StopIteration):
    model = platform.processor() or platform.machine()
  return f'{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}'
