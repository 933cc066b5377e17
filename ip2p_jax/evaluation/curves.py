"""How far one curve lies above another, where both reach, with intervals.

A curve is a list of points, and a point is the results of one evaluation, as in `report`. All
points are of the same images, so these are resampled together, for every point at once. Two
curves can then be told apart although the intervals of their points overlap.
"""

import itertools
import math
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

  Curves are straight between their points, in the given order. Where a curve goes back and passes
  a place twice, its higher pass counts: there its setting is better. The places divide the range of
  `at` that both curves have into equal parts; so they move with the curves when images are
  resampled. A score's mean is over the images that have it at all points, whose number a gap has.
  Returns [] if there is no common range, or no such image.
  """
  curves = first, second
  ids = sorted(set.intersection(*({row['id'] for row in point} for curve in curves
                                  for point in curve)))  # fmt: skip
  # [points, images, 2] of each curve; nan where an image has no such score
  values = [np.array([_scores(point, ids, (at, of)) for point in curve]) for curve in curves]
  has = np.all([~np.isnan(curve).any(0) for curve in values], 0).astype(float)  # [images, 2]
  if not (len(ids) and has.any(0).all()):
    return []
  values = [np.where(has, curve, 0) for curve in values]
  means = lambda counts: [counts @ curve / (counts @ has) for curve in values]
  whole = means(np.ones(len(ids)))
  places = _places(whole)
  if places[0] >= places[-1]:
    return []
  sources = {row['id']: source_of(row) for row in first[0]}
  names, group = np.unique([sources[id] for id in ids], return_inverse=True)
  rng, drawn = np.random.default_rng(seed), []
  with np.errstate(invalid='ignore'):  # a sample may have no image with a score
    for _ in range(RESAMPLES):
      times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
      drawn.append(_gap(means(times[group])))
  lows, highs = np.nanpercentile(drawn, (TAIL, 100 - TAIL), axis=0)
  count = int(has[:, 1].sum())
  return [
    Gap(float(place), Estimate(float(gap), float(low), float(high), count))
    for place, gap, low, high in zip(places, _gap(whole), lows, highs, strict=True)
  ]


def _scores(point, ids, names):
  """[[the two scores] of each image]."""
  rows = {row['id']: row for row in point}
  return [[math.nan if rows[id].get(name) is None else rows[id][name] for name in names]
          for id in ids]  # fmt: skip


def _places(curves):
  """float [PLACES]: from the first to the last value that both curves [points, 2] reach."""
  low = max(curve[:, 0].min() for curve in curves)
  high = min(curve[:, 0].max() for curve in curves)
  return np.linspace(low, high, PLACES)


def _gap(curves):
  """first - second at the places."""
  places = _places(curves)
  first, second = (_heights(curve, places) for curve in curves)
  return first - second


def _heights(curve, places):
  """The height of a curve [points, 2] at each place, the highest if it goes back; nan if none."""
  heights = np.full(len(places), np.nan)
  for (x0, y0), (x1, y1) in itertools.pairwise(curve):
    at_start = np.where(places == x0, y0, -np.inf)
    along = y0 + (places - x0) / (x1 - x0) * (y1 - y0) if x1 != x0 else y1
    on = (places >= min(x0, x1)) & (places <= max(x0, x1))
    heights = np.fmax(heights, np.where(on, np.maximum(along, at_start), np.nan))
  return heights
