"""Packing: rows that come back, their sizes, and broken rows and files."""

import dataclasses
import io
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_pairs
from PIL import Image

from ip2p_jax.data import shard_writing, shards
from ip2p_jax.data.pack import pack
from ip2p_jax.data.rows import Pair, Row
from ip2p_jax.errors import InputError

QUIET = {'say': lambda line: None, 'workers': 0}
BYTES = 10_000  # of a shard, so that a few rows fill several


@pytest.fixture(scope='module')
def rows():
  return tiny_pairs.rows(12)


def encoded(array, form='PNG', **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array).save(file, form, **options)
  return file.getvalue()


def decoded(file: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(file)))


@dataclasses.dataclass
class Broken:
  """A source with broken rows; picklable, as sources must be."""

  rows: list
  broken: tuple = ()

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    if i in self.broken:
      raise InputError(f'photos.jsonl: line {i + 1}: the file is gone')
    return self.rows[i]


# Reading back


def test_rows_come_back_as_they_were(tmp_path, rng):
  many = tuple(tiny_pairs.pair(i) for i in range(3))
  odd = Row('a: line 1', ('turn it left', 'ein Täuschungsmanöver\0'), many, False, 'this', 'that')
  rows = [odd, *tiny_pairs.rows(7, pairs=2)]
  pack({'train': rows, 'test': rows[:2]}, tmp_path / 'set', shard_bytes=BYTES, **QUIET)
  source = shards.open_shards(tmp_path / 'set', 'train')
  assert len(source) == 8
  assert {i: source[i] for i in rng.permutation(8)} == dict(enumerate(rows))
  assert list(source) == rows and source[-1] == rows[-1]
  assert list(shards.open_shards(tmp_path / 'set', 'test')) == rows[:2]


def test_captioned_images_have_no_input(tmp_path, rows):
  captioned = [row._replace(pairs=(Pair(None, row.pairs[0].edited_image),)) for row in rows]
  pack({'train': captioned}, tmp_path / 'set', **QUIET)
  assert list(shards.open_shards(tmp_path / 'set', 'train')) == captioned


def test_an_absent_split_is_empty(tmp_path, rows):
  pack({'train': rows, 'test': []}, tmp_path / 'set', **QUIET)
  assert len(shards.open_shards(tmp_path / 'set', 'validation')) == 0
  assert len(shards.open_shards(tmp_path / 'set', 'test')) == 0
  with pytest.raises(InputError, match="'valid' is unknown"):
    shards.open_shards(tmp_path / 'set', 'valid')


def test_tensorflow_datasets_reads_the_folder(tmp_path, rows):
  pack({'train': rows}, tmp_path / 'set', shard_bytes=BYTES, **QUIET)
  builder = tfds.builder_from_directory(tmp_path / 'set')
  assert builder.info.splits['train'].num_shards > 1
  assert builder.info.metadata['kind'] == 'images'
  source = builder.as_data_source(split='train')
  assert len(source) == 12
  example = source[5]
  assert example['instructions'] == [rows[5].instructions[0].encode()]
  np.testing.assert_array_equal(
    example['pairs']['edited_image'][0], decoded(rows[5].pairs[0].edited_image)
  )


def test_a_source_is_pickled_without_its_open_files(tmp_path, rows):
  pack({'train': rows}, tmp_path / 'set', shard_bytes=BYTES, **QUIET)
  source = shards.open_shards(tmp_path / 'set', 'train')
  first = source[0]
  again = pickle.loads(pickle.dumps(source))
  assert again[0] == first and again[11] == source[11]


def test_the_description_has_kind_splits_and_settings(tmp_path, rows):
  pack({'train': rows, 'validation': rows[:3]}, tmp_path / 'set', size=256, **QUIET)
  description = shards.describe(tmp_path / 'set')
  assert description['kind'] == 'images' and description['fingerprint'] is None
  assert description['splits'] == {'train': 12, 'validation': 3}
  assert description['settings'] == {'size': 256, 'quality': 95, 'has_input': True}
  assert description['skipped'] == []


