"""What an evaluation shows: means with intervals, tables and curves.

A result is a dict of one edit: 'id', maybe 'source' (equal for edits of one image), and a number
for each metric. NaN and None mean that the edit has no such number; these are left out.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ip2p_jax.evaluation.scores import Description
from ip2p_jax.storage import replacing, write_bytes

RESAMPLES = 2000
TAIL = 2.5  # percent on each side of an interval
COLOURS, MARKERS = 10, 'os^D'  # another marker when matplotlib's colours begin again
LABELS = {  # of axes
  'clip_sim_dir': 'CLIP text-image direction similarity',
  'clip_sim_image': 'CLIP image similarity',
  'psnr': 'PSNR, dB',
  'ssim': 'SSIM',
}


class Estimate(NamedTuple):
  """A mean and its 95% interval, of `count` images; NaN without images."""

  mean: float
  low: float
  high: float
  count: int


# By method, then by metric.
Summary = Mapping[str, Mapping[str, Estimate]]


class Point(NamedTuple):
  """A point of a curve: two estimates, and the setting that it was measured at."""

  x: Estimate
  y: Estimate
  label: str


def bootstrap(
  values: Sequence[float | None], groups: Sequence[str] | None = None, seed: int = 0
) -> Estimate:
  """The mean of N values, with the percentile bootstrap's interval (Efron 1979).

  Values of one group are drawn together, since several edits of one image are not independent.
  Without `groups` every value is its own group.
  """
  values = np.array(values, float)
  is_there = ~np.isnan(values)
  if not is_there.any():
    return Estimate(math.nan, math.nan, math.nan, 0)
  names = np.arange(len(values)) if groups is None else np.asarray(groups)
  _, group = np.unique(names[is_there], return_inverse=True)
  sums, counts = np.bincount(group, values[is_there]), np.bincount(group)
  rng = np.random.default_rng(seed)
  means = []
  for _ in range(RESAMPLES):
    drawn = rng.integers(len(sums), size=len(sums))
    means.append(sums[drawn].sum() / counts[drawn].sum())
  low, high = np.percentile(means, (TAIL, 100 - TAIL))
  return Estimate(float(values[is_there].mean()), float(low), float(high), int(is_there.sum()))


def difference(
  first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], metric: str
) -> Estimate:
  """second - first of the images that both methods edited, paired by image.

  An estimate of no image if there is no such image.
  """
  by_id = {row['id']: row for row in first if _number(row, metric) is not None}
  pairs = [
    (by_id[row['id']], row)
    for row in second
    if row['id'] in by_id and _number(row, metric) is not None
  ]
  values = [row[metric] - other[metric] for other, row in pairs]
  return bootstrap(values, [source_of(row) for _, row in pairs])


def summarize(
  results: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]
) -> Summary:
  """Estimates from the results of each method."""
  return {
    method: {
      metric: bootstrap([_number(row, metric) for row in rows], [source_of(row) for row in rows])
      for metric in metrics
    }
    for method, rows in results.items()
  }


def by_group(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
  """The results of each kind of edit, in the order of the names."""
  groups = {}
  for row in results:
    groups.setdefault(row.get('group', ''), []).append(row)
  return dict(sorted(groups.items()))


def metrics_of(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  """Names of all numbers in the results, in their order."""
  known = ('id', 'group', 'turn', 'source')
  rows = (row for every in results.values() for row in every)
  return list(dict.fromkeys(name for row in rows for name in row if name not in known))


def _number(row, metric):
  value = row.get(metric)
  return None if value is None or math.isnan(value) else value


def source_of(row: Mapping[str, Any]) -> str:
  """What edits of one image have in common."""
  return row.get('source') or row['id']


# Tables.


def text(estimate: Estimate) -> str:
  """'0.812 (0.803 to 0.820)', or '-' without images; three digits that count."""
  if not estimate.count:
    return '-'
  mean, low, high = (_digits(value) for value in estimate[:3])
  return f'{mean} ({low} to {high})'


def _digits(value):
  if not value:
    return '0'
  places = 2 - math.floor(math.log10(abs(value)))
  return f'{value:.{min(max(places, 0), 6)}f}'


def markdown(
  summary: Summary, metrics: Sequence[str], notes: Mapping[str, str] = {}, name: str = 'method'
) -> str:
  """A table in Markdown: a row for each method (`name`), a column for each metric; notes below."""
  lines = [[name, 'images', *metrics], ['---'] * (2 + len(metrics))]
  for method, estimates in summary.items():
    count = max((estimate.count for estimate in estimates.values()), default=0)
    lines.append([method, str(count), *(text(estimates[metric]) for metric in metrics)])
  table = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
  head = f'Means by {name}, with 95% bootstrap intervals over images.\n\n'
  below = ''.join(f'* {name}: {note}\n' for name, note in notes.items())
  return head + table + ('\n' + below if below else '')


def described(descriptions: Sequence[Description]) -> dict[str, str]:
  """How the scores of scorers are computed, as notes by their models."""
  notes = {}
  for model, digests, preprocessing, resize_filter, quirks in descriptions:
    weights = ''.join(f', {name} sha256 {digest[:16]}' for name, digest in digests.items())
    published = f'; as published: {", ".join(quirks)}' if quirks else ''
    name = model if model != 'none' else 'pixels'
    notes[name] = f'{preprocessing}; resized by {resize_filter}{weights}{published}'
  return notes


def write_csv(path: Path, summary: Summary) -> None:
  """One line a method and metric: method, metric, mean, low, high, images."""
  file = io.StringIO(newline='')
  lines = csv.writer(file)
  lines.writerow(['method', 'metric', 'mean', 'low', 'high', 'images'])
  for method, estimates in summary.items():
    lines.writerows([method, metric, *estimate] for metric, estimate in estimates.items())
  write_bytes(path, file.getvalue().encode())


# Curves.


def plot(
  path: Path, curves: Mapping[str, Sequence[Point]], scores: tuple[str, str], title: str = ''
) -> None:
  """Writes a PNG of curves with intervals, every point labelled with its setting.

  `scores` are to the right and upwards. The paper's figures 8 and 10 have the CLIP direction to the
  right and the CLIP image similarity upwards.
  """
  from matplotlib.figure import Figure  # takes half a second

  figure = Figure(figsize=(7, 5), layout='constrained')
  axes = figure.subplots()
  for i, (name, points) in enumerate(curves.items()):
    points = [point for point in points if point.x.count and point.y.count]
    if not points:
      continue
    xs, ys = ([getattr(point, axis) for point in points] for axis in 'xy')
    mean_xs, mean_ys = [x.mean for x in xs], [y.mean for y in ys]
    axes.errorbar(
      mean_xs, mean_ys, xerr=_bars(xs), yerr=_bars(ys), marker=MARKERS[i // COLOURS % len(MARKERS)],
      markersize=4,
      elinewidth=0.7, capsize=2, label=name,
    )  # fmt: skip
    for x, y, point in zip(mean_xs, mean_ys, points, strict=True):
      axes.annotate(point.label, (x, y), xytext=(4, 4), textcoords='offset points', fontsize=7)
  axes.set_xlabel(LABELS.get(scores[0], scores[0]))
  axes.set_ylabel(LABELS.get(scores[1], scores[1]))
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  with replacing(path) as unfinished:
    figure.savefig(unfinished, format='png', dpi=120)


def _bars(estimates):
  """[2, N]: how far the intervals reach below and above the means; never negative."""
  reach = [(x.mean - x.low, x.high - x.mean) for x in estimates]
  return np.maximum(np.array(reach).T, 0)
