"""The loop that every training run goes through, and what a run says and heeds."""

import collections
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ip2p_jax import checkpoints as workdirs
from ip2p_jax import metrics, sharding
from ip2p_jax.checkpoints import Checkpoints
from ip2p_jax.console import INTERRUPTED, interruptible, waiting
from ip2p_jax.errors import InputError
from ip2p_jax.loss_course import Course, advice, followed, mean_loss

IN_FLIGHT = 2  # steps that the host may be ahead; more only cost the memory of their batches
STOPPED = 143  # exit status, so that whoever watches the job knows to start it again

# Settings that leave the loss comparable with what it was before.
SAME_LOSS = (
  'optimizer.', 'log.', 'mesh.', 'checkpoint', 'steps', 'batch_size', 'accumulation', 'remat',
  'attention', 'dtype', 'seed',
)  # fmt: skip

State = dict[str, Any]


class Job(NamedTuple):
  """What is trained, as functions.

  Attributes:
    step: (state, batch) -> (state, values), jitted; see `train_step.train_step`.
    batches: of the steps to come; closed at the end.
    shardings: of the state.
    save: (step, state, course) -> None, writes a checkpoint.
    check: (values, state, course) -> None; raises after a step that was not finite.
    validate: ema -> validation loss, if there are examples; None where all of them are broken.
    preview: ema -> picture, if there is one.
    check_log: (step, values, state, course) -> None; may raise when all of a log is written.
  """

  step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
  batches: Generator
  shardings: State
  save: Callable[[int, State, Course], None]
  check: Callable[[dict[str, Any], State, Course], None]
  validate: Callable[[Any], float | None] | None = None
  preview: Callable[[Any], Any] | None = None
  check_log: Callable[[int, dict[str, float], State, Course], None] = lambda *_: None


def loop(
  job: Job,
  config: Any,
  state: State,
  workdir: str,
  manager: Checkpoints,
  writer: metrics.Writer,
  meter: metrics.Meter,
  must_stop: Callable[[int], bool],
  course: Course,
) -> int:
  """Steps until `config.steps`, or until `must_stop`; the exit status, 0 or 143.

  Args:
    config: anything with `steps` and `log`.
    state: is donated, but on a CPU.
    course: of the loss until here.
  """
  log, first, compiling = config.log, int(state['step']), _first_time()
  recent, since_log = collections.deque(), []
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(contextlib.closing(job.batches))
    profile = stack.enter_context(_profiler(log.profile, first, workdir, meter))
    for step in range(first + 1, config.steps + 1):  # steps are counted when taken
      profile(step, recent)
      batch = next(batches)  # first of all, since it may start processes
      with compiling('step'), _ended_by_signals(step == first + 1, must_stop):
        state, values = job.step(state, batch)  # dispatched, not awaited
        if step == first + 1:
          jax.block_until_ready(values)
          sharding.check_placed(state, job.shardings)
          meter.start(step)
      since_log.append(values)
      recent.append(values['loss'])
      if len(recent) > IN_FLIGHT:
        recent.popleft().block_until_ready()
      is_stopped, is_last = must_stop(step), step == config.steps
      is_checkpoint = step % log.checkpoint_every == 0 or is_last or is_stopped
      is_due = log.validate_every and (step % log.validate_every == 0 or is_last)
      is_validation = job.validate and is_due and not is_stopped
      if step % log.every and not is_checkpoint and not is_validation:
        if step == first + 1:
          _say_progress(step, config.steps, _logged([jax.device_get(values)]), meter)
        continue

      values, course = _looked_at(job, step, jax.device_get(since_log), state, course, manager)
      since_log.clear()
      values |= meter.read(step) | metrics.memory()
      _say_progress(step, config.steps, values, meter if step == first + 1 else None)
      with meter.paused(state):
        if is_checkpoint:
          job.save(step, state, course)
        if is_validation:
          with compiling('validation'):
            values |= _validated(job.validate(state['ema']))
        writer.scalars(step, values)
        if job.preview and is_checkpoint and not is_stopped:
          with compiling('previews'):
            picture = job.preview(state['ema'])
          writer.image(step, 'preview', picture)
        if is_checkpoint or is_validation:
          writer.curve()
      job.check_log(step, values, state, course)
      if is_stopped and not is_last:
        manager.wait()
        say(f'stopped at step {step:,}, and saved; run the same command to go on')
        return STOPPED
  manager.wait()
  return 0


def _looked_at(job, step, since_log, state, course, manager):
  """(what is logged of the steps since the last log, the course); raises after a bad step."""
  newest = since_log[-1]
  is_bad = newest['bad_step'] >= 0
  # A bad step, and those after it, say nothing of how the loss went.
  fine = since_log[: newest['bad_step'] - step + len(since_log)] if is_bad else since_log
  course = followed(course, mean_loss(fine), manager.latest_step())
  job.check(newest, state, course)
  return _logged(since_log), course


def _logged(steps):
  """Numbers of the last of some steps, but the mean loss of all; none of what no example has."""
  values = {name: float(x) for name, x in steps[-1].items() if name not in ('weight', 'bad_step')}
  counted = [step for step in steps if step['weight'] > 0]
  if not counted:
    return {name: x for name, x in values.items() if name not in ('loss', 'grad_norm')}
  return values | {'loss': mean_loss(counted), 'grad_norm': float(counted[-1]['grad_norm'])}


