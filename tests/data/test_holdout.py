"""Held out rows: whole groups of rows that show the same image, in every layout."""

import json

import numpy as np
import pyarrow
import pytest
import tiny_pairs
from pyarrow import parquet

from ip2p_jax.data import holdout, shards
from ip2p_jax.data.pack import pack
from ip2p_jax.data.rows import SPLITS, Pair
from ip2p_jax.data.sources import open_source, open_splits
from ip2p_jax.errors import InputError

QUIET = {'say': lambda line: None, 'workers': 0}
ROWS = 24


def image(i):
  return tiny_pairs.photo(i, (40, 40))


# Numbers of the input and the edited image of row i; every group has 2 to 4 rows.
TOGETHER = {
  'several instructions': lambda i: (i // 3, 100 + i),
  'turns': lambda i: (10 * (i // 4) + i % 4, 10 * (i // 4) + i % 4 + 1),
  'there and back': lambda i: (i // 2 * 2 + i % 2, i // 2 * 2 + 1 - i % 2),
  'far apart': lambda i: (i % 12, 100 + i),
}


def write_parquet(folder, numbers):
  table = {
    'input_image': [{'bytes': image(i), 'path': 'image.png'} for i, _ in numbers],
    'edited_image': [{'bytes': image(i), 'path': 'image.png'} for _, i in numbers],
    'instruction': [f'edit {i}' for i in range(len(numbers))],
  }
  folder.mkdir()
  parquet.write_table(pyarrow.table(table), folder / 'a.parquet', row_group_size=5)


def write_metadata(folder, numbers):
  folder.mkdir()
  for number in {number for pair in numbers for number in pair}:
    (folder / f'{number}.jpg').write_bytes(image(number))
  lines = [
    {'input_image': f'{before}.jpg', 'edited_image': f'{after}.jpg', 'instruction': f'edit {i}'}
    for i, (before, after) in enumerate(numbers)
  ]
  (folder / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))


def write_original(folder, numbers):
  for i, pair in enumerate(numbers):
    place = folder / f'{i:07d}'
    place.mkdir(parents=True)
    (place / 'prompt.json').write_text(json.dumps({'edit': f'edit {i}'}))
    for side, number in enumerate(pair):
      (place / f'7_{side}.jpg').write_bytes(image(number))


def write_shards(folder, numbers):
  write_parquet(folder.with_name('raw'), numbers)
  pack({'train': open_source(str(folder.with_name('raw')))}, folder, size=8, **QUIET)


WRITERS = {
  'parquet': write_parquet,
  'metadata': write_metadata,
  'original': write_original,
  'shards': write_shards,
}


def files_of(source):
  return {file for row in source for pair in row.pairs for file in pair}


@pytest.mark.parametrize('layout', WRITERS)
@pytest.mark.parametrize('together', TOGETHER)
def test_no_image_is_in_both_splits(tmp_path, layout, together):
  WRITERS[layout](tmp_path / 'set', [TOGETHER[together](i) for i in range(ROWS)])
  opened = open_splits(str(tmp_path / 'set'), holdout=0.25)
  assert [len(opened[split]) for split in SPLITS] == [ROWS, 0, 0]
  summary = pack(opened, tmp_path / 'packed', holdout=0.25, **QUIET)
  train, validation = (list(shards.open_shards(tmp_path / 'packed', x)) for x in SPLITS[:2])
  assert 4 <= len(validation) <= 6 and summary.rows == {
    'train': ROWS - len(validation), 'validation': len(validation),
  }  # fmt: skip
  assert not files_of(train) & files_of(validation)
  texts = [row.instructions[0] for row in train + validation]
  assert sorted(texts) == sorted(f'edit {i}' for i in range(ROWS))


def test_rows_with_one_image_id_stay_together(tmp_path):
  table = {
    'img_id': [(i + 1) % 5 for i in range(10)],  # edits 4 and 9 have image 0
    'source_img': [image(i) for i in range(10)],
    'target_img': [image(100 + i) for i in range(10)],
    'instruction': [f'edit {i}' for i in range(10)],
  }
  (tmp_path / 'set').mkdir()
  parquet.write_table(pyarrow.table(table), tmp_path / 'set' / 'a.parquet')
  for name, source in (
    ('direct', open_splits(str(tmp_path / 'set'), holdout=0.2)),
    ('again', None),  # packed first, then divided
  ):
    if source is None:
      pack(open_splits(str(tmp_path / 'set')), tmp_path / 'whole', **QUIET)
      source = open_splits(str(tmp_path / 'whole'), holdout=0.2)
    pack(source, tmp_path / name, holdout=0.2, **QUIET)
    held = shards.open_shards(tmp_path / name, 'validation')
    assert [row.instructions for row in held] == [('edit 4',), ('edit 9',)]


def test_prompts_with_one_photo_stay_together(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=10, pairs=1)
  for i in range(10):
    prompt = {'edit': f'edit {i}', 'image': f'photo-{i % 2}.jpg' if i < 4 else f'{i}.jpg'}
    (tmp_path / f'{i:07d}' / 'prompt.json').write_text(json.dumps(prompt))
  held = holdout.hold_out(open_source(str(tmp_path), all_train=True), 0.5)
  assert held.ranges == [[5, 10]]
  held = holdout.hold_out(open_source(str(tmp_path), all_train=True), 0.8)
  assert held.ranges == [[1, 2], [3, 10]]


def test_captions_of_one_image_stay_together():
  rows = [
    row._replace(pairs=(Pair(None, image(i // 2)),)) for i, row in enumerate(tiny_pairs.rows(8))
  ]
  assert holdout.hold_out(rows, 0.4).ranges == [[6, 8]]


def test_common_keys_connect_groups():
  cases = [
    ([[], [1], [], [2]], [0, 1, 2, 3]),
    ([[1], [2], [1, 2]], [0, 0, 0]),
    ([[1], [2], [3], [3, 1], [2]], [0, 1, 0, 0, 1]),
    ([[5], [4, 5], [3, 4], [2, 3], [9]], [0, 0, 0, 0, 4]),
  ]
  for keys, expected in cases:
    np.testing.assert_array_equal(holdout.groups(keys), expected)


@pytest.mark.parametrize(
  ('sizes', 'share', 'ranges'),
  [
    ([1] * 10, 0.25, [[8, 10]]),
    ([1] * 100, 0.29, [[71, 100]]),  # their product is 28.999999999999996
    ([1] * 10, 0.01, [[9, 10]]),  # at least one row
    ([6, 1, 3], 0.3, [[7, 10]]),
    ([1, 3, 6], 0.3, [[1, 4]]),  # the last group is larger than the share
    ([2, 5, 3, 1], 0.5, [[7, 11]]),
    ([5, 6, 5], 0.1, [[11, 16]]),  # no group fits, so the smallest
  ],
)
def test_the_last_groups_that_fit_are_held_out(sizes, share, ranges):
  numbers = np.repeat(np.arange(len(sizes)), sizes)
  rows = [
    row._replace(pairs=(Pair(image(numbers[i]), image(100 + i)),))
    for i, row in enumerate(tiny_pairs.rows(sum(sizes)))
  ]
  assert holdout.hold_out(rows, share).ranges == ranges


def test_rows_that_all_share_an_image_cannot_be_divided(tmp_path):
  rows = [row._replace(pairs=(Pair(image(0), image(1 + i)),))
          for i, row in enumerate(tiny_pairs.rows(4))]  # fmt: skip
  with pytest.raises(InputError, match=r'holdout is 0\.25, and all 4 rows belong together'):
    pack({'train': rows}, tmp_path / 'set', holdout=0.25, **QUIET)
  assert not (tmp_path / 'set').exists()


class Counted(list):
  """Counts how often a row is read."""

  reads = 0

  def __getitem__(self, i):
    self.reads += 1
    return super().__getitem__(i)


def test_later_runs_take_the_choice_of_the_first(tmp_path):
  rows = tiny_pairs.rows(20)
  rows[3] = rows[3]._replace(pairs=rows[19].pairs)
  options = {'holdout': 0.2, 'shard_bytes': 10_000} | QUIET
  pack({'train': rows}, tmp_path / 'one', **options)
  pack({'train': rows}, tmp_path / 'two', shard='0/2', **options)
  second = Counted(rows)
  pack({'train': second}, tmp_path / 'two', shard='1/2', **options)
  assert second.reads < 2 * 20  # the plan reads 16 + 4, and half of the rows are packed
  files = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
  assert files(tmp_path / 'one') == files(tmp_path / 'two')
  held = [row.name for row in shards.open_shards(tmp_path / 'one', 'validation')]
  assert held == [f'memory: row {i}' for i in (15, 16, 17, 18)]  # 19 shares an image with 3
  with pytest.raises(InputError, match=r'holdout was 0\.2 and is 0\.1 now'):
    pack({'train': rows}, tmp_path / 'one', **options | {'holdout': 0.1})


def test_holdout_replaces_the_splits_of_the_original(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=20, pairs=1)
  for share, expected in ((None, [18, 1, 1]), (0.0, [20, 0, 0]), (0.25, [20, 0, 0])):
    opened = open_splits(str(tmp_path), holdout=share)
    assert [len(opened[split]) for split in SPLITS] == expected


def test_a_validation_split_excludes_holdout(tmp_path):
  for name in ('train', 'val'):
    tiny_pairs.write_metadata(tmp_path / name, 4)
  with pytest.raises(InputError, match=r'has 4 rows for validation already; leave --holdout out'):
    open_splits(str(tmp_path), holdout=0.25)
  assert len(open_splits(str(tmp_path))['validation']) == 4
