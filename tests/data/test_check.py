"""Checking a data set: one line per problem, and never a traceback."""

import io
import json
import zlib

import numpy as np
import pytest
import tiny_pairs
from PIL import Image

from ip2p_jax import image_errors
from ip2p_jax.data.check import LATENTS, check
from ip2p_jax.data.pack import Form, packed
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.data.sources import open_source
from ip2p_jax.errors import InputError


@pytest.fixture
def metadata(tmp_path):
  return tiny_pairs.write_metadata(tmp_path / 'set', 40)


def run(path, **options):
  lines = []
  return check(str(path), report=lines.append, **options), lines


def png(size, mode='RGB', **options):
  file = io.BytesIO()
  Image.new(mode, size, 1).save(file, 'PNG', **options)
  return file.getvalue()


def latents(**changed):
  fields = {name: np.full((1, 2, 4, 4, 4), k, np.float16) for k, name in enumerate(LATENTS)}
  return LatentRow('memory: row 0', np.zeros((1, 77), np.int32), **(fields | changed))


def test_a_sound_data_set_gives_no_line(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=20, pairs=2)
  summary, lines = run(tmp_path)
  assert lines == []
  assert summary.splits == {'train': 18, 'validation': 1, 'test': 1}
  assert summary[1:] == (20, 40, 0, {})


def test_split_and_limit_choose_the_rows(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=40, pairs=1)
  assert run(tmp_path, split='test')[0].splits == {'test': 2}
  assert run(tmp_path, limit=3)[0].splits == {'train': 3, 'validation': 2, 'test': 2}


@pytest.mark.parametrize('workers', [1, 3])
def test_each_broken_row_is_one_line(metadata, workers):
  folder = metadata / 'pictures'
  broken = {
    2: ('input', tiny_pairs.photo(0)[:-600], 'the input image cannot be read'),
    5: ('edited', b'text', 'the edited image is not an image'),
    21: ('edited', tiny_pairs.photo(0, (96, 68)), 'the images differ in shape (96x64 and 96x68)'),
    33: ('input', png((7, 50)), 'the input image is 7x50; give at least 8x8 pixels'),
  }
  for i, (side, content, _) in broken.items():
    (folder / f'{i}_{side}.jpg').write_bytes(content)
  (folder / '8_edited.jpg').unlink()
  summary, lines = run(metadata, workers=workers)
  assert summary[1:] == (40, 39, 5, {})  # the row without a file counts no pair
  texts = {i: text for i, (_, _, text) in broken.items()} | {8: 'cannot read the image'}
  assert len(lines) == 5
  for line, (i, text) in zip(lines, sorted(texts.items()), strict=True):
    assert line.startswith(f'{metadata}/metadata.jsonl: line {i + 1}: {text}')
    assert '\n' not in line


@pytest.mark.parametrize('content', [b'', b'text', tiny_pairs.photo(0)[:-600], png((7, 50))])
def test_checking_and_packing_word_a_broken_image_alike(metadata, content):
  (metadata / 'pictures' / '0_edited.jpg').write_bytes(content)
  row = open_source(str(metadata), 'train')[0]
  with pytest.raises(InputError, match='edited image') as caught:
    packed(row, Form(size=None, quality=None, has_input=True))
  assert run(metadata, limit=1)[1] == [str(caught.value)]


def test_an_image_of_too_many_pixels_is_not_decoded(metadata, monkeypatch):
  content = bytearray(png((8, 8)))
  content[16:24] = (20_000).to_bytes(4, 'big') * 2  # width and height in the header
  content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
  (metadata / 'pictures' / '0_input.jpg').write_bytes(content)
  assert 'over 178,956,970 pixels' in run(metadata, limit=1)[1][0]
  monkeypatch.setattr(image_errors, 'MAX_PIXELS', 96 * 64 - 1)
  assert 'over 6,143 pixels' in run(metadata, limit=2)[1][1]


def test_shapes_are_those_of_upright_images(metadata):
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by 90 degrees
  (metadata / 'pictures' / '0_input.jpg').write_bytes(png((64, 96), exif=exif))
  (metadata / 'pictures' / '1_input.jpg').write_bytes(png((384, 264), 'RGBA'))  # 3 % off
  assert run(metadata, limit=2)[0][1:] == (2, 2, 0, {})


def test_a_suspicious_row_is_a_warning(metadata):
  folder = metadata / 'pictures'
  (folder / '0_edited.jpg').write_bytes((folder / '0_input.jpg').read_bytes())
  (folder / '1_input.jpg').write_bytes(tiny_pairs.photo(0, (48, 32)))
  table = [json.loads(line) for line in (metadata / 'metadata.jsonl').read_text().splitlines()]
  table[2]['edit_prompt'] = 'red ' * 75 + 'then blue'
  table[3]['edit_prompt'] = 'red ' * 75
  (metadata / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, table)))
  summary, lines = run(metadata)
  assert summary[1:] == (40, 40, 0, {'unchanged': 1, 'small': 1, 'long': 1})
  assert [line.removeprefix(f'{metadata}/metadata.jsonl: ') for line in lines] == [
    'line 1: warning: the images are the same file, so nothing is edited',
    'line 2: warning: the input image is only 48x32',
    "line 3: warning: the instruction is too long for CLIP, which ignores 'then blue'",
  ]


def test_many_warnings_of_a_kind_become_one_line(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=8, pairs=2)
  for file in tmp_path.glob('*/*_[01].jpg'):
    file.write_bytes(tiny_pairs.photo(int(file.stem[-1]), (48, 32)))
  summary, lines = run(tmp_path)
  assert summary.warnings == {'small': 32}
  assert len(lines) == 11
  assert lines[0].endswith('0000000: warning: the input image of pair 1 is only 48x32')
  assert lines[-1] == f'{tmp_path}: 22 more warnings like these (small)'


def test_captioned_images_need_no_input(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 5, columns=tiny_pairs.CAPTIONED)
  assert run(tmp_path, task='text_to_image')[0][1:] == (5, 5, 0, {})


def test_latents_must_be_finite_and_alike(monkeypatch):
  source = [
    latents(),
    latents(edited_mean=np.full((1, 2, 4, 4, 4), np.nan, np.float16)),
    latents(input_mean=np.zeros((1, 2, 4, 8, 4), np.float16)),
    latents(input_mean=None),
  ]
  monkeypatch.setattr('ip2p_jax.data.check.open_source', lambda *_: source)
  summary, lines = run('packed', split='train')
  assert summary[1:] == (4, 4, 2, {})
  assert [line.split(' is ')[0] for line in lines] == [
    'memory: row 0: edited_mean', 'memory: row 0: input_mean'
  ]  # fmt: skip


def test_progress_ends_with_everything(metadata):
  seen = []
  run(metadata, progress=lambda *numbers: seen.append(numbers))
  assert seen == [(16, 40), (32, 40), (40, 40)]


def test_a_missing_data_set_is_one_error(tmp_path):
  with pytest.raises(InputError, match='no such data set'):
    run(tmp_path / 'nowhere')