def _say_progress(step, steps, values, meter):
  """With `meter`, also when the run was ready."""
  ready = f'  ready after {meter.age():.0f} s' if meter else ''
  say(metrics.progress_line(step, steps, values) + ready)


def _validated(loss):
  if loss is None:
    say('no validation loss: every example is broken')
    return {}
  say(f'validation loss {metrics.shown_loss(loss)}')
  return {'validation_loss': loss}


def _first_time() -> Callable[[str], contextlib.AbstractContextManager]:
  """`compiling(what)`: tells how long it takes, the first time."""
  seen = set()

  def compiling(what):
    if what in seen:
      return contextlib.nullcontext()
    seen.add(what)
    return waiting(f'compiling the {what}, about a minute', is_quiet=jax.process_index() > 0)

  return compiling


@contextlib.contextmanager
def _ended_by_signals(is_first: bool, must_stop: Callable[[int], bool]) -> Iterator[None]:
  """Lets signals end the process within the first step, which compiles: nothing is to be saved."""
  if not is_first:
    yield
    return

  def end(number, _frame=None):
    print('stopped before the first step; nothing is lost', file=sys.stderr, flush=True)
    os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)

  ours = [n for n in (signal.SIGTERM, signal.SIGINT) if callable(signal.getsignal(n))]
  before = {number: signal.signal(number, end) for number in ours}
  try:
    if jax.process_count() == 1 and must_stop(0):  # one came since the run began
      end(signal.SIGTERM)
    with interruptible(end):
      yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def stop_if_bad(
  values: dict[str, Any],
  state: State,
  course: Course,
  save: Callable[[int, State, Course], None],
  manager: Checkpoints,
  look: Callable[[int], str] = lambda step: '',
) -> None:
  """Stops a run at a loss that is not finite, and says how it goes on.

  The state is still that before the step; it becomes a checkpoint, so that the run, started again,
  takes that very step first.

  Args:
    values: of a step.
    save: as of a `Job`.
    look: gives a sentence of what was found at the step after so many; called last.

  Raises InputError.
  """
  step = int(values['bad_step'])
  if step < 0:
    return
  where = state['bad_step'].sharding
  save(step, state | {'bad_step': jax.device_put(np.int32(-1), where)}, course)
  found = look(step)
  raise InputError(
    f'step {step + 1}: the loss or a gradient is not finite.{found}'
    f' {advice(course, manager.steps(), manager.folder)}'
  )


def course_of(extras: dict[str, Any], config: Any) -> Course:
  """How the loss went before a checkpoint with these extras; unknown if it was another loss.

  Says so if it had grown.
  """
  lines = workdirs.differences(extras.get('config', {}), dataclasses.asdict(config))
  if 'course' not in extras or not all(line.startswith(SAME_LOSS) for line in lines):
    return Course()
  course = Course(**extras['course'])
  if course.is_grown:
    good = '' if course.good is None else f'; after step {course.good:,} it was as before'
    say(f'the loss had grown from {course.mean:.4g} to {course.last:.4g} at this checkpoint{good}')
  return course


def keep_config(config: Any, workdir: str, step: int) -> None:
  """Writes config.json; says what differs if the run was begun with another, and what is short.

  InputError for steps to profile that are new and past.
  """
  new = dataclasses.asdict(config)
  lines = workdirs.differences(workdirs.read_config(workdir) or new, new)
  first, count = config.log.profile
  if count and first + count <= step + 1 and any(line.startswith('log.profile') for line in lines):
    raise InputError(
      f'log.profile is {config.log.profile}, and this run is at step {step:,} already; name later'
      ' steps, or leave it as it was.'
    )
  for line in lines:
    say(f'changed since the last start: {line}')
  if config.optimizer.warmup_steps > config.steps:
    say(
      f'the warm-up of {config.optimizer.warmup_steps:,} steps is longer than the run: the learning'
      f' rate ends at {config.steps / config.optimizer.warmup_steps:.0%} of what is set'
    )
  workdirs.write_config(workdir, new)


def describe_params(state: State, writer: metrics.Writer) -> None:
  """Says what is trained, by parts; all of it goes to TensorBoard."""
  table = metrics.overview(state['params'])
  writer.text(int(state['step']), 'parameters', table)
  for line in table.splitlines()[-len({name.split('.')[0] for name in state['params']}) - 1 :]:
    say(line)


@contextlib.contextmanager
def signals() -> Iterator[Callable[[int], bool]]:
  """`must_stop(step)`: whether a signal or a preemption notice has come; all processes agree."""
  if jax.process_count() > 1:  # jax.distributed listens, and makes all processes agree on a step
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []

  def note(number, _frame):
    if received and number == signal.SIGINT:
      raise KeyboardInterrupt
    received.append(number)
    print('stopping after this step, to save (Ctrl-C again: at once)', file=sys.stderr)

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
  """`profile(step, pending)` before each step: records those of the window, once in a run."""
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
