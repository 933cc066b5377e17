"""How far one curve lies above another, where both reach, with intervals.

A curve is a list of points, and a point is the results of one evaluation, as in `report`. All
points are of the same images, so these are resampled together, for every point at once. Two
curves can then be told apart although the intervals of their points overlap.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ip2p_jax.evaluation.report import RESAMPLES, TAIL, Estimate, source_of

Results = Sequence[Mapping[str, Any]]

PLACES = 5


class Gap(NamedTuple):
  """`first - second` in one score, where another score is `place` on both curves."""

  place: float
  gap: Estimate


def gaps(
  first: Sequence[Results], second: Sequence[Results], at: str, of: str, seed: int = 0
) -> list[Gap]:
  """The differences in the score `of` at equal values of the score `at`.

  Curves are straight between their points. The places divide the range of `at` that both curves
  have into equal parts; so they move with the curves when images are resampled. Returns [] if there
  is no such range, or no image that all points have.
  """
  points = [[_scores(point, (at, of)) for point in curve] for curve in (first, second)]
  ids = sorted(set.intersection(*(set(scores) for curve in points for scores in curve)))
  if not ids:
    return []
  # [points, images, 2] of each curve
  values = [np.array([[scores[id] for id in ids] for scores in curve]) for curve in points]
  means = [curve.mean(1) for curve in values]
  places = _places(means)
  if places[0] >= places[-1]:
    return []
  sources = {row['id']: source_of(row) for row in first[0]}
  _, group = np.unique([sources[id] for id in ids], return_inverse=True)
  rng = np.random.default_rng(seed)
  drawn = []
  for _ in range(RESAMPLES):
    counts = np.bincount(rng.integers(group.max() + 1, size=group.max() + 1),
                         minlength=group.max() + 1)[group]  # fmt: skip
    drawn.append(_gap([counts @ curve / counts.sum() for curve in values]))
  lows, highs = np.percentile(drawn, (TAIL, 100 - TAIL), axis=0)
  return [
    Gap(float(place), Estimate(float(gap), float(below), float(above), len(ids)))
    for place, gap, below, above in zip(places, _gap(means), lows, highs, strict=True)
  ]


def _scores(point, names):
  """{id: [the two scores]} of the images that have both."""
  return {
    row['id']: [row[name] for name in names]
    for row in point
    if all(row.get(name) is not None for name in names)
  }


def _places(curves):
  """float [PLACES]: from the first to the last value that both curves [points, 2] reach."""
  low = max(curve[:, 0].min() for curve in curves)
  high = min(curve[:, 0].max() for curve in curves)
  return np.linspace(low, high, PLACES)


def _gap(curves):
  """first - second at the places."""
  places = _places(curves)
  first, second = (
    np.interp(places, *curve[np.argsort(curve[:, 0], kind='stable')].T) for curve in curves
  )
  return first - second
