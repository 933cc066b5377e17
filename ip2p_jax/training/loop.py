"""The loop of every training run, its progress messages, and its signals."""

import collections
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ip2p_jax import sharding
from ip2p_jax.errors import InputError
from ip2p_jax.interrupts import INTERRUPTED, interruptible
from ip2p_jax.pipeline.checkpoints import Checkpoints
from ip2p_jax.progress import waiting
from ip2p_jax.training import logs
from ip2p_jax.training.loss_course import Course, advice, followed, mean_loss
from ip2p_jax.training.step import State

IN_FLIGHT = 2  # steps that the host may be ahead; more take memory for batches, and gain nothing
STOPPED = 143  # exit status that tells a job manager to start the run again


class Job(NamedTuple):
  """The inputs of the loop.

  Attributes:
    config: anything with `steps` and `log`.
    step: (state, batch) -> (state, values), jitted; see `step.train_step`.
    batches: of the next steps; the loop closes them.
    shardings: of the state.
    save: (step, state, course) writes a checkpoint.
    must_stop: step -> whether to stop after it.
    look: (state, step) -> a sentence about the batch of the bad step, which follows `step`.
    check: (step, values) -> why the run cannot continue, or None; called after each log.
  """

  config: Any
  workdir: str
  step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
  batches: Generator
  shardings: State
  checkpoints: Checkpoints
  writer: logs.Writer
  meter: logs.Meter
  save: Callable[[int, State, Course], None]
  must_stop: Callable[[int], bool]
  look: Callable[[State, int], str] = lambda state, step: ''
  check: Callable[[int, dict[str, float]], str | None] = lambda step, values: None


# (step, state) -> more numbers to log for the step, or None.
Action = Callable[[int, State], dict[str, float] | None]


def loop(job: Job, actions: Sequence[tuple[int, Action]], state: State, course: Course) -> int:
  """Steps until `config.steps`, or until `must_stop`; returns the exit status, 0 or 143.

  Args:
    actions: (every so many steps, action), in this order; they also run after the last step. A run
      that is stopped is saved without them.
    state: is donated, except on a CPU.
    course: of the loss so far.
  """
  log, steps, first = job.config.log, job.config.steps, int(state['step'])
  recent, since_log, compiling = collections.deque(), [], first_time()
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(contextlib.closing(job.batches))
    profile = stack.enter_context(_profiler(log.profile, first, job.workdir, job.meter))
    for step in range(first + 1, steps + 1):  # `step` steps are done after this one
      profile(step, recent)
      batch = next(batches)  # first, since it may start processes
      with compiling('step'), _ended_by_signals(step == first + 1, job.must_stop):
        state, values = job.step(state, batch)  # dispatched, not awaited
        if step == first + 1:
          jax.block_until_ready(values)
          sharding.check_placed(state, job.shardings)
          job.meter.start(step)
      since_log.append(values)
      recent.append(values['loss'])
      if len(recent) > IN_FLIGHT:
        recent.popleft().block_until_ready()
      is_stopped, is_last = job.must_stop(step), step == steps
      is_saved = step % log.checkpoint_every == 0 or is_last or is_stopped
      due = [act for every, act in actions if not is_stopped and (step % every == 0 or is_last)]
      if step % log.every and not is_saved and not due:
        if step == first + 1:
          _say_progress(step, steps, _logged([jax.device_get(values)]), job.meter)
        continue

      values, course = _evaluate(job, step, jax.device_get(since_log), state, course)
      since_log.clear()
      values |= job.meter.read(step) | logs.memory()
      _say_progress(step, steps, values, job.meter if step == first + 1 else None)
      with job.meter.paused(state):
        if is_saved:
          job.save(step, state, course)
        try:
          for act in due:
            values |= act(step, state) or {}
        finally:
          job.writer.scalars(step, values)
        if is_saved or due:
          job.writer.curve()
      if problem := job.check(step, values):
        job.save(step, state, course)
        raise InputError(problem)
      if is_stopped and not is_last:
        job.checkpoints.wait()
        say(f'stopped at step {step:,}, and saved; run the same command to go on')
        return STOPPED
  job.checkpoints.wait()
  return 0


