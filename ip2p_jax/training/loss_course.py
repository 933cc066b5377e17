"""Follows the loss of a run, and finds the checkpoint to return to if it grew.

The loss of a step measures the weights before it. So a checkpoint is good if the loss of the steps
after it was near its running mean; for the newest one, this is not known yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DECAY = 0.9  # of the running mean, from one log to the next
GROWN = 2.0  # times the running mean: a larger loss means spoilt weights


class Course(NamedTuple):
  """The loss until a log.

  Attributes:
    mean: running mean of the loss, over the logs that were near it.
    last: mean loss since the previous log.
    good: step of the newest good checkpoint.
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
    loss: mean of the steps since the previous log; None if no example counted.
    checkpoint: step of the newest checkpoint from before those steps.
  """
  if loss is None:
    return course
  course = course._replace(mean=loss if course.mean is None else course.mean, last=loss)
  if course.is_grown:
    return course
  good = course.good if checkpoint is None else checkpoint
  return course._replace(mean=DECAY * course.mean + (1 - DECAY) * loss, good=good)


def mean_loss(steps: Sequence[Mapping[str, Any]]) -> float | None:
  """Mean of the `loss` of some steps, weighted by their `weight`; None if all weights are 0.

  A step whose examples are all broken has weight 0, and its loss of 0 does not count.
  """
  counted = [step for step in steps if step['weight'] > 0]
  total = sum(float(step['weight']) for step in counted)
  mean = lambda: sum(float(step['loss']) * float(step['weight']) for step in counted) / total
  return mean() if counted else None


def advice(course: Course, checkpoints: Sequence[int], folder: Any) -> str:
  """How to continue a run whose loss is not finite, as text.

  Args:
    checkpoints: their steps; the newest has the state before that loss.
    folder: of the checkpoints.
  """
  newer = [step for step in checkpoints if course.good is not None and step > course.good]
  back = 'start again in a new workdir'
  if newer and course.good in checkpoints:
    back = (
      f'remove {", ".join(map(str, newer))} from {folder} to go on from step {course.good}, the'
      ' last checkpoint after which the loss was normal'
    )
  how = 'a lower optimizer.learning_rate, or optimizer.clip_norm=1, or dtype=float32'
  if course.is_grown:
    return (
      f'The loss had grown from {course.mean:.4g} to {course.last:.4g}, so the weights are spoilt:'
      f' {back}, with {how}.'
    )
  return (
    f'The state before it is saved; go on with {how}, or another seed. If it fails at once again,'
    f' the weights are already spoilt: then {back}.'
  )
