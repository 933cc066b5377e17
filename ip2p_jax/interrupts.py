"""Ctrl-C while XLA compiles, when Python does not handle signals; and while processes start."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

INTERRUPTED = 130  # exit status
UNHEARD = 1.0  # seconds until a signal counts as not handled


@contextlib.contextmanager
def interruptible(end: Callable[[int], None]) -> Iterator[None]:
  """Calls `end(number)`, in another thread, at a SIGINT or SIGTERM that Python does not handle.

  Python's handlers run in the main thread, between two operations of Python. So they do not run
  while XLA compiles there, which may take minutes. `end` ends the process: a file that is being
  written then has a temporary name. Signals without a handler in Python do not change.
  """
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
  done, heard_at = threading.Event(), [-math.inf]

  def handle(number, frame):
    if _must_end_first(frame):
      main = threading.main_thread().ident
      threading.Timer(0.05, signal.pthread_kill, [main, number]).start()  # when that is over
      return
    heard_at[0] = time.monotonic()
    handlers[number](number, frame)

  def listen():
    while numbers := [number for number in os.read(reading, 64) if number in handlers]:
      if done.wait(UNHEARD):
        return
      # Python handles one of several signals that come together, maybe before this reads them all.
      if time.monotonic() - heard_at[0] > 2 * UNHEARD:
        end(numbers[0])

  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  for number in handlers:
    signal.signal(number, handle)
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(before)
    done.set()
    os.close(writing)
    listener.join()
    os.close(reading)


@contextlib.contextmanager
def unheard_by_children(*numbers: int) -> Iterator[None]:
  """Processes that this thread starts inside do not get these signals.

  Ctrl-C reaches all processes of a terminal. A child that still imports would end with a traceback;
  it can ignore signals itself only later. Signals wait until this thread leaves, or go to another.
  """
  resource_tracker.ensure_running()  # its start inside would let signals through
  before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _must_end_first(frame: FrameType | None) -> bool:
  """Whether an exception would do harm now.

  Python drops exceptions in jax's callback of the garbage collector. jaxlib crashes if its import
  is interrupted.
  """
  while frame is not None:
    code = frame.f_code
    if code.co_name == '_xla_gc_callback' or code.co_filename.startswith('<frozen importlib'):
      return True
    frame = frame.f_back
  return False