# Sizes


def test_large_images_get_a_short_side_of_nine_eighths(tmp_path, rng):
  large, small = rng.integers(0, 256, (2, 90, 60, 3), np.uint8), tiny_pairs.pair(0, (60, 40))
  large = Pair(encoded(large[0]), encoded(large[1]))
  pack({'train': [Row('r', ('x',), (large, small))]}, tmp_path / 'set', size=40, **QUIET)
  big, little = shards.open_shards(tmp_path / 'set', 'train')[0].pairs
  assert decoded(big.input_image).shape == decoded(big.edited_image).shape == (68, 45, 3)
  assert little == small  # byte for byte: neither enlarged nor encoded again


def test_lossless_shrinking_is_lanczos_upright_on_white(tmp_path, rng):
  array = rng.integers(0, 256, (80, 120, 4), np.uint8)
  exif = Image.Exif()
  exif[274] = 6  # turned to the right
  pair = Pair(*[encoded(array, exif=exif)] * 2)
  options = {'size': 32, 'quality': None} | QUIET
  pack({'train': [Row('r', ('x',), (pair,))]}, tmp_path / 'set', **options)
  packed = shards.open_shards(tmp_path / 'set', 'train')[0].pairs[0]
  image = Image.fromarray(array).transpose(Image.Transpose.ROTATE_270)
  image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
  expected = np.asarray(image.resize((36, 54), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(decoded(packed.input_image), expected)


def test_jpeg_is_close_to_lossless(tmp_path):
  row = tiny_pairs.rows(1, size=(300, 200))
  for quality in (95, None):
    pack({'train': row}, tmp_path / f'{quality}', size=64, quality=quality, **QUIET)
  jpeg, png = (
    decoded(shards.open_shards(tmp_path / name, 'train')[0].pairs[0].edited_image).astype(float)
    for name in ('95', 'None')
  )
  assert 0 < np.sqrt(np.mean((jpeg - png) ** 2)) < 1.5


# Broken rows and files


def test_broken_rows_stop_the_pack(tmp_path, rows):
  bad = [*rows]
  bad[3] = rows[3]._replace(pairs=(Pair(rows[3].pairs[0].input_image[:300], b'nothing'),))
  with pytest.raises(InputError, match=r'2 broken rows, .*row 3: the input image.*line 6'):
    pack({'train': Broken(bad, (5,))}, tmp_path / 'set', **QUIET)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'instructions': ()}, 'row 4: has no instruction'),
    ({'pairs': ()}, 'row 4: has no image'),
    ({'pairs': (Pair(None, tiny_pairs.photo(1)),)}, 'row 4: lacks its input image'),
    (
      {'pairs': (Pair(tiny_pairs.photo(1), tiny_pairs.photo(2, (64, 96))),)},
      'row 4: .* same shape',
    ),
    ({'caption': '\ud800'}, 'row 4: holds text that is not Unicode'),
  ],
)
def test_rows_that_training_would_refuse_are_not_packed(tmp_path, rows, change, message):
  bad = [*rows[:4], rows[4]._replace(**change), *rows[5:]]
  with pytest.raises(InputError, match=message):
    pack({'train': bad}, tmp_path / 'set', **QUIET)


def test_max_corrupt_rows_are_left_out_and_listed(tmp_path, rows):
  lines, options = [], {'max_corrupt': 2, 'shard_bytes': BYTES, 'workers': 0}
  options['say'] = lines.append
  summary = pack({'train': Broken(rows, (0, 7))}, tmp_path / 'set', **options)
  assert summary.rows == {'train': 10}
  assert len(summary.skipped) == 2 and 'line 8: the file is gone' in summary.skipped[1]
  assert shards.describe(tmp_path / 'set')['skipped'] == list(summary.skipped)
  assert 'left out: photos.jsonl: line 1: the file is gone' in lines
  source = shards.open_shards(tmp_path / 'set', 'train')
  assert list(source) == [row for i, row in enumerate(rows) if i not in (0, 7)]


