"""How far one curve lies above another."""

import numpy as np
import pytest

from ip2p_jax.evaluation import report
from ip2p_jax.evaluation.curves import gaps

COUNT = 200


def a_curve(xs, height, rng):
  """Points on y = height - x, of images that differ far more than the curves do."""
  images = np.random.default_rng(0).normal(0, 1, COUNT)
  return [
    [{'id': str(i), 'x': x, 'y': height - x + images[i] + rng.normal(0, 0.01)}
     for i in range(COUNT)]
    for x in xs
  ]  # fmt: skip


def test_a_gap_is_found_where_both_curves_reach(rng):
  first, second = a_curve((0.2, 0.6, 1.0), 1.1, rng), a_curve((0.0, 0.5, 0.8), 1.0, rng)
  measured = gaps(first, second, 'x', 'y')
  assert [gap.place for gap in measured] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
  for _, gap in measured:
    assert gap.mean == pytest.approx(0.1, abs=0.01) and gap.low > 0.09 and gap.count == COUNT


def test_gaps_are_surer_than_two_intervals(rng):
  first, second = a_curve((0.0, 1.0), 1.1, rng), a_curve((0.0, 1.0), 1.0, rng)
  alone = report.bootstrap([row['y'] for row in first[0]])
  assert alone.high - alone.low > 0.2
  assert all(gap.low > 0.09 for _, gap in gaps(first, second, 'x', 'y'))


def test_images_that_shift_both_curves_do_not_widen_a_gap(rng):
  """Some images are farther to the right at all points, as in CLIP's scores."""
  first, second = a_curve((0.2, 0.6, 1.0), 1.1, rng), a_curve((0.0, 0.5, 0.8), 1.0, rng)
  shifts = rng.normal(0, 1, COUNT)
  for point in (*first, *second):
    for row, shift in zip(point, shifts, strict=True):
      row['x'] += shift
      row['y'] -= shift
  for _, gap in gaps(first, second, 'x', 'y'):
    assert gap.mean == pytest.approx(0.1, abs=0.01) and 0.09 < gap.low < gap.high < 0.11


def test_a_curve_may_be_given_from_either_end(rng):
  first, second = a_curve((0.0, 0.4, 1.0), 1.1, rng), a_curve((0.0, 1.0), 1.0, rng)
  for one, other in zip(gaps(first[::-1], second, 'x', 'y'), gaps(first, second, 'x', 'y'),
                        strict=True):  # fmt: skip
    assert one.place == other.place and one.gap == pytest.approx(other.gap)


def test_the_higher_pass_of_a_curve_that_goes_back_counts(rng):
  """SDEdit by the oracle: with more strength first more, then fewer edits are done."""

  def curve(points):
    return [[{'id': 'a', 'x': x, 'y': y}, {'id': 'b', 'x': x, 'y': y}] for x, y in points]

  back = curve([(0.0, 32.0), (0.2, 30.0), (0.1, 25.0)])
  flat = curve([(0.0, 35.0), (0.2, 35.0)])
  assert [gap.mean for _, gap in gaps(flat, back, 'x', 'y')] == pytest.approx([3, 3.5, 4, 4.5, 5])
  upright = curve([(0.0, 30.0), (0.1, 31.0), (0.1, 33.0), (0.2, 33.0)])
  assert gaps(flat, upright, 'x', 'y')[2].gap.mean == pytest.approx(2)


def test_curves_that_do_not_meet_have_no_gaps(rng):
  assert gaps(a_curve((0.0, 0.4), 1, rng), a_curve((0.5, 1.0), 1, rng), 'x', 'y') == []


def test_only_images_of_all_points_count(rng):
  first, second = a_curve((0.0, 1.0), 1.1, rng), a_curve((0.0, 1.0), 1.0, rng)
  first[1] = first[1][:50]
  second[0][0]['y'] = None
  assert {gap.count for _, gap in gaps(first, second, 'x', 'y')} == {49}
  assert gaps([[], []], second, 'x', 'y') == []


def test_a_mean_is_over_the_images_that_have_the_score(rng):
  """As in the table: an image without y still counts for x."""
  first, second = a_curve((0.0, 1.0), 1.1, rng), a_curve((0.0, 1.0), 1.0, rng)
  for point in (*first, *second):
    for i, row in enumerate(point):
      row['x'] += i / COUNT
      row['y'] = None if i < COUNT // 2 else row['y']
  measured = gaps(first, second, 'x', 'y')
  assert measured[0].place == pytest.approx((COUNT - 1) / 2 / COUNT)
  assert {gap.count for _, gap in measured} == {COUNT // 2}
