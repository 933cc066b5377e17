"""Edits of a protocol's rows by a method, and their scores, also after a kill."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import run, scorers
from ip2p_jax.evaluation.protocols import EditRow
from ip2p_jax.evaluation.scores import Description

SIZES = [(32, 32), (48, 32), (32, 32), (32, 32), (48, 32)]


def image(i, size):
  rng = np.random.default_rng(i)
  return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def a_row(i, size=(32, 32), **fields):
  return EditRow(f'row {i}', f'{i}.png', lambda: image(i, size), f'make it {i}', **fields)


@pytest.fixture
def rows():
  return [a_row(i, size) for i, size in enumerate(SIZES)]


class Darker:
  """A method: takes 10 from each colour, and notes what it was asked for."""

  def __init__(self):
    self.asked = []

  def __call__(self, images, rows, numbers):
    self.asked += list(zip([row.id for row in rows], numbers, strict=True))
    return np.maximum(images, 10) - 10


def same(width, height):
  return width, height


def edits(folder):
  return {file.name: np.asarray(Image.open(file)) for file in folder.glob('*.png')}


def test_every_row_is_edited_in_batches_of_one_size(rows, tmp_path):
  method = Darker()
  run.make_edits(rows, method, tmp_path, same, batch_size=2)
  for i, size in enumerate(SIZES):
    expected = np.maximum(np.asarray(image(i, size)), 10) - 10
    np.testing.assert_array_equal(edits(tmp_path)[f'{i}.png'], expected)
  assert len(method.asked) == 6 and set(method.asked) == {(f'row {i}', i) for i in range(5)}


def test_only_missing_edits_are_made_again(rows, tmp_path):
  run.make_edits(rows, Darker(), tmp_path, same, batch_size=2)
  before = edits(tmp_path)
  (tmp_path / '3.png').unlink()
  method = Darker()
  run.make_edits(rows, method, tmp_path, same, batch_size=2)
  assert set(method.asked) == {('row 3', 3)}
  after = edits(tmp_path)
  assert all(np.array_equal(before[name], after[name]) for name in before)


def test_workers_share_rows_and_keep_sessions_together():
  rows = [a_row(0), a_row(1, turn=2, previous='row 0'), a_row(2), a_row(3)]
  shares = [[number for number, _ in run.share_of(rows, (i, 2))] for i in range(2)]
  assert shares == [[0, 1, 3], [2]]


def test_a_later_turn_edits_the_turn_before(tmp_path):
  rows = [a_row(1, turn=2, previous='row 0'), a_row(0, is_last=False)]
  run.make_edits(rows, Darker(), tmp_path, same, batch_size=1)
  first, second = edits(tmp_path)['0.png'], edits(tmp_path)['1.png']
  np.testing.assert_array_equal(second, np.maximum(first, 10) - 10)


def scored(rows, folder, out, **options):
  return run.score_edits(rows, folder, 'own', [scorers.pixels()], out, batch_size=2, **options)


def test_scores_compare_an_edit_with_source_and_target(tmp_path):
  mask = np.zeros((32, 32), np.float32)
  mask[:16] = 1
  target = lambda: image(7, (32, 32))
  rows = [a_row(0, target=target, mask=lambda: mask, group='recolour'), a_row(1)]
  edit = np.asarray(image(0, (32, 32))).copy()
  edit[:16] = 0
  Image.fromarray(edit).save(tmp_path / '0.png')
  image(1, (32, 32)).save(tmp_path / '1.png')
  first, second = sorted(scored(rows, tmp_path, tmp_path), key=lambda line: line['id'])
  difference = lambda other: np.abs(edit / 255 - np.asarray(other) / 255).mean()
  assert first['l1'] == pytest.approx(difference(image(0, (32, 32))), abs=1e-5)
  assert first['target_l1'] == pytest.approx(difference(target()), abs=1e-5)
  assert first['l1_kept'] == 0 and first['psnr_kept'] == 100 and first['group'] == 'recolour'
  assert second['l1'] == 0 and second['psnr'] == 100 and 'target_l1' not in second
  assert first['source'] != second['source']


def test_a_killed_run_scores_every_row_once(rows, tmp_path):
  run.make_edits(rows, Darker(), tmp_path / 'edits', same)
  whole = scored(rows, tmp_path / 'edits', tmp_path)
  file = tmp_path / 'results-00000-of-00001.jsonl'
  content = file.read_text()
  file.write_text(content[: len(content) // 2])  # in the middle of a line
  again = scored(rows, tmp_path / 'edits', tmp_path)
  key = lambda line: line['id']
  assert sorted(again, key=key) == sorted(whole, key=key)
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert sorted(lines, key=key) == sorted(whole, key=key)


def test_results_of_all_workers_are_read(rows, tmp_path):
  run.make_edits(rows, Darker(), tmp_path / 'edits', same)
  for i in range(2):
    scored(rows, tmp_path / 'edits', tmp_path, shard=(i, 2))
  assert {line['id'] for line in run.read_results(tmp_path)} == {row.id for row in rows}


def test_another_evaluation_in_the_folder_is_refused(tmp_path):
  run.start(tmp_path / 'out', {'protocol': 'own', 'steps': 10})
  run.start(tmp_path / 'out', {'protocol': 'own', 'steps': 10})
  with pytest.raises(InputError, match=r'results of other settings \(steps\)'):
    run.start(tmp_path / 'out', {'protocol': 'own', 'steps': 20})


def test_a_missing_edit_is_named(rows, tmp_path):
  with pytest.raises(InputError, match=r'5 of 5 edits are missing, such as 0\.png'):
    scored(rows, tmp_path, tmp_path)


@pytest.mark.parametrize('damage', [
  '{"id": "row 0", "l', '\xff', '[1]', 'null', '{"l1": 1}', '{"id": ""}', '{"id": 3, "l1": 1}',
  '{"id": "row 0", "l1": "1"}', '{"id": "row 0", "l1": true}', '{"id": "row 0", "l1": NaN}',
  '{"id": "row 0", "group": []}',
])  # fmt: skip
def test_a_damaged_line_of_results_is_named(damage, rows, tmp_path):
  file = tmp_path / 'results-00000-of-00001.jsonl'
  file.write_bytes(b'{"id": "row 1", "l1": null}\n' + damage.encode('latin-1') + b'\n')
  message = rf'{file.name}: line 2 is damaged; remove this line'
  with pytest.raises(InputError, match=message):
    run.read_results(tmp_path)
  run.make_edits(rows, Darker(), tmp_path, same)
  with pytest.raises(InputError, match=message):
    scored(rows, tmp_path, tmp_path)


def scored_by(rows, out, *scores, batch_size=2):
  """Lines of the rows by scorers named 'mine', after edits by `Darker`."""
  mine = [scorers.Scorer(Description('mine', {}, '', ''), score) for score in scores]
  run.make_edits(rows, Darker(), out, same)
  return run.score_edits(rows, out, 'own', mine, out, batch_size=batch_size)


@pytest.mark.parametrize(('result', 'message'), [
  (np.zeros(2), 'gave ndarray; return a dict'),
  (None, 'gave NoneType; return a dict'),
  ({'size': np.zeros(3)}, r"'size' is float64 \[3\]; give one number for each of the 2 rows"),
  ({'size': np.zeros((2, 1))}, r"'size' is float64 \[2, 1\]"),
  ({'size': 1.0}, r"'size' is float64 \[\]"),
  ({'size': ['1', '2']}, "'size' is str"),
  ({'size': [None, 1]}, "'size' is object"),
  ({'size': [[1], [1, 2]]}, r'failed .ValueError: '),
  ({'turn': np.zeros(2)}, "'turn' is no name for a score"),
  ({3: np.zeros(2)}, '3 is no name for a score'),
])  # fmt: skip
def test_a_scorer_must_give_a_number_per_row(result, message, rows, tmp_path):
  with pytest.raises(InputError, match=f"row 'row .': scorer 'mine'.*{message}"):
    scored_by(rows, tmp_path, lambda batch: result)


def test_a_scorer_that_fails_is_named(rows, tmp_path):
  def failing(batch):
    raise KeyError('no such\nkey')

  with pytest.raises(InputError, match=r"scorer 'mine' failed \(KeyError: .*key.*\); correct it"):
    scored_by(rows, tmp_path, failing)


def test_two_scores_of_one_name_are_refused(rows, tmp_path):
  score = lambda batch: {'size': np.zeros(len(batch.edits))}
  with pytest.raises(InputError, match="the score 'size' is there already"):
    scored_by(rows, tmp_path, score, score)


@pytest.mark.parametrize(('name', 'value', 'stored'), [
  ('psnr', math.inf, 100), ('psnr', 130, 100), ('psnr', math.nan, None),
  ('my_psnr', 130, 130), ('my_psnr', math.inf, None), ('size', -math.inf, None), ('size', True, 1),
])  # fmt: skip
def test_only_psnr_has_a_bound(name, value, stored, tmp_path):
  (line,) = scored_by([a_row(0)], tmp_path, lambda batch: {name: [value, value]})
  assert line[name] == stored
  assert run.read_results(tmp_path) == [line]


def test_images_too_small_for_ssim_are_named(tmp_path):
  rows = [a_row(0, (8, 8))]
  run.make_edits(rows, Darker(), tmp_path, same)
  with pytest.raises(InputError, match=r"row 'row 0': images are 8x8; SSIM .*; give larger images"):
    scored(rows, tmp_path, tmp_path)
