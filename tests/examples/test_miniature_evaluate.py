"""The miniature's evaluation: the oracle as a scorer, the commands, what is shown."""

import evaluate
import judge_filter
import numpy as np
import oracle
import plots
import pytest
import tiny_models
import world
from PIL import Image

from ip2p_jax import weights
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.evaluation import protocols
from ip2p_jax.evaluation.scorers import Batch
from ip2p_jax.pipeline.scores import Scores


def noise(rng):
  return rng.integers(0, 256, (64, 64, 3), np.uint8)


# Measuring.


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp('held-out')
  world.write_held_out(folder, 6)
  return protocols.read_rows(str(folder), 'own')


def test_held_out_examples_are_rows_with_kinds(rows):
  examples = [world.example(seed, 'test') for seed in range(6)]
  assert [row.id for row in rows] == [*'012345']
  assert [row.group for row in rows] == [world.kind_of(one) for one in examples]
  assert [row.instruction for row in rows] == [one.instruction for one in examples]
  np.testing.assert_array_equal(rows[3].target(), world.picture(examples[3].edited_scene))


def test_the_oracle_scores_edits_as_it_judges_them(rows, rng):
  targets = np.stack([row.target() for row in rows])
  edits = np.stack([*targets[:4], rows[4].source(), noise(rng)])
  scores = oracle.scorer().score(Batch(edits, targets, ids=[row.id for row in rows]))
  assert scores['done'].tolist() == [1, 1, 1, 1, 0, 0]
  verdicts = [oracle.judge(world.example(i, 'test'), edit) for i, edit in enumerate(edits)]
  np.testing.assert_allclose(scores['kept'], [v.kept for v in verdicts], rtol=1e-6)


def test_the_oracle_does_not_compare_with_targets(rows):
  targets = np.stack([row.target() for row in rows])
  assert oracle.scorer().score(Batch(targets, targets)) == {}


# Showing.


def test_estimates_as_text():
  assert plots.text('done', plots.Estimate(0.874, 0.842, 0.9)) == '87% (84-90)'
  assert plots.text('kept', plots.Estimate(27.31, 26.9, 27.7)) == '27.3 dB (26.9-27.7)'
  assert plots.text('kept', plots.Estimate(np.nan, np.nan, np.nan)) == '-'
  assert plots.text('direction', plots.Estimate(0.25, 0.2, 0.3)) == '0.250 (0.200-0.300)'


def test_sheets_of_busy_images_are_small_enough_to_keep(tmp_path, rng):
  examples = [world.example(seed, 'test') for seed in range(16)]
  gallery = tmp_path / 'gallery.png'
  plots.gallery(gallery, examples, [noise(rng) for _ in examples], [True] * 16)
  assert gallery.stat().st_size <= plots.LIMIT
  plots.save_small(Image.fromarray(rng.integers(0, 256, (500, 900, 3), np.uint8)), gallery)
  assert gallery.stat().st_size <= plots.LIMIT


# As it is run.


@pytest.mark.slow
def test_the_whole_evaluation_runs_on_any_checkpoint(tmp_path):
  schedule = Schedule(prediction_type='v_prediction')
  for name in ('editor', 'other'):
    unet = tiny_models.TINY_UNET | {'in_channels': 8}
    weights.write(tiny_models.checkpoint(unet, schedule), tmp_path / name)
  words = ['--size', 'quick', '--ckpt', tmp_path / 'editor', '--out', tmp_path / 'out']
  words += ['--figures', tmp_path / 'figures', '--editors', tmp_path / 'editor', tmp_path / 'other']
  evaluate.evaluate(*evaluate.parse([str(word) for word in words]))
  figures = {file.name for file in (tmp_path / 'figures').iterdir()}
  parts = ('figure8', 'figure10', 'scales', 'samplers', 'fast', 'seeds', 'methods')
  plots = {f'{part}-{kind}.png' for part in parts for kind in ('clip', 'oracle')}
  assert figures == {'gallery.png', 'scale_grid.png'} | plots
  assert '| add | ' in (tmp_path / 'out' / 'defaults' / 'report.md').read_text()
  assert '| new phrasings | ' in (tmp_path / 'out' / 'defaults' / 'phrasings.md').read_text()


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
