"""Folders of edits have the names that the protocols' own scripts open."""

import os
from pathlib import Path

import numpy as np
import protocol_data
import pytest
import tiny_pairs
from PIL import Image

from ip2p_jax import images
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.layouts import find_edits, open_edit, write_edit
from ip2p_jax.evaluation.protocols import read_rows

EDIT = Image.new('RGB', (96, 64), (10, 200, 30))


def written(tmp_path, protocol, data=None, folder='edits'):
  """The names of all files of a folder with an edit of every row."""
  rows = read_rows(str(data or tmp_path / 'data'), protocol)
  for row in rows:
    write_edit(tmp_path / folder, row, EDIT)
  found = find_edits(tmp_path / folder, rows)
  assert [tmp_path / folder / row.file for row in rows] == list(found.values())
  return names(tmp_path / folder)


def names(folder):
  return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob('*') if file.is_file())


# MagicBrush: the rules of the authors' image_eval.py, restated


def generated(folder, session):
  """The script's files of all turns, and of the last turn."""
  files = [name for name in os.listdir(folder / session) if '.png' in name and 'mask' not in name]
  number = lambda name: int(''.join(filter(str.isdigit, name)))
  if len(files) == 1:
    assert '_1' in files[0]
    return files, files[0]
  every = sorted([f for f in files if '_1' in f] + [f for f in files if 'inde_' in f], key=number)
  return every, sorted([f for f in files if 'iter_' in f], key=number)[-1]


def test_both_magicbrush_protocols_share_a_folder(tmp_path):
  protocol_data.magicbrush(tmp_path / 'data')
  written(tmp_path, 'magicbrush')
  assert written(tmp_path, 'magicbrush-multi') == [
    '139/139_1.png',
    '139/139_inde_2.png',
    '139/139_inde_3.png',
    '139/139_iter_2.png',
    '139/139_iter_3.png',
    '30/30_1.png',
  ]
  folder = tmp_path / 'edits'
  assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / 'data' / 'images'))
  assert generated(folder, '30') == (['30_1.png'], '30_1.png')
  turns = ['139_1.png', '139_inde_2.png', '139_inde_3.png']
  assert generated(folder, '139') == (turns, '139_iter_3.png')


# The others


def test_pie_edits_keep_the_path_and_format_of_the_source(tmp_path):
  protocol_data.pie(tmp_path / 'data')
  assert written(tmp_path, 'pie') == [
    f'annotation_images/{name}' for name in names(tmp_path / 'data' / 'annotation_images')
  ]
  with Image.open(tmp_path / 'edits/annotation_images/0_random_140/000000000000.jpg') as image:
    assert image.format == 'JPEG'


def test_gedit_edits_have_the_judges_source_beside_them(tmp_path):
  protocol_data.gedit(tmp_path / 'data')
  rows = [('background_change', 'cn', 'k0'), ('background_change', 'en', 'k0')]
  rows += [('subject-add', 'en', 'k2')]
  assert written(tmp_path, 'gedit') == sorted(
    f'fullset/{kind}/{language}/{key}{end}.png'
    for kind, language, key in rows
    for end in ('', '_SRCIMG')
  )
  with Image.open(tmp_path / 'edits/fullset/subject-add/en/k2_SRCIMG.png') as image:
    np.testing.assert_array_equal(np.asarray(image), protocol_data.photo(2))


def test_imgedit_and_emu_edits_are_named_by_their_key(tmp_path):
  protocol_data.imgedit(tmp_path / 'imgedit')
  assert written(tmp_path, 'imgedit', tmp_path / 'imgedit') == ['1082.png', '673.png']
  protocol_data.emu(tmp_path / 'emu')
  edits = written(tmp_path, 'emu', tmp_path / 'emu', 'of emu')
  assert edits == ['100.png', '101.png', '102.png']


def test_the_originals_edits_are_named_by_prompt_and_seed(tmp_path):
  tiny_pairs.write_original(tmp_path / 'data', prompts=20, pairs=1)
  assert written(tmp_path, 'paper') == ['0000019/100.png']


def test_edits_carry_their_settings(tmp_path):
  (row,) = read_rows(str(tiny_pairs.write_metadata(tmp_path, 1)), 'own')
  file = write_edit(tmp_path / 'edits', row, EDIT, {'seed': 3})
  assert images.read_settings(file) == {'seed': 3}
  assert open_edit(file, 'own').size == EDIT.size


def test_edits_of_another_method_may_be_of_another_kind(tmp_path):
  rows = read_rows(str(tiny_pairs.write_metadata(tmp_path, 2)), 'own')
  for row, end in zip(rows, ('.jpg', '.webp'), strict=True):
    EDIT.save((tmp_path / row.file).with_suffix(end))
  assert [file.name for file in find_edits(tmp_path, rows).values()] == ['00000.jpg', '00001.webp']


def test_missing_edits_are_counted_and_one_is_named(tmp_path):
  rows = read_rows(str(tiny_pairs.write_metadata(tmp_path, 5)), 'own')
  write_edit(tmp_path / 'edits', rows[0], EDIT)
  message = r'--outputs .*edits: 4 of 5 edits are missing, such as 00001\.png'
  with pytest.raises(InputError, match=message):
    find_edits(tmp_path / 'edits', rows)


def test_a_pie_strip_ends_in_the_edit(tmp_path):
  strip = Image.new('RGB', (4 * 512, 512 + 6), 'red')
  strip.paste((0, 0, 255), (3 * 512, 6, 4 * 512, 518))
  strip.save(tmp_path / 'strip.png')
  edit = open_edit(tmp_path / 'strip.png', 'pie')
  assert edit.size == (512, 512) and edit.getcolors() == [(512 * 512, (0, 0, 255))]
  assert open_edit(tmp_path / 'strip.png', 'emu').size == strip.size


def test_a_small_pie_strip_is_refused(tmp_path):
  EDIT.save(tmp_path / 'a.png')
  with pytest.raises(InputError, match='is 96x64; PIE-Bench counts square edits'):
    open_edit(tmp_path / 'a.png', 'pie')


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
  (row,) = read_rows(str(tiny_pairs.write_metadata(tmp_path, 1)), 'own')
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='cannot be made'):
    write_edit(tmp_path / 'file', row, EDIT)
