"""Logs, checkpoints and messages of the loop, with invented steps, so that nothing compiles."""

import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ip2p_jax import sharding
from ip2p_jax.config import LogConfig
from ip2p_jax.errors import InputError
from ip2p_jax.training import logs, loop
from ip2p_jax.training.loss_course import Course


class MemoryCheckpoints:
  """Checkpoints in memory; the newest and the good one stay."""

  folder = 'W/checkpoints'

  def __init__(self, keep=1):
    self.keep, self.courses = keep, {}

  def save(self, step, state, course):
    self.courses[step] = course
    for old in sorted(self.courses)[: -self.keep]:
      if old != course.good:
        del self.courses[old]

  def steps(self):
    return sorted(self.courses)

  def latest_step(self):
    return max(self.courses, default=None)

  def wait(self):
    pass


def run(
  losses, workdir, weights=None, stored=None, first=0, course=None, actions=(),
  must_stop=lambda step: False, **log,
):  # fmt: skip
  """Runs the loop on steps with these losses; (status, lines of metrics.jsonl, checkpoints).

  A loss that is not finite is a bad step, after which the state does not change.
  """
  stored = stored or MemoryCheckpoints()
  weights = weights or [4.0] * len(losses)
  where = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
  placed = lambda x: jax.device_put(jnp.int32(x), where)
  state = {'step': placed(first), 'bad_step': placed(-1), 'ema': placed(0)}

  def step(state, i):
    bad = int(state['bad_step'])
    bad = int(state['step']) if bad < 0 and not np.isfinite(losses[i]) else bad
    taken = int(state['step']) + (bad < 0)
    values = {'loss': losses[i], 'weight': weights[i], 'grad_norm': 10.0 + i,
              'learning_rate': 1e-4, 'bad_step': bad}  # fmt: skip
    as_arrays = jax.tree.map(jnp.asarray, values)
    return state | {'step': placed(taken), 'bad_step': placed(bad)}, as_arrays

  log = {'every': 2, 'checkpoint_every': 4, 'validate_every': 0} | log
  config = types.SimpleNamespace(steps=first + len(losses), log=LogConfig(**log))
  with logs.Writer(workdir, first) as writer:
    job = loop.Job(
      config=config, workdir=str(workdir), step=step, batches=(i for i in range(len(losses))),
      shardings=jax.tree.map(lambda _: where, state), checkpoints=stored, writer=writer,
      meter=logs.Meter(4, 1e9, 1, None), save=stored.save, must_stop=must_stop,
    )  # fmt: skip
    status = loop.loop(job, actions, state, course or Course())
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return status, {line.pop('step'): line for line in lines}, stored


def test_the_logged_loss_is_the_mean_over_examples_that_count(tmp_path):
  losses, weights = [1.0, 3.0, 0.0, 5.0, 0.0, 0.0, 2.0, 0.0], [4, 2, 0, 4, 0, 0, 4, 0]
  status, lines, stored = run(losses, tmp_path, [float(x) for x in weights])
  assert status == 0
  assert lines[2]['loss'] == pytest.approx(10 / 6) and lines[4]['loss'] == 5
  assert not lines[6].keys() & {'loss', 'grad_norm'} and 'learning_rate' in lines[6]
  assert lines[8]['loss'] == 2 and lines[8]['grad_norm'] == 16  # of the step that had examples
  assert stored.courses[8].last == 2
  assert (tmp_path / 'loss.png').exists()


def test_every_step_is_printed_once(tmp_path, capsys):
  run([1.0] * 5, tmp_path / 'new')
  run([1.0], tmp_path / 'on', first=5)
  run([1.0, 1.0], tmp_path / 'too', first=4)
  out = [line for line in capsys.readouterr().out.splitlines() if line.startswith('step ')]
  assert [line.split()[1] for line in out] == ['1/5', '2/5', '4/5', '5/5', '6/6', '5/6', '6/6']
  assert ['ready after' in line for line in out] == [True, False, False, False, True, True, False]


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(os, '_exit', sys.exit)
  stored = MemoryCheckpoints()
  with pytest.raises(SystemExit) as stop:
    run([1.0], tmp_path, stored=stored, must_stop=lambda _: True)
  assert stop.value.code == loop.STOPPED and not stored.courses
  assert capsys.readouterr() == ('', 'stopped before the first step; nothing is lost\n')


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
  losses = [0.2] * 13 + [1.0, 3.0] + [9.0] * 18 + [float('nan')] * 3
  stored = MemoryCheckpoints(keep=3)
  message = (
    r'step 34: the loss or a gradient is not finite\. The loss had grown from 0\.2 to 9, so the'
    r' weights are spoilt: remove 28, 32, 33 from W/checkpoints to go on from step 8,'
  )
  with pytest.raises(InputError, match=message):
    run(losses, tmp_path, stored=stored)
  assert stored.steps() == [8, 28, 32, 33]
  assert stored.courses[33].is_grown and stored.courses[33].good == 8
  # Going on from what is left: the loss is near its mean again, and new checkpoints count.
  left = MemoryCheckpoints()
  left.courses[8] = stored.courses[8]
  _, lines, left = run([0.2] * 6, tmp_path, stored=left, first=8, course=stored.courses[8])
  assert left.courses[14].good == 12 and list(lines) == [2, 4, 6, 8, 10, 12, 14]


def test_a_sudden_bad_step_may_come_from_its_examples(tmp_path):
  with pytest.raises(InputError, match=r'step 6: .* The state before it is saved; go on') as stop:
    run([0.2] * 5 + [float('inf')], tmp_path, stored=MemoryCheckpoints(keep=2))
  assert 'remove 5 from W/checkpoints to go on from step 4' in str(stop.value)


def test_actions_come_in_order_and_at_the_end(tmp_path):
  seen = []
  act = lambda name: lambda step, state: seen.append((name, step)) or {name: float(step)}
  _, lines, stored = run([1.0] * 7, tmp_path, actions=[(3, act('a')), (6, act('b'))])
  assert seen == [('a', 3), ('a', 6), ('b', 6), ('a', 7), ('b', 7)]
  assert lines[6]['a'] == lines[6]['b'] == 6 and 'a' not in lines[4]
  assert stored.steps()[-1] == 7


def test_a_failed_action_loses_no_numbers(tmp_path):
  def fail(step, state):
    raise RuntimeError('no memory')

  with pytest.raises(RuntimeError):
    run([1.0] * 4, tmp_path, actions=[(4, fail)])
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['step'] == 4
