"""The course of a loss: means over examples, and the checkpoint to return to."""

import re

import pytest

from ip2p_jax.training.loss_course import Course, advice, followed, mean_loss


def step(loss, weight):
  return {'loss': loss, 'weight': weight}


def test_the_mean_loss_is_weighted_by_examples():
  assert mean_loss([step(1.0, 4.0), step(0.0, 0.0), step(3.0, 1.0)]) == pytest.approx(7 / 5)
  assert mean_loss([step(0.0, 0.0), step(0.0, 0.0)]) is None


def course_of(*logs):
  course = Course()
  for loss, checkpoint in logs:
    course = followed(course, loss, checkpoint)
  return course


def test_a_checkpoint_is_good_after_a_normal_loss():
  assert course_of((0.2, None)).good is None
  assert course_of((0.2, None), (0.21, 50)).good == 50
  assert course_of((0.2, None), (0.3, 50), (0.05, 100)).good == 100
  spoilt = course_of((0.2, None), (0.2, 50), (0.5, 100), (7.0, 150))
  assert spoilt.is_grown and spoilt.good == 50 and spoilt.mean == pytest.approx(0.2)
  assert followed(spoilt, float('inf'), 200).good == 50
  assert followed(spoilt, 0.2, 200).good == 200  # it came back
  assert followed(spoilt, None, 200) == spoilt  # nothing but broken examples


def test_a_slowly_growing_loss_is_detected():
  logs = [(0.2 * 1.15**i, 10 * i) for i in range(60)]
  course = course_of(*logs)
  assert course.is_grown and course.good < 300 and course.mean < 2.0
  falling = course_of(*[(0.2 / (1 + i), 10 * i) for i in range(60)])
  assert falling.good == 590


@pytest.mark.parametrize(
  'course, checkpoints, message',
  [
    (Course(0.2, 7.0, 50), [50, 150, 161], 'grown from 0.2 to 7, so the weights are spoilt: remove '
     '150, 161 from W to go on from step 50'),
    (Course(0.2, 0.2, 50), [50, 161], 'state before it is saved; go on .* fails at once again.*'
     'remove 161 from W to go on from step 50'),
    (Course(0.2, 7.0, None), [161], 'are spoilt: start again in a new workdir'),
    (Course(), [1], 'fails at once again, .* start again in a new workdir'),
    (Course(0.2, 7.0, 50), [161], 'start again in a new workdir'),  # somebody removed it
  ],
)  # fmt: skip
def test_advice_names_what_to_remove(course, checkpoints, message):
  assert re.search(message, advice(course, checkpoints, 'W'))
