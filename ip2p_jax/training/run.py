"""The driver of every training run: mesh, resume, signals, checkpoints, metrics, validation.

Each kind of training has its own `Kind` (how a run begins) and `Task` (what is trained, on which
batches). `train.py` has those of an editor, `captions/train.py` those of a language model.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ip2p_jax import sharding, storage
from ip2p_jax.errors import InputError
from ip2p_jax.interrupts import interruptible
from ip2p_jax.models import lora
from ip2p_jax.pipeline.checkpoints import Checkpoints
from ip2p_jax.training import flops, logs, optimizer, step
from ip2p_jax.training.loop import (
  Action,
  Job,
  before_the_first_step,
  first_time,
  loop,
  say,
  signals,
)
from ip2p_jax.training.resume import as_begun, claimed, course_before, keep_config
from ip2p_jax.training.sizes import describe_params, sizes
from ip2p_jax.training.step import State
from ip2p_jax.xla_alarms import quietly

Arrays = Mapping[str, np.ndarray]


class Kind(NamedTuple):
  """A kind of training: how its runs begin.

  Attributes:
    fixed: settings that the saved weights depend on.
    read_start: config -> the checkpoint that a new run begins with.
    load_start: workdir -> the checkpoint that this run began with, as the workdir holds it; None if
      the workdir holds none of this kind.
    describe: (config, checkpoint, mesh, workdir) -> Task.
  """

  fixed: tuple[str, ...]
  read_start: Callable[[Any], Any]
  load_start: Callable[[str], Any]
  describe: Callable[[Any, Any, Mesh, str], 'Task']


class Task(NamedTuple):
  """The trained parameters, the step and the data of a run.

  Attributes:
    config: the run's, with the settings that the checkpoint decides.
    shapes: {name: shape} of all parameters that may learn.
    recipe: optimizer -> the static inputs of a step, which jit does not trace.
    step: like `step.train_step`.
    values: names -> {name: array} of the checkpoint.
    frozen: names of trained parameters -> the inputs that a step does not change, on the devices.
    save_start: names of trained parameters -> None; saves all other parameters in the workdir.
    size: of an example, as in 'at 256 px'.
    data: a description of the data, as text.
    rows: the number of rows; saved with each checkpoint.
    batches: (run, place) -> the batches from that place on.
    flops: run -> FLOPs of one example, forward and backward.
    validation: run -> (() -> batches of validation examples); None without any.
    validation_loss: (recipe, ema, frozen, batch) -> sums of the losses and of their weights.
    preview: run -> (ema -> image); None without examples.
    look: (run, place, state, step) -> a sentence about a bad step's batch.
    check: (run, place, values) -> why the run cannot continue, or None.
  """

  config: Any
  shapes: dict[str, Any]
  recipe: Callable[[Any], Any]
  step: Callable
  values: Callable[[Collection[str]], Arrays]
  frozen: Callable[[Collection[str]], dict[str, Any]]
  save_start: Callable[[Collection[str]], None]
  size: str
  data: str
  rows: Any
  batches: Callable[['Run', int], Generator]
  flops: Callable[['Run'], float]
  validation: Callable[['Run'], Callable[[], Generator] | None]
  validation_loss: Callable
  preview: Callable[['Run'], Callable[[Any], Any] | None] = lambda run: None
  look: Callable[['Run', int, State, int], str] = lambda run, place, state, step: ''
  check: Callable[['Run', int, dict[str, float]], str | None] = lambda run, place, values: None


class Learning(NamedTuple):
  """The trained parameters, and the sharding of the state.

  Attributes:
    trained: {name: shape}.
    adapters: {name: array} of new adapters, which are in no checkpoint; None without LoRA.
    state: shapes of the state.
    shardings: of the state.
  """

  recipe: Any
  trained: dict[str, Any]
  adapters: Arrays | None
  state: State
  shardings: State


class Run(NamedTuple):
  """The constants of a run's steps.

  Attributes:
    shardings: of the state.
    frozen: the inputs that a step does not change, on the devices.
    microbatch: examples of one device and accumulation step.
  """

  config: Any
  mesh: Mesh
  recipe: Any
  shardings: State
  frozen: dict[str, Any]
  microbatch: int


def train(kind: Kind, config: Any, workdir: str) -> int:
  """Trains until `config.steps`, or until a signal; a second call continues from the checkpoint.

  Returns the exit status: 0 when done, 143 when stopped by a signal, after writing a checkpoint.
  Raises InputError for mistakes in config, checkpoint or workdir, and for a loss that is not
  finite.
  """
  workdir = str(storage.folder(workdir))
  mesh = sharding.make_mesh(config.mesh.fsdp)
  with contextlib.ExitStack() as stack:
    stack.enter_context(claimed(workdir))
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.log.keep)))
    beginning = stack.enter_context(contextlib.ExitStack())
    beginning.enter_context(interruptible(before_the_first_step))
    task, run, state, extras = _prepare(kind, config, workdir, mesh, checkpoints)
    config, step = run.config, int(state['step'])
    sharding.check_placed(state, run.shardings)
    if step:
      say(f'resumed   from the checkpoint of step {step:,}')
    if step >= config.steps:
      say(f'done: already at step {step:,} of {config.steps:,}')
      return 0
    keep_config(config, workdir, step)
    course = course_before(extras, config)
    if extras['rows'] not in (None, task.rows):
      say(f'the data had {extras["rows"]} rows, and now has {task.rows}: their order has changed')
    writer = stack.enter_context(logs.Writer(workdir, step))
    say(f'data      {task.data}')
    describe_params(state, writer)
    beginning.close()
    must_stop = stack.enter_context(signals())
    # Skips the examples that were seen, in batches of today's size, which may have changed.
    ahead = -(-extras['examples'] // config.batch_size) - step
    job = _job(task, run, workdir, checkpoints, writer, must_stop, ahead, step)
    status = loop(job, _actions(task, run, writer), state, course)
  if status == 0:
    has_previews = (storage.folder(workdir) / logs.PREVIEWS).exists()
    say(f'done: {config.steps:,} steps{f", images in {workdir}/previews" * has_previews}')
    say(f'ip2p convert {workdir} DST exports the averaged weights')
  return status


def learning(
  config: Any, shapes: Mapping[str, Any], recipe: Callable[[Any], Any], mesh: Mesh
) -> Learning:
  """Which of the parameters are trained, their optimizer, and the sharding of the state.

  InputError for settings of LoRA or rates that leave nothing to learn.
  """
  trained, adapters = trained_shapes(config, shapes)
  recipe = recipe(optimizer.adamw(config.optimizer, {*shapes, *trained}, config.steps))
  state = jax.eval_shape(functools.partial(step.initial_state, recipe), trained)
  return Learning(
    recipe, trained, adapters, state, sharding.of_state(mesh, state, config.mesh.zero1)
  )


def _prepare(
  kind: Kind, config: Any, workdir: str, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[Task, Run, State, dict[str, Any]]:
  """Starts or resumes: (task, run, state, {'examples': seen so far, 'rows': when saved}).

  'rows' is the number of rows of the data when the checkpoint was saved; None for a new run.

  The checkpoint decides some settings of the run's config.
  """
  microbatch = sharding.check_batch(mesh, config.batch_size, config.accumulation)
  is_resumed = checkpoints.latest_step() is not None
  if is_resumed:
    config = as_begun(config, kind.fixed, workdir)
  start = kind.load_start(workdir) if is_resumed else kind.read_start(config)
  if start is None:
    raise InputError(f'{workdir}: has checkpoints of another kind of run; use a new workdir.')
  task = kind.describe(config, start, mesh, workdir)
  learner = learning(task.config, task.shapes, task.recipe, mesh)
  if is_resumed:
    checkpoints.check_fits(learner.state)
  frozen = task.frozen(learner.trained)
  run = Run(task.config, mesh, learner.recipe, learner.shardings, frozen, microbatch)
  say(sizes(run, learner.state, task.size))
  if is_resumed:
    return task, run, *_resumed(checkpoints, learner)
  task.save_start([name for name in learner.trained if name in task.shapes])
  values = learner.adapters or task.values(learner.trained)
  return task, run, _started(learner, values), {'examples': 0, 'rows': None}


def _job(task, run, workdir, checkpoints, writer, must_stop, ahead, first) -> Job:
  """The loop's job. Step n uses batch n + `ahead`; `first` steps are done already."""
  jitted = step.jitted(run.recipe, run.mesh, run.shardings, task.step)

  def save(step, state, course):
    extras = {
      'examples': (step + ahead) * run.config.batch_size,
      'rows': task.rows,
      'config': dataclasses.asdict(run.config),
      'course': course._asdict(),
    }
    checkpoints.save(step, state, extras, course.good)

  meter = logs.Meter(
    run.config.batch_size, task.flops(run), run.mesh.size, flops.peak(run.mesh.devices.flat[0])
  )
  return Job(
    config=run.config,
    workdir=workdir,
    step=lambda state, batch: jitted(state, run.frozen, batch),
    batches=task.batches(run, first + ahead),
    shardings=run.shardings,
    checkpoints=checkpoints,
    writer=writer,
    meter=meter,
    save=save,
    must_stop=must_stop,
    look=lambda state, step: task.look(run, step + ahead, state, step),
    check=lambda step, values: task.check(run, step + ahead, values),
  )