def _evaluate(job, step, since_log, state, course):
  """(values to log for the steps since the last log, course); raises after a bad step."""
  newest = since_log[-1]
  is_bad = newest['bad_step'] >= 0
  # The course of the loss ends before a bad step.
  fine = since_log[: newest['bad_step'] - step + len(since_log)] if is_bad else since_log
  course = followed(course, mean_loss(fine), job.checkpoints.latest_step())
  if is_bad:
    _stop_at_bad_step(job, int(newest['bad_step']), state, course)
  return _logged(since_log), course


def _stop_at_bad_step(job: Job, step: int, state: State, course: Course) -> None:
  """Stops a run at a loss that is not finite; the error says how to continue.

  The state is still that before the step. It is saved, so that the run repeats the step first when
  it is started again.
  """
  placement = state['bad_step'].sharding
  job.save(step, state | {'bad_step': jax.device_put(np.int32(-1), placement)}, course)
  sentence = job.look(state, step)
  raise InputError(
    f'step {step + 1}: the loss or a gradient is not finite.{sentence}'
    f' {advice(course, job.checkpoints.steps(), job.checkpoints.folder)}'
  )


def _logged(steps):
  """Numbers of the last step, with the mean loss of all steps; no loss if no example counted."""
  values = {name: float(x) for name, x in steps[-1].items() if name not in ('weight', 'bad_step')}
  counted = [step for step in steps if step['weight'] > 0]
  if not counted:
    return {name: x for name, x in values.items() if name not in ('loss', 'grad_norm')}
  return values | {'loss': mean_loss(counted), 'grad_norm': float(counted[-1]['grad_norm'])}


def _say_progress(step, steps, values, meter):
  """Says the progress; with `meter`, also how long the start took."""
  ready = f'  ready after {meter.age():.0f} s' if meter else ''
  say(logs.progress_line(step, steps, values) + ready)


def first_time() -> Callable[[str], contextlib.AbstractContextManager]:
  """`compiling(what)`: shows how long the first call takes, and nothing later."""
  seen = set()

  def compiling(what):
    if what in seen:
      return contextlib.nullcontext()
    seen.add(what)
    return waiting(f'compiling the {what}, about a minute', is_quiet=jax.process_index() > 0)

  return compiling


@contextlib.contextmanager
def _ended_by_signals(is_first: bool, must_stop: Callable[[int], bool]) -> Iterator[None]:
  """Lets signals end the process during the first step, which compiles; nothing is to be saved."""
  if not is_first:
    yield
    return

  end, handled = before_the_first_step, (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, end) for n in handled if callable(signal.getsignal(n))}
  try:
    if jax.process_count() == 1 and must_stop(0):  # a signal came since the run began
      end(signal.SIGTERM)
    with interruptible(end):
      yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def before_the_first_step(number: int, _frame: FrameType | None = None) -> NoReturn:
  """Ends the process at a signal."""
  print('stopped before the first step; nothing is lost', file=sys.stderr, flush=True)
  os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[int], bool]]:
  """`must_stop(step)`: whether a signal or a preemption notice came; all processes agree."""
  if jax.process_count() > 1:  # jax.distributed listens, and all processes agree on a step
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []

  def note(number, _frame):
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(number)
    print('stopping after this step to save (press Ctrl-C again to stop now)', file=sys.stderr)

  before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield lambda step: bool(received)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


@contextlib.contextmanager
def _profiler(window, first, workdir, meter) -> Iterator[Callable]:
  """`profile(step, pending)` runs before each step; records the window's steps, once in a run."""
  start, count = window
  begin = max(start, first + 2)  # the first step compiles
  is_due, is_on = count and first < start + count, []

  def stop():
    if is_on:
      is_on.clear()
      jax.profiler.stop_trace()

  def profile(step, pending):
    if is_due and step in (begin, begin + count):
      with meter.paused(list(pending)):
        if step == begin:
          jax.profiler.start_trace(str(epath.Path(workdir) / 'profile'))
          is_on.append(True)
        else:
          stop()

  try:
    yield profile
  finally:
    stop()
