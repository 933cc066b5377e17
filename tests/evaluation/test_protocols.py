"""Readers of published protocols, each on a small folder in its layout."""

import json
import math
import pickle

import numpy as np
import peers
import protocol_data
import pytest
import tiny_pairs
from PIL import Image

from ip2p_jax.errors import InputError
from ip2p_jax.evaluation import pie_bench
from ip2p_jax.evaluation.protocols import (
  READERS,
  gedit_size,
  paper,
  read_rows,
  without_equal_captions,
)

torch = peers.module('torch')


def same(opener, i):
  """Whether an opener gives photo i."""
  return np.array_equal(np.asarray(opener()), protocol_data.photo(i))


# The original's test split


def write_prompts(folder, count, written):
  """seeds.json of `count` prompts, and texts of the last `written`; without images."""
  random = np.random.default_rng(1)
  listed = [
    [f'{i:07d}', [str(number) for number in random.integers(0, 2**32, random.integers(1, 5))]]
    for i in range(count)
  ]
  for name, _ in listed[count - written :]:
    (folder / name).mkdir()
    texts = {'input': f'before {name}', 'edit': f'edit {name}', 'output': f'after {name}'}
    (folder / name / 'prompt.json').write_text(json.dumps(texts))
  (folder / 'seeds.json').write_text(json.dumps(listed))
  return listed