def _actions(task: Task, run: Run, writer: logs.Writer) -> list[tuple[int, Action]]:
  """Validation and previews as (every so many steps, action)."""
  log, compiling, actions = run.config.log, first_time(), []
  if log.validate_every and (validate := _validation(task, run)):

    def validated(step, state):
      with compiling('validation'):
        loss = validate(state['ema'])
      if loss is None:
        say('no validation loss: every example is broken')
        return {}
      say(f'validation loss {logs.shown_loss(loss)}')
      return {'validation_loss': loss}

    actions.append((log.validate_every, validated))
  if preview := task.preview(run):

    def previewed(step, state):
      with compiling('previews'):
        writer.image(step, 'preview', preview(state['ema']))

    actions.append((log.checkpoint_every, previewed))
  return actions


def _validation(task: Task, run: Run) -> Callable[[Any], float | None] | None:
  """`validate(ema)`: the mean loss of the validation examples; None if all of them are broken."""
  batches = task.validation(run)
  if batches is None:
    return None
  losses = jax.jit(
    functools.partial(task.validation_loss, run.recipe),
    out_shardings=sharding.replicated(run.mesh),
  )

  def validate(ema):
    with contextlib.closing(batches()) as placed:
      totals = [jax.device_get(losses(ema, run.frozen, batch)) for batch in placed]
    loss, weight = np.sum(np.array(totals, np.float64), 0)
    return float(loss / weight) if weight else None

  return validate