def test_a_file_of_broken_rows_only_is_an_empty_file(tmp_path, rows):
  options = {'max_corrupt': 6, 'shard_bytes': 1} | QUIET  # one row per file
  pack({'train': Broken(rows, (0, 1, 5, 11))}, tmp_path / 'set', **options)
  source = shards.open_shards(tmp_path / 'set', 'train')
  assert [row.name for row in source] == [rows[i].name for i in (2, 3, 4, 6, 7, 8, 9, 10)]
  assert len(tfds.builder_from_directory(tmp_path / 'set').as_data_source(split='train')) == 8


def test_mended_rows_are_packed_later(tmp_path, rows):
  options = {'shard_bytes': BYTES} | QUIET
  with pytest.raises(InputError, match='line 9'):
    pack({'train': Broken(rows, (8,))}, tmp_path / 'set', **options)
  assert pack({'train': rows}, tmp_path / 'set', **options).skipped == ()
  assert list(shards.open_shards(tmp_path / 'set', 'train')) == rows


def test_a_damaged_record_breaks_only_its_row(tmp_path, rows):
  pack({'train': rows}, tmp_path / 'set', **QUIET)
  (file,) = (tmp_path / 'set').glob('edits-*')
  content = bytearray(file.read_bytes())
  content[content.index(rows[6].pairs[0].edited_image) + 100] ^= 1
  file.write_bytes(content)
  source = shards.open_shards(tmp_path / 'set', 'train')
  with pytest.raises(InputError, match='00000-of-00001: record 6 cannot be read'):
    source[6]
  assert source[5] == rows[5] and source[7] == rows[7]


def test_a_missing_or_short_file_is_named(tmp_path, rows):
  pack({'train': rows}, tmp_path / 'set', shard_bytes=BYTES, **QUIET)
  file = sorted((tmp_path / 'set').glob('edits-*'))[1]
  os.truncate(file, 5000)
  source = shards.open_shards(tmp_path / 'set', 'train')
  assert source[0] == rows[0]
  with pytest.raises(InputError, match=f'{file.name}: record 0 cannot be read'):
    source[shard_writing.shards_of(shards.read_plan(tmp_path / 'set'))[1].start]
  file.unlink()
  with pytest.raises(InputError, match=f'{file.name}: is missing'):
    shards.open_shards(tmp_path / 'set', 'train')


# Holdout


def test_holdout_takes_the_last_rows(tmp_path, rows):
  pack({'train': rows}, tmp_path / 'set', holdout=0.25, **QUIET)
  assert list(shards.open_shards(tmp_path / 'set', 'train')) == rows[:9]
  assert list(shards.open_shards(tmp_path / 'set', 'validation')) == rows[9:]


def test_a_source_with_a_validation_split_keeps_it(tmp_path, rows):
  sources = {'train': rows[:5], 'validation': rows[5:8]}
  summary = pack(sources, tmp_path / 'set', holdout=0.25, **QUIET)
  assert summary.rows == {'train': 5, 'validation': 3}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'holdout': 1.0}, 'holdout'),
    ({'size': 4}, 'size is 4'),
    ({'quality': 0}, 'quality is 0'),
    ({'shard_bytes': 0}, 'shard_bytes is 0'),
    ({'workers': -1}, 'workers is -1'),
  ],
)
def test_impossible_values_are_refused(tmp_path, rows, options, message):
  with pytest.raises(InputError, match=message):
    pack({'train': rows}, tmp_path / 'set', **(QUIET | options))
  assert not (tmp_path / 'set').exists()


def test_an_empty_source_is_refused(tmp_path):
  with pytest.raises(InputError, match='no rows'):
    pack({'train': []}, tmp_path / 'set', **QUIET)
