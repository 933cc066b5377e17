"""How the loss of a run goes, and which checkpoint is good to go back to when it grew.

The loss of a step tells how good the weights before it were. So a checkpoint is good once the loss
of the steps after it was near its running mean; of the newest one nothing is known yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KEPT = 0.9  # of the running mean, from one log to the next
GROWN = 2.0  # times its running mean is a loss of spoilt weights


class Course(NamedTuple):
  """What is known at a log.

  Attributes:
    mean: running mean of the loss, over logs where it was near it.
    last: mean loss since the log before.
    good: step of the newest checkpoint that is good.
  """

  mean: float | None = None
  last: float | None = None
  good: int | None = None

  @property
  def is_grown(self) -> bool:
    return self.last is not None and not self.last <= GROWN * self.mean


def followed(course: Course, loss: float | None, checkpoint: int | None) -> Course:
  """The course after a log.

  Args:
    loss: mean of the steps since the log before; None if nothing counted.
    checkpoint: step of the newest checkpoint that was there before those steps.
  """
  if loss is None:
    return course
  course = course._replace(mean=loss if course.mean is None else course.mean, last=loss)
  if course.is_grown:
    return course
  good = course.good if checkpoint is None else checkpoint
  return course._replace(mean=KEPT * course.mean + (1 - KEPT) * loss, good=good)


def mean_loss(steps: Sequence[Mapping[str, Any]]) -> float | None:
  """Mean of the `loss` of some steps over all that their `weight` counts; None if that is nothing.

  A step without a good example has weight 0, and its loss, which is 0, is no loss.
  """
  counted = [step for step in steps if step['weight'] > 0]
  total = sum(float(step['weight']) for step in counted)
  mean = lambda: sum(float(step['loss']) * float(step['weight']) for step in counted) / total
  return mean() if counted else None


def advice(course: Course, checkpoints: Sequence[int], folder: Any) -> str:
  """For people: how a run whose loss is not finite goes on.

  Args:
    checkpoints: steps of those that there are; the newest is of the state before that loss.
    folder: where they lie.
  """
  newer = [step for step in checkpoints if course.good is not None and step > course.good]
  back = 'begin again in a new workdir'
  if newer and course.good in checkpoints:
    back = (
      f'remove {", ".join(map(str, newer))} from {folder} to go on from step {course.good}, the'
      ' last checkpoint after which the loss was as before'
    )
  how = 'a lower optimizer.learning_rate, or optimizer.clip_norm=1, or dtype=float32'
  if course.is_grown:
    return (
      f'The loss had grown from {course.mean:.4g} to {course.last:.4g}, so the weights are spoilt:'
      f' {back}, with {how}.'
    )
  return (
    f'The state before it is saved; go on with {how}, or another seed. If it fails at once again,'
    f' the weights are spoilt already: then {back}.'
  )