def trained_shapes(
  config: Any, shapes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
  """({name: shape} of trained parameters, {name: array} of new adapters or None)."""
  if config.lora.rank:
    rng = np.random.default_rng(config.seed)
    initial = lora.adapters(shapes, config.lora, rng)
    adapters = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in initial.items()}
    if optimizer.trainable(adapters, config.optimizer.rates) != set(adapters):
      raise InputError('optimizer.rates freezes adapters; choose layers by lora.targets instead.')
    return adapters, initial
  trained = optimizer.trainable(shapes, config.optimizer.rates)
  as_float32 = lambda name: jax.ShapeDtypeStruct(shapes[name].shape, np.float32)
  return {name: as_float32(name) for name in shapes if name in trained}, None


def _resumed(checkpoints: Checkpoints, learner: Learning) -> tuple[State, dict[str, Any]]:
  """The latest checkpoint, on the devices."""
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    learner.state,
    learner.shardings,
  )
  return checkpoints.restore(target)


def _started(learner: Learning, values: Arrays) -> State:
  """The state before the first step, on the devices."""
  placements = learner.shardings['params'].items()
  params = {name: sharding.put(values[name], placement) for name, placement in placements}
  start = functools.partial(step.initial_state, learner.recipe)
  return quietly(jax.jit(start, out_shardings=learner.shardings, donate_argnums=0), params)
