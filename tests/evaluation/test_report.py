"""Means with intervals, tables and curves of an evaluation."""

import csv
import math

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.evaluation import report
from ip2p_jax.evaluation.report import Estimate, Point


def results(values):
  return [{'id': str(i), 'source': f'image {i}', 'l1': value} for i, value in enumerate(values)]


def test_an_interval_is_that_of_the_normal_distribution_for_many_images(rng):
  values = rng.normal(3, 2, 1000)
  estimate = report.bootstrap(values)
  half = 1.96 * values.std(ddof=1) / np.sqrt(1000)
  assert estimate.mean == pytest.approx(values.mean()) and estimate.count == 1000
  assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
  assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


def test_edits_of_one_image_count_as_one(rng):
  values = np.repeat(rng.normal(size=50), 20)  # 20 equal edits of each of 50 images
  alone, grouped = report.bootstrap(values), report.bootstrap(values, np.repeat(range(50), 20))
  assert grouped.mean == pytest.approx(alone.mean)
  widths = [estimate.high - estimate.low for estimate in (alone, grouped)]
  assert widths[1] / widths[0] == pytest.approx(np.sqrt(20), rel=0.15)


def test_missing_values_are_left_out():
  assert report.bootstrap([1.0, None, 3.0, math.nan])[::3] == (2.0, 2)
  assert math.isnan(report.bootstrap([None]).mean)


def test_the_same_results_give_the_same_interval(rng):
  values = rng.normal(size=30)
  assert report.bootstrap(values) == report.bootstrap(values)


def test_a_paired_difference_is_narrower_than_two_intervals(rng):
  images = rng.normal(0, 5, 200)  # images differ far more than methods do
  first, second = results(images), results(images + 1 + rng.normal(0, 0.1, 200))
  estimate = report.difference(first, second, 'l1')
  assert estimate.mean == pytest.approx(1, abs=0.05) and estimate.low > 0.9
  assert report.bootstrap(images).high - report.bootstrap(images).low > 1


def test_a_difference_is_of_common_images():
  first, second = results([1.0, 2.0, None]), results([2.0, None, 5.0])
  assert report.difference(first, second, 'l1')[::3] == (1.0, 1)
  assert report.difference(first, [{'id': 'x', 'l1': 1.0}], 'l1').count == 0


def test_a_table_has_a_row_a_method_and_says_how_metrics_are_made():
  rows = {'ours': results([0.5, 0.5]), 'other': results([0.25, 0.25]), 'none': results([None])}
  assert report.metrics_of(rows) == ['l1']
  summary = report.summarize(rows, ['l1'])
  lines = report.markdown(summary, ['l1'], {'l1': 'over 0..1'}).splitlines()
  assert lines[2:5] == ['| method | images | l1 |', '| --- | --- | --- |',
                        '| ours | 2 | 0.500 (0.500 to 0.500) |']  # fmt: skip
  assert lines[5:7] == ['| other | 2 | 0.250 (0.250 to 0.250) |', '| none | 0 | - |']
  assert lines[-1] == '* l1: over 0..1'


@pytest.mark.parametrize(
  ('value', 'shown'), [(0.0, '0'), (123.456, '123'), (12.345, '12.3'), (0.0123456, '0.0123')]
)
def test_numbers_have_three_digits(value, shown):
  assert report.text(Estimate(value, value, value, 1)) == f'{shown} ({shown} to {shown})'


def test_the_csv_holds_every_estimate(tmp_path):
  summary = report.summarize({'a, b': results([1.0, 2.0])}, ['l1'])
  report.write_csv(tmp_path / 'x.csv', summary)
  with (tmp_path / 'x.csv').open(newline='') as file:
    (line,) = csv.DictReader(file)
  assert line['method'] == 'a, b' and float(line['mean']) == 1.5 and line['images'] == '2'


def test_a_plot_is_a_finished_png(tmp_path):
  point = lambda x: Point(Estimate(x, x - 0.1, x + 0.1, 5), Estimate(x, x, x, 5), f'at {x}')
  empty = Point(Estimate(math.nan, math.nan, math.nan, 0), Estimate(1, 1, 1, 1), '')
  curves = {'ours': [point(0.1), point(0.2), empty], 'nothing': [empty]}
  report.plot(tmp_path / 'x.png', curves, ('direction', 'image similarity'), 'figure 8')
  image = np.asarray(Image.open(tmp_path / 'x.png').convert('RGB'))
  assert (
    image.min() < 50 and image.max() == 255 and list(tmp_path.iterdir()) == [tmp_path / 'x.png']
  )
