"""The loop that every training run goes through, and what a run says and heeds."""

import collections
import contextlib
import dataclasses
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

IN_FLIGHT = 2  # steps that the host may be ahead; more only cost the memory of their batches
STOPPED = 143  # exit status, so that whoever watches the job knows to start it again

State = dict[str, Any]


class Job(NamedTuple):
  """What is trained, as functions.

  Attributes:
    step: (state, batch) -> (state, values), jitted; see `train_step.train_step`.
    batches: of the steps to come; closed at the end.
    shardings: of the state.
    save: (step, state) -> None, writes a checkpoint.
    check: (values, state) -> None; raises after a step that was not finite.
    validate: ema -> validation loss, if there is one.
    preview: ema -> picture, if there is one.
    check_log: (step, values, state) -> None; may raise when all of a log is written.
  """

  step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
  batches: Generator
  shardings: State
  save: Callable[[int, State], None]
  check: Callable[[dict[str, Any], State], None]
  validate: Callable[[Any], float] | None = None
  preview: Callable[[Any], Any] | None = None
  check_log: Callable[[int, dict[str, float], State], None] = lambda step, values, state: None


def loop(
  job: Job,
  config: Any,
  state: State,
  workdir: str,
  manager: Checkpoints,
  writer: metrics.Writer,
  meter: metrics.Meter,
  must_stop: Callable[[int], bool],
) -> int:
  """Steps until `config.steps`, or until `must_stop`; the exit status, 0 or 143.

  Args:
    config: anything with `steps` and `log`.
    state: is donated, but on a CPU.
  """
  log, first = config.log, int(state['step'])
  recent, losses = collections.deque(), []
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(contextlib.closing(job.batches))
    profile = stack.enter_context(_profiler(log.profile, first, workdir, meter))
    for step in range(first + 1, config.steps + 1):  # steps are counted when taken
      profile(step, recent)
      state, values = job.step(state, next(batches))  # dispatched, not awaited
      losses.append(values['loss'])
      recent.append(values['loss'])
      if len(recent) > IN_FLIGHT:
        recent.popleft().block_until_ready()
      if step == first + 1:
        loss = float(values['loss'])  # waits
        sharding.check_placed(state, job.shardings)
        say(f'step {step:,}/{config.steps:,}  loss {loss:.4f}  ready after {meter.age():.0f} s')
        meter.start(step)
      is_stopped, is_last = must_stop(step), step == config.steps
      is_checkpoint = step % log.checkpoint_every == 0 or is_last or is_stopped
      is_due = log.validate_every and (step % log.validate_every == 0 or is_last)
      is_validation = job.validate and is_due and not is_stopped
      if step % log.every and not is_checkpoint and not is_validation:
        continue

      values = jax.device_get(values)
      job.check(values, state)
      mean = float(np.mean(jax.device_get(losses)))
      losses.clear()
      values = {name: float(x) for name, x in values.items() if name not in ('loss', 'bad_step')}
      values = {'loss': mean} | values | meter.read(step) | metrics.memory()
      say(metrics.progress_line(step, config.steps, values))
      with meter.paused(state):
        if is_checkpoint:
          job.save(step, state)
        if is_validation:
          values['validation_loss'] = job.validate(state['ema'])
          say(f'validation loss {values["validation_loss"]:.4f}')
        writer.scalars(step, values)
        if job.preview and is_checkpoint and not is_stopped:
          writer.image(step, 'preview', job.preview(state['ema']))
      job.check_log(step, values, state)
      if is_stopped and not is_last:
        manager.wait()
        say(f'stopped at step {step:,}, and saved; run the same command to go on')
        return STOPPED
  manager.wait()
  return 0


def keep_config(config: Any, workdir: str) -> None:
  """Writes config.json; says what differs if the run was begun with another."""
  new = dataclasses.asdict(config)
  for line in workdirs.differences(workdirs.read_config(workdir) or new, new):
    say(f'changed since the last start: {line}')
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
