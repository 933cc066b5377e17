"""The miniature's evaluation: CLIP's similarities, what is recorded and what is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench
import evaluate
import judge_filter
import numpy as np
import plots
import pytest
import tiny_models
import world

from ip2p_jax import weights
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.pipeline.scores import Scores

ROOT = Path(__file__).parents[2]
PARTS = ('done', 'kept', 'direction', 'consistency')
SMALL = evaluate.Size(
  *(8, 8, 4, 2, 4, 4, 4, 3, 4), (1.5, 3.0), (1.5, 2.0), (0.3, 0.6), (2.0, 4.0), (5, 10)
)


def checkpoint(channels):
  unet = tiny_models.TINY_UNET | {'in_channels': channels}
  return tiny_models.checkpoint(unet, Schedule(prediction_type='v_prediction'))


# Measuring.


class NoClip:
  """Says the same of every pair."""

  def scores(self, inputs, *_):
    of_each = lambda value: np.full(len(inputs), value)
    return Scores(of_each(0.2), of_each(0.2), of_each(0.25), of_each(0.75))


class Painter(bench.Bench):
  """Edits without networks: every third example is left as it was, the others are the truth."""

  calls = 0
  weights = 'painted'
  clip = NoClip()

  def _fingerprint(self, method):
    return f'{self.weights} {method}'

  def edit(self, setting, rows, **scales):
    Painter.calls += 1
    examples = [self.examples[row] for row in rows]
    return np.stack([
      world.picture(one.scene if row % 3 == 0 else one.edited_scene)
      for row, one in zip(rows, examples, strict=True)
    ])  # fmt: skip


@pytest.fixture
def painter(tmp_path):
  Painter.calls = 0
  paths = dict.fromkeys(('editor', 'base', 'clip', 'run'), tmp_path / 'none')
  return lambda count=8: Painter(paths, tmp_path / 'out', count, batch=4)


def test_a_point_is_one_line_with_a_value_per_example(painter, tmp_path):
  point = painter().measure(evaluate.DEFAULT, 6)
  (line,) = (tmp_path / 'out' / 'points.jsonl').read_text().splitlines()
  assert json.loads(line) == point
  assert point['done'] == [0, 1, 1, 0, 1, 1]
  assert [point[name] for name in evaluate.DEFAULTS] == list(evaluate.DEFAULTS.values())
  assert all(kept in (None, 60.0) for kept in point['kept'])


def test_what_is_recorded_is_not_measured_again(painter):
  first = painter().measure(evaluate.DEFAULT, 6)
  calls = Painter.calls
  assert painter().measure(evaluate.DEFAULT, 6) == first
  assert painter().measure(evaluate.DEFAULT, 4)['done'] == first['done'][:4]
  assert Painter.calls == calls


def test_more_examples_another_seed_or_other_weights_are_measured(painter, monkeypatch):
  painter().measure(evaluate.DEFAULT, 4)
  assert Painter.calls == 1
  painter().measure(evaluate.DEFAULT, 5)
  assert Painter.calls == 3  # two batches of up to four
  painter().measure(evaluate.DEFAULT._replace(seed=1), 4)
  assert Painter.calls == 4
  monkeypatch.setattr(Painter, 'weights', 'painted anew')
  painter().measure(evaluate.DEFAULT, 4)
  assert Painter.calls == 5


def test_seeds_are_averaged_and_do_not_narrow_the_interval():
  point = {'done': [1, 0, 1, 1], 'kept': [20.0, None, 24.0, 28.0]}
  point |= {'direction': [0.1, 0.2, 0.3, 0.4], 'consistency': [0.9] * 4}
  one, three = bench.summary([point]), bench.summary([point] * 3)
  assert one['done'].mean == 0.75
  assert one['kept'].mean == 24.0
  assert one['direction'].mean == pytest.approx(0.25)
  for name in PARTS:
    np.testing.assert_allclose(three[name], one[name])
  other = {**point, 'done': [0, 0, 0, 1]}
  assert bench.summary([point, other])['done'].mean == 0.5


# Showing.


def test_estimates_as_text():
  assert plots.text('done', plots.Estimate(0.874, 0.842, 0.9)) == '87% (84-90)'
  assert plots.text('kept', plots.Estimate(27.31, 26.9, 27.7)) == '27.3 dB (26.9-27.7)'
  assert plots.text('kept', plots.Estimate(np.nan, np.nan, np.nan)) == '-'
  assert plots.text('direction', plots.Estimate(0.25, 0.2, 0.3)) == '0.250 (0.200-0.300)'


def test_tables_and_figures_come_from_recorded_points(painter, tmp_path, capsys):
  figures = tmp_path / 'figures'
  evaluate.main(painter(), SMALL, figures)
  recorded = (tmp_path / 'out' / 'points.jsonl').read_text()
  tables = (tmp_path / 'out' / 'tables.md').read_text()
  assert '| **all** | 8 | 62% ' in tables  # five of eight
  assert '| new phrasings | 4 |' in tables
  assert '| SDEdit, 0.6 | 62% ' in tables
  assert 'at 0 of 2 strengths' in tables  # the same edits are not better edits
  assert '| heun | ' in tables
  assert '| guided in 0.2 to 0.8 (' in tables
  assert 'no training run at' in capsys.readouterr().out
  names = ('gallery', 'scale_grid', 'scales', 'trade_off', 'samplers')
  assert {path.name for path in figures.iterdir()} == {f'{name}.png' for name in names}
  assert all(path.stat().st_size <= plots.LIMIT for path in figures.iterdir())

  (tmp_path / 'out' / 'tables.md').unlink()
  evaluate.main(painter(), SMALL, figures)
  assert (tmp_path / 'out' / 'tables.md').read_text() == tables
  assert (tmp_path / 'out' / 'points.jsonl').read_text() == recorded


def test_one_part_leaves_the_tables_of_the_others(painter, tmp_path):
  figures = tmp_path / 'figures'
  evaluate.main(painter(), SMALL, figures, only='seeds')
  seeds = (tmp_path / 'out' / 'tables.md').read_text()
  assert 'By seed of the noise' in seeds
  evaluate.main(painter(), SMALL, figures, only='samplers')
  both = (tmp_path / 'out' / 'tables.md').read_text()
  assert seeds in both
  assert 'by sampler and steps' in both


def test_sheets_of_busy_pictures_are_small_enough_to_keep(tmp_path, rng):
  noise = lambda *shape: rng.integers(0, 256, (*shape, 64, 64, 3), np.uint8)
  is_done = np.arange(42).reshape(7, 6) % 2 == 0
  grid, gallery = tmp_path / 'grid.png', tmp_path / 'gallery.png'
  plots.scale_grid(grid, noise(7, 6), is_done, (range(1, 8), range(1, 7)), 'add a star')
  plots.gallery(gallery, [(noise(), 'add a star', noise(), True, noise()) for _ in range(16)])
  assert max(grid.stat().st_size, gallery.stat().st_size) <= plots.LIMIT


# As it is run.


def run(*arguments):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, str(ROOT / 'examples' / 'miniature' / 'evaluate.py'), *arguments]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_mistakes_are_one_sentence(tmp_path):
  for arguments in (['--ckpt', tmp_path / 'none'], ['--clip', tmp_path], ['--count', '0']):
    done = run(*map(str, arguments), '--quick', '--out', str(tmp_path / 'out'))
    assert done.returncode == 2
    assert done.stderr.count('\n') == 1
    assert done.stderr.startswith('evaluate.py: error: ')


@pytest.mark.slow
def test_the_whole_evaluation_runs_on_any_checkpoint(tmp_path):
  for name, channels in (('editor', 8), ('base', 4)):
    weights.write(checkpoint(channels), tmp_path / name)
  (tmp_path / 'clip').mkdir()
  tiny_models.write_clip(tmp_path / 'clip')
  places = {
    'ckpt': 'editor', 'base': 'base', 'clip': 'clip', 'run': 'run', 'out': 'out', 'figures': 'shown'
  }  # fmt: skip
  done = run('--quick', *(f'--{name}={tmp_path / place}' for name, place in places.items()))
  assert done.returncode == 0, done.stderr
  tables = (tmp_path / 'out' / 'tables.md').read_text()
  assert '| **all** | 16 | 0% ' in tables
  assert len(list((tmp_path / 'shown').iterdir())) == 5


# What the filter knows.


def test_a_score_that_is_higher_in_right_pairs_has_a_high_auc():
  is_right = np.array([True, True, False, False])
  assert judge_filter.auc(np.array([3.0, 4.0, 1.0, 2.0]), is_right) == 1
  assert judge_filter.auc(np.array([1.0, 1.0, 1.0, 1.0]), is_right) == 0.5
  assert judge_filter.auc(np.array([1.0, 3.0, 2.0, 2.0]), is_right) == 0.5


def test_right_pairs_are_counted_among_the_kept_and_the_removed(tmp_path):
  is_right = np.array([True, True, False, False, False])
  kept = np.array([30.0, 20.0, 10.0, np.nan, 20.0])
  scores = {name: np.array([0.9, 0.9, 0.9, 0.9, 0.1]) for name in Scores._fields}
  kinds = np.array(['add', 'add', 'night', 'night', 'night'])
  lines = judge_filter.report(kinds, scores, is_right, kept).splitlines()
  cells = {line.split('|')[1].strip(): line.split('|')[2:-1] for line in lines if line}
  assert [cell.strip()[:3] for cell in cells['all']] == ['5', '40%', '20.']
  row = cells['kept by thresholds of the factory']
  assert [cell.strip()[:3] for cell in row] == ['4', '50%', '20.']
  assert [cell.strip()[:2] for cell in cells['removed by them']] == ['1', '0%', '-']
  assert [cell.strip() for cell in cells['night']] == ['3', '0%', '67%', '67%']
  judge_filter.draw(tmp_path / 'filter.png', scores, is_right)
  assert (tmp_path / 'filter.png').stat().st_size > 1000