@pytest.mark.parametrize('seed', [0, 5])
@pytest.mark.parametrize('count', [500, 5000, 5019])
def test_the_originals_examples_are_torchs(tmp_path, count, seed):
  listed = write_prompts(tmp_path, count, count // 20 + 1)
  split = listed[math.floor((0.9 + 0.05) * count) :]
  torch.manual_seed(seed)
  expected = []
  for i in torch.randperm(len(split)).tolist():
    name, seeds = split[i]
    expected.append(f'{name}/{seeds[torch.randint(0, len(seeds), ()).item()]}')
    torch.randint(512, 512 + 1, ())
  assert [row.id for row in paper(str(tmp_path), seed=seed)] == expected
  few = paper(str(tmp_path), samples=10, seed=seed)
  assert [row.id for row in few] == expected[:10]


def test_the_originals_rows_open_their_pair(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=60, pairs=3, shards=2)
  rows = read_rows(str(tmp_path), 'paper')
  assert sorted(row.id.split('/')[1] for row in rows) == ['0000057', '0000058', '0000059']
  for row in rows:
    i, k = int(row.id.split('/')[1]), int(row.id.split('/')[2]) - 100
    assert row.instruction == tiny_pairs.instruction(i)
    assert row.source_caption == tiny_pairs.caption(i)
    assert row.target_caption == tiny_pairs.edited_caption(i)
    for opener, encoded in zip((row.source, row.target), tiny_pairs.pair(3 * i + k), strict=True):
      (tmp_path / 'one.jpg').write_bytes(encoded)
      with Image.open(tmp_path / 'one.jpg') as image:
        np.testing.assert_array_equal(np.asarray(opener()), np.asarray(image))


def test_more_samples_than_prompts_are_refused(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=60, pairs=1)
  with pytest.raises(InputError, match='has 3 prompts for the test; use --samples 3 or less'):
    read_rows(str(tmp_path), 'paper', samples=4)
  (tmp_path / 'filter.json').write_text('{}')
  with pytest.raises(InputError, match='has no test split'):
    read_rows(str(tmp_path), 'paper')


# MagicBrush


def test_single_turns_start_from_the_true_image(tmp_path):
  rows = read_rows(str(protocol_data.magicbrush(tmp_path)), 'magicbrush')
  assert [row.id for row in rows] == ['30_1', '139_1', '139_inde_2', '139_inde_3']
  assert [row.turn for row in rows] == [1, 1, 2, 3]
  assert not any(row.previous for row in rows) and all(row.is_last for row in rows)
  assert same(rows[0].source, 0) and same(rows[0].target, 1)
  for k, row in enumerate(rows[1:]):
    assert same(row.source, 10 + k) and same(row.target, 11 + k)
    assert row.instruction == f'do 139 {k + 1}'
  assert rows[2].source_caption == 'shows 139-output1.png'
  assert rows[2].target_caption == 'shows 139-output2.png'


def test_multi_turns_start_from_the_own_edit(tmp_path):
  rows = read_rows(str(protocol_data.magicbrush(tmp_path)), 'magicbrush-multi')
  assert [row.id for row in rows] == ['30_1', '139_1', '139_iter_2', '139_iter_3']
  assert [row.previous for row in rows] == ['', '', '139_1', '139_iter_2']
  assert [row.is_last for row in rows] == [True, False, False, True]
  assert same(rows[3].source, 10) and same(rows[3].target, 13)
  assert rows[3].source_caption == 'shows 139-input.png'
  assert rows[3].target_caption == 'shows 139-output3.png'


def test_a_transparent_part_of_a_mask_is_edited(tmp_path):
  rows = read_rows(str(protocol_data.magicbrush(tmp_path)), 'magicbrush')
  expected = np.zeros(protocol_data.SIZE[::-1], np.float32)
  expected[:4, :8] = 1
  np.testing.assert_array_equal(rows[1].mask(), expected)
  assert rows[2].mask is None


def test_a_mask_without_transparency_is_white_where_edited(tmp_path):
  protocol_data.magicbrush(tmp_path)
  mask = Image.new('RGBA', protocol_data.SIZE, 'black')
  mask.paste((255, 255, 255, 255), (0, 0, 8, 4))
  mask.save(tmp_path / 'images' / '139' / '139-mask1.png')
  found = read_rows(str(tmp_path), 'magicbrush')[1].mask()
  assert found[:4, :8].min() == 1 and found.sum() == 32


def test_later_turns_of_an_own_edit_have_no_mask(tmp_path):
  file = protocol_data.magicbrush(tmp_path) / 'edit_sessions.json'
  sessions = json.loads(file.read_text())
  for turn in sessions['139']:
    turn['mask'] = '139-mask1.png'
  file.write_text(json.dumps(sessions))
  masked = lambda protocol: [bool(row.mask) for row in read_rows(str(tmp_path), protocol)]
  assert masked('magicbrush-multi') == [True, True, False, False]
  assert masked('magicbrush') == [True] * 4


@pytest.mark.parametrize('turns', ['7', '[7]', '[{"input": "1-input.png"}]', '[{}]'])
def test_damaged_sessions_are_named(tmp_path, turns):
  (tmp_path / 'edit_sessions.json').write_text(f'{{"1": {turns}}}')
  with pytest.raises(InputError, match=r'edit_sessions\.json: 1: '):
    read_rows(str(tmp_path), 'magicbrush')


def test_magicbrush_captions_may_be_absent(tmp_path):
  protocol_data.magicbrush(tmp_path)
  (tmp_path / 'local_captions.json').unlink()
  assert read_rows(str(tmp_path), 'magicbrush')[0].target_caption == ''


# Emu Edit


def test_emu_rows_have_captions_and_no_target(tmp_path):
  rows = read_rows(str(protocol_data.emu(tmp_path)), 'emu')
  assert [row.id for row in rows] == ['100', '101', '102']
  assert [row.group for row in rows] == ['style', 'add', 'style']
  assert all(row.target is None and row.mask is None for row in rows)
  assert (rows[2].source_caption, rows[2].target_caption) == ('a 2', 'b 2')
  assert all(same(row.source, i) for i, row in enumerate(rows))
  assert [row.id for row in read_rows(str(tmp_path), 'emu', split='validation')] == ['103', '104']


def test_rows_with_equal_captions_can_be_dropped(tmp_path):
  rows = read_rows(str(protocol_data.emu(tmp_path)), 'emu')
  assert [row.id for row in without_equal_captions(rows)] == ['100', '102']


def test_rows_without_captions_are_not_dropped(tmp_path):
  rows = read_rows(str(protocol_data.imgedit(tmp_path)), 'imgedit')
  assert without_equal_captions(rows) == rows


def test_no_turn_of_a_session_is_dropped(tmp_path):
  rows = read_rows(str(protocol_data.magicbrush(tmp_path)), 'magicbrush-multi')
  with pytest.raises(InputError, match='--drop-equal-captions: of no use with sessions'):
    without_equal_captions(rows)


# PIE-Bench


def test_pie_rows_have_plain_prompts_and_kinds(tmp_path):
  rows = read_rows(str(protocol_data.pie(tmp_path)), 'pie')
  assert [row.id for row in rows] == ['000000000000', '911000000000']
  assert [row.group for row in rows] == ['random', 'change style']
  assert rows[0].source_caption == 'a round cake on a plate'
  assert rows[0].target_caption == 'a square cake on a blue plate'
  assert rows[0].instruction == 'make the cake square'
  assert rows[0].words == ('cake', 'cake')
  assert rows[0].source().size == (512, 512)


def test_pie_masks_are_runs_with_a_border(tmp_path):
  rows = read_rows(str(protocol_data.pie(tmp_path)), 'pie')
  expected = np.zeros(512 * 512, np.float32)  # as the authors' script loops over pixels
  for start, length in ((512 * 5 + 7, 3), (512 * 509 + 9, 10**6)):
    for j in range(min(length, 512 * 512 - start)):
      expected[start + j] = 1
  expected = expected.reshape(512, 512)
  expected[0, :] = expected[-1, :] = expected[:, 0] = expected[:, -1] = 1
  np.testing.assert_array_equal(rows[0].mask(), expected)
  border = pie_bench.mask([])
  assert border.sum() == 4 * 511 and not border[1:-1, 1:-1].any()


@pytest.mark.parametrize(('text', 'words'), [
  ('cat dog', ('cat', 'dog')), ('cat dog cow', ('cat', 'dog')), ('cat', None), ('', None),
  (None, None),
])  # fmt: skip
def test_pie_names_the_changed_words(text, words):
  assert pie_bench.words(text) == words


@pytest.mark.parametrize('runs', [None, [1, 2, 3], ['a', 'b']])
def test_a_damaged_pie_mask_is_refused(runs):
  with pytest.raises(InputError, match='m: its mask is not a list of starts and lengths'):
    pie_bench.mask(runs, 'm')


# GEdit-Bench and ImgEdit-Bench


def test_gedit_edits_the_raw_image_and_shows_the_other(tmp_path):
  rows = read_rows(str(protocol_data.gedit(tmp_path)), 'gedit')
  assert [row.id for row in rows] == [
    'background_change/en/k0',
    'background_change/cn/k0',
    'subject-add/en/k2',
  ]
  assert rows[1].instruction == '换背景'
  for i, row in enumerate(rows):
    raw = Image.fromarray(protocol_data.photo(10 + i))
    np.testing.assert_array_equal(row.source(), raw.resize((608, 416), Image.Resampling.BICUBIC))
    assert same(row.shown_source, i)


@pytest.mark.parametrize(('size', 'expected'), [
  ((1000, 1000), (512, 512)),
  ((600, 400), (608, 416)),
  ((400, 600), (384, 640)),
  ((1920, 1080), (704, 384)),
])  # fmt: skip
def test_gedit_sizes_are_those_of_its_script(size, expected):
  assert gedit_size(*size) == expected


@pytest.mark.parametrize('name', ['', 'basic_edit.json'])
def test_imgedit_reads_a_json_beside_images(tmp_path, name):
  rows = read_rows(str(protocol_data.imgedit(tmp_path) / name), 'imgedit')
  assert [(row.id, row.group, row.instruction) for row in rows] == [
    ('1082', 'adjust', 'do 0'),
    ('673', 'style', 'do 1'),
  ]
  assert same(rows[1].source, 1)


def test_imgedits_turns_start_from_the_edit_before(tmp_path):
  protocol_data.write_photo(tmp_path / '0.jpg', 3)
  item = {'id': '0.jpg', 'turn1': 'do 1', 'turn2': 'do 2', 'turn3': ''}
  (tmp_path / 'memory.json').write_text(json.dumps({'1': item}))
  first, second = read_rows(str(tmp_path / 'memory.json'), 'imgedit')
  assert (first.id, first.instruction, first.turn, first.is_last) == ('1_turn1', 'do 1', 1, False)
  assert (second.file, second.previous, second.is_last) == ('1_turn2.png', '1_turn1', True)
  assert same(first.source, 3)


# An own folder


def test_an_own_folder_may_lack_targets_and_captions(tmp_path):
  for i in range(2):
    protocol_data.write_photo(tmp_path / f'{i}.png', i)
  lines = [{'file_name': f'{i}.png', 'instruction': f'do {i}'} for i in range(2)]
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  rows = read_rows(str(tmp_path), 'own')
  assert [(row.id, row.instruction) for row in rows] == [('00000', 'do 0'), ('00001', 'do 1')]
  assert same(rows[1].source, 1)
  assert rows[0].target is None and rows[0].mask is None and rows[0].target_caption == ''


def test_an_own_folder_has_everything_a_row_has(tmp_path):
  folder = tiny_pairs.write_metadata(tmp_path, 3)
  mask = np.zeros((64, 96), np.uint8)
  mask[:, 50:] = 255
  Image.fromarray(mask).save(folder / 'mask.png')
  lines = [json.loads(line) for line in (folder / 'metadata.jsonl').read_text().splitlines()]
  lines = [line | {'id': f'row {i}'} for i, line in enumerate(lines)]
  lines[0]['mask'] = 'mask.png'
  (folder / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  rows = read_rows(str(folder), 'own')
  assert [row.id for row in rows] == ['row 0', 'row 1', 'row 2']
  assert rows[2].source_caption == tiny_pairs.caption(2)
  assert rows[2].target_caption == tiny_pairs.edited_caption(2)
  assert rows[2].target().size == (96, 64)
  np.testing.assert_array_equal(rows[0].mask(), mask / np.float32(255))
  assert rows[1].mask is None


def test_magicbrushs_parquet_files_are_an_own_folder(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'dev-0.parquet', 2, columns=tiny_pairs.MAGIC_BRUSH)
  rows = read_rows(str(tmp_path), 'own', split='validation')
  assert rows[1].instruction == tiny_pairs.instruction(1)
  assert rows[1].target().size == rows[1].source().size and rows[1].mask is None


def test_an_own_folder_takes_its_test_split_first(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'train-0.parquet', 4)
  assert len(read_rows(str(tmp_path), 'own')) == 4
  tiny_pairs.write_parquet(tmp_path / 'test-0.parquet', 2, start=4)
  rows = read_rows(str(tmp_path), 'own')
  assert [row.instruction for row in rows] == [tiny_pairs.instruction(i) for i in (4, 5)]
  assert len(read_rows(str(tmp_path), 'own', split='train')) == 4


def test_the_user_names_columns_of_an_own_folder(tmp_path):
  columns = {'a': 'input', 'b': 'edited', 'c': 'instruction'}
  tiny_pairs.write_metadata(tmp_path, 2, columns=columns)
  rows = read_rows(str(tmp_path), 'own', columns='input=a,instruction=c,edited=b')
  assert rows[1].instruction == tiny_pairs.instruction(1) and rows[1].target is not None


# All protocols


def test_samples_are_spread_over_the_rows(tmp_path):
  tiny_pairs.write_metadata(tmp_path / 'own', 10)
  rows = read_rows(str(tmp_path / 'own'), 'own', samples=3)
  assert [row.id for row in rows] == ['00000', '00003', '00006']
  assert len(read_rows(str(tmp_path / 'own'), 'own', samples=99)) == 10


def test_samples_of_a_session_bring_its_earlier_turns(tmp_path):
  folder = str(protocol_data.magicbrush(tmp_path))
  assert [row.id for row in read_rows(folder, 'magicbrush', samples=2)] == ['30_1', '139_inde_2']
  rows = read_rows(folder, 'magicbrush-multi', samples=2)
  assert [row.id for row in rows] == ['30_1', '139_1', '139_iter_2']


def test_rows_can_be_pickled(tmp_path):
  rows = read_rows(str(protocol_data.gedit(tmp_path / 'gedit')), 'gedit')
  rows += read_rows(str(protocol_data.magicbrush(tmp_path / 'magicbrush')), 'magicbrush')
  again = pickle.loads(pickle.dumps(rows))
  assert same(again[2].shown_source, 2) and same(again[3].target, 1)
  assert again[3].mask().any()


def test_a_missing_image_is_an_error_only_when_opened(tmp_path):
  folder = protocol_data.magicbrush(tmp_path)
  (folder / 'images' / '139' / '139-input.png').unlink()
  rows = read_rows(str(folder), 'magicbrush')
  with pytest.raises(InputError, match=r'139-input\.png was not found'):
    rows[1].source()


@pytest.mark.parametrize('protocol', sorted(READERS))
def test_a_missing_or_empty_folder_is_refused(tmp_path, protocol):
  with pytest.raises(InputError, match='no such data'):
    read_rows(str(tmp_path / 'absent'), protocol)
  with pytest.raises(InputError, match=str(tmp_path)):
    read_rows(str(tmp_path), protocol)


def test_missing_texts_and_columns_are_named(tmp_path):
  protocol_data.imgedit(tmp_path / 'imgedit')
  (tmp_path / 'imgedit' / 'basic_edit.json').write_text('{"7": {"id": "a.jpg", "prompt": " "}}')
  with pytest.raises(InputError, match=r"basic_edit\.json: 7: has no text 'prompt'"):
    read_rows(str(tmp_path / 'imgedit'), 'imgedit')
  (tmp_path / 'imgedit' / 'basic_edit.json').write_text('{"7": "a.jpg"}')
  with pytest.raises(InputError, match='7: does not hold keys'):
    read_rows(str(tmp_path / 'imgedit'), 'imgedit')
  tiny_pairs.write_parquet(tmp_path / 'emu' / 'test.parquet', 2)
  with pytest.raises(InputError, match="has no column 'instruction'; the columns are original"):
    read_rows(str(tmp_path / 'emu'), 'emu')


@pytest.mark.parametrize('key', ['../x', '/x'])
def test_names_that_leave_the_folder_are_refused(tmp_path, key):
  (tmp_path / 'basic_edit.json').write_text(json.dumps({key: {'id': 'a.jpg', 'prompt': 'b'}}))
  with pytest.raises(InputError, match='is no name for a file in a folder'):
    read_rows(str(tmp_path), 'imgedit')


def test_two_rows_of_one_id_are_refused(tmp_path):
  lines = [{'id': 1, 'image': 'a.png', 'instruction': 'b'}] * 2
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  with pytest.raises(InputError, match="two rows have the id '1'"):
    read_rows(str(tmp_path), 'own')


@pytest.mark.parametrize('id', ['', ' ', None])
def test_an_empty_id_is_refused(tmp_path, id):
  lines = [{'id': i, 'image': 'a.png', 'instruction': 'b'} for i in ('0', id)]
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  with pytest.raises(InputError, match=r"metadata.*2.*: its 'id' is empty; fill it in"):
    read_rows(str(tmp_path), 'own')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'protocol': 'best'}, '--protocol is .best.; use one of paper'),
    ({'split': 'test'}, '--split: of no use with --protocol pie'),
    ({'columns': 'a=b'}, '--columns: of no use'),
    ({'samples': 0}, '--samples is 0'),
  ],
)
def test_flags_without_effect_are_refused(tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    read_rows(str(tmp_path), **{'protocol': 'pie'} | options)
