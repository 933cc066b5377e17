"""Data sets on disk: every layout is recognised and gives the same rows."""

import concurrent.futures
import json
import math
import pickle

import pyarrow
import pytest
import tiny_pairs
from pyarrow import parquet

from ip2p_jax.data import original, pack, sources
from ip2p_jax.data.columns import find, may_flip
from ip2p_jax.data.rows import SPLITS
from ip2p_jax.errors import InputError


def contents(source):
  """The rows without their names, which differ by layout."""
  return [row[1:] for row in (source[i] for i in range(len(source)))]


def expected(count, start=0):
  return [row[1:] for row in tiny_pairs.rows(start + count)[start:]]


def json_lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


# The original's folders


@pytest.mark.parametrize('shards', [0, 3])
@pytest.mark.parametrize('key', ['caption', 'input'])
def test_the_originals_folders_give_a_row_per_prompt(tmp_path, shards, key):
  tiny_pairs.write_original(tmp_path, prompts=20, shards=shards, key=key)
  opened = [sources.open_source(str(tmp_path), split) for split in SPLITS]
  assert list(map(len, opened)) == [18, 1, 1]
  assert [row for source in opened for row in contents(source)] == [
    row[1:] for row in tiny_pairs.rows(20, pairs=2)
  ]


def test_without_seeds_json_the_folders_give_the_same_rows(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=20, pairs=2, shards=2)
  listed = sources.open_source(str(tmp_path))
  names = [listed[i].name for i in range(len(listed))]
  (tmp_path / 'seeds.json').unlink()
  (tmp_path / 'shard-00' / 'unfinished').mkdir()  # no pair, no row, as in the original
  tiny_pairs.write_original(tmp_path / '.trash', prompts=1)
  unlisted = sources.open_source(str(tmp_path))
  assert [unlisted[i].name for i in range(len(unlisted))] == names
  assert contents(unlisted) == contents(listed)


def test_splits_are_by_position_as_in_the_original():
  shares = {'train': (0.0, 0.9), 'validation': (0.9, 0.9 + 0.05), 'test': (0.9 + 0.05, 1.0)}
  for count in (*range(500), 313_010, 451_990):
    for split, (start, end) in shares.items():
      rows = range(count)[original.split_of(count, split)]
      assert rows == range(math.floor(start * count), math.floor(end * count))
  assert len(range(313_010)[original.split_of(313_010, 'train')]) == 281_709


def test_a_damaged_seeds_json_is_reported(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=2)
  for text in ('[["0000000", ["1"', '[["0000000"]]', '[[1, 2]]', '7'):
    (tmp_path / 'seeds.json').write_text(text)
    with pytest.raises(InputError, match=r'seeds\.json: cannot be read .* delete it'):
      sources.open_source(str(tmp_path))


def test_a_broken_folder_breaks_only_its_row(tmp_path):
  tiny_pairs.write_original(tmp_path, prompts=8)
  (tmp_path / '0000001' / '101_1.jpg').unlink()
  (tmp_path / '0000002' / 'prompt.json').write_text('{"caption": "a"}')
  (tmp_path / '0000003' / 'prompt.json').write_text('{"edit": "   "}')
  (tmp_path / '0000004' / 'prompt.json').write_text('["edit"]')
  (tmp_path / '0000005' / 'prompt.json').unlink()
  source = sources.open_source(str(tmp_path))
  assert source[0].instructions == (tiny_pairs.instruction(0),)
  messages = (
    'cannot read 101_1.jpg',
    "no text 'edit'",
    "no text 'edit'",
    'does not hold',
    'No such',
  )
  for i, message in enumerate(messages, 1):
    with pytest.raises(InputError, match=rf'000000{i}.*{message}'):
      source[i]


# Metadata files


@pytest.mark.parametrize('form', ['jsonl', 'csv'])
@pytest.mark.parametrize(
  'columns',
  [
    tiny_pairs.TIMBROOKS,
    {  # as in Hugging Face's imagefolder
      'input_image_file_name': 'input',
      'edited_image_file_name': 'edited',
      'instruction': 'instruction',
      'input_caption': 'caption',
      'output_caption': 'edited_caption',
    },
    {
      'file_name': 'input',
      'edited_image': 'edited',
      'edit': 'instruction',
      'caption': 'caption',
      'edited_caption': 'edited_caption',
    },
    {
      'input': 'input',
      'edited': 'edited',
      'text': 'instruction',
      'caption': 'caption',
      'edited_prompt': 'edited_caption',
    },
  ],
)
def test_a_metadata_file_names_images_beside_it(tmp_path, form, columns):
  folder = tiny_pairs.write_metadata(tmp_path / 'set', 3, form, columns)
  for path in (folder, folder / f'metadata.{form}'):
    assert contents(sources.open_source(str(path))) == expected(3)
  assert sources.open_source(str(folder), 'test') == []


def test_captions_are_optional(tmp_path):
  short = {'input': 'input', 'output': 'edited', 'edit': 'instruction'}  # here no captions
  for name, columns in (('fusing', tiny_pairs.FUSING), ('short', short)):
    tiny_pairs.write_metadata(tmp_path / name, 2, columns=columns)
    row = sources.open_source(str(tmp_path / name))[1]
    assert (row.caption, row.edited_caption, row.pairs) == ('', '', (tiny_pairs.pair(1),))


def test_folders_named_after_splits_are_splits(tmp_path):
  for number, name in enumerate(('train', 'val', 'test'), 2):
    tiny_pairs.write_metadata(tmp_path / name, number)
  lengths = [len(sources.open_source(str(tmp_path), split)) for split in SPLITS]
  assert lengths == [2, 3, 4]


def test_blank_lines_and_line_breaks_do_not_shift_rows(tmp_path):
  tiny_pairs.write_metadata(tmp_path, 3)
  lines = (tmp_path / 'metadata.jsonl').read_text().splitlines()
  (tmp_path / 'metadata.jsonl').write_text('\ufeff' + '\n\n \n'.join(lines))
  source = sources.open_source(str(tmp_path))
  assert contents(source) == expected(3)
  assert source[2].name == f'{tmp_path}/metadata.jsonl: line 7'
  table = tmp_path / 'table.csv'
  cells = 'pictures/0_input.jpg,pictures/0_edited.jpg'
  table.write_text(f'\ufeffinput,edited,edit\n{cells},"make it\nred"\n\n{cells},x\n')
  source = sources.open_source(str(table))
  assert [source[i].instructions for i in range(len(source))] == [('make it\nred',), ('x',)]
  assert source[1].name == f'{table}: line 5'


def test_a_broken_line_breaks_only_its_row(tmp_path):
  tiny_pairs.write_metadata(tmp_path, 7)
  lines = json_lines(tmp_path / 'metadata.jsonl')
  del lines[1]['edited_image']
  lines[2]['original_image'] = 'pictures/none.jpg'
  lines[3]['edit_prompt'] = ' '
  lines[4]['edit_prompt'] = 7
  text = [json.dumps(line) for line in lines]
  text[5] = '{"original_image": '
  text[6] = '[]'
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(text))
  source = sources.open_source(str(tmp_path))
  assert source[0][1:] == expected(1)[0]
  messages = ("has no 'edited_image'", r'cannot read the image .*none\.jpg \(No such file',
              'holds no words', 'holds no words', 'cannot be read', 'is not an object')  # fmt: skip
  for i, message in enumerate(messages, 1):
    with pytest.raises(InputError, match=rf'metadata\.jsonl: line {i + 1}: .*{message}'):
      source[i]


def test_a_csv_row_with_a_stray_comma_is_named(tmp_path):
  (tmp_path / 'metadata.csv').write_text('input,edited,edit\na.jpg,b.jpg,make it, please\n')
  with pytest.raises(InputError, match=r'metadata\.csv: line 2: has 4 cells for 3 columns'):
    sources.open_source(str(tmp_path))[0]


# Parquet files


@pytest.mark.parametrize('images', ['struct', 'bytes', 'path', 'struct of path'])
def test_parquet_files_are_one_table(tmp_path, images):
  counts = (6, 1, 9)
  for k, count in enumerate(counts):
    file = tmp_path / 'data' / f'train-{k:05d}-of-00003.parquet'
    tiny_pairs.write_parquet(file, count, sum(counts[:k]), images=images)
  source = sources.open_source(str(tmp_path))
  assert contents(source) == expected(16)
  assert source[7].name == f'{tmp_path}/data/train-00002-of-00003.parquet: row 0'


def test_parquet_rows_come_in_any_order(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 40, group=25)  # a group is larger than a batch
  source, wanted = sources.open_source(str(tmp_path / 'a.parquet')), expected(40)
  for i in (*range(39, -1, -1), *(7 * i % 40 for i in range(40))):
    assert source[i][1:] == wanted[i]
  assert len(list(source)) == 40
  with pytest.raises(IndexError):
    source[40]


def test_threads_read_a_parquet_file_independently(tmp_path):
  texts = [f'text {i}' for i in range(400)]
  table = pyarrow.table({'image': [bytes(50_000)] * len(texts), 'text': texts})
  parquet.write_table(table, tmp_path / 'a.parquet', use_dictionary=False)  # slow to decode
  source = sources.open_source(str(tmp_path), task='text_to_image')

  def read(start):
    return all(source[i].instructions == (texts[i],) for i in range(start, len(texts), 7))

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert all(pool.map(read, range(4)))


def test_files_named_after_splits_are_splits(tmp_path):
  names = ('FreeForm_0-00000-of-00001', 'FreeForm_1-00000-of-00001', 'dev-00000-of-00001', 'test')
  for count, name in enumerate(names, 1):
    tiny_pairs.write_parquet(tmp_path / f'{name}.parquet', count)
  tiny_pairs.write_parquet(tmp_path / 'more' / 'validation' / '0000.parquet', 2)
  lengths = [len(sources.open_source(str(tmp_path), split)) for split in SPLITS]
  assert lengths == [3, 5, 4]
  assert len(sources.open_source(str(tmp_path / 'test.parquet'))) == 4  # a single file


def test_damaged_parquet_files_are_named(tmp_path):
  file = tiny_pairs.write_parquet(tmp_path / 'a.parquet', 4)
  tiny_pairs.write_parquet(tmp_path / 'b.parquet', 4, columns=tiny_pairs.FUSING)
  with pytest.raises(InputError, match=r'b\.parquet: has columns input_image, .*a\.parquet has'):
    sources.open_source(str(tmp_path))
  file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(InputError, match=r'a\.parquet: cannot be read'):
    sources.open_source(str(tmp_path))


def test_a_damaged_row_group_breaks_only_its_rows(tmp_path):
  file = tiny_pairs.write_parquet(tmp_path / 'a.parquet', 8, group=4)
  content = bytearray(file.read_bytes())
  start = content.index(tiny_pairs.pair(5).edited_image)  # Parquet cannot shrink a JPEG file
  content[start - 3000 : start - 2000] = bytes(1000)
  file.write_bytes(content)
  source = sources.open_source(str(file))
  assert source[3][1:] == expected(1, 3)[0]
  with pytest.raises(InputError, match=r'a\.parquet: row 5: '):
    source[5]
  assert source[2][1:] == expected(1, 2)[0]


# Columns


@pytest.mark.parametrize(
  'columns',
  [tiny_pairs.TIMBROOKS, tiny_pairs.FUSING, tiny_pairs.MAGIC_BRUSH, tiny_pairs.ULTRA_EDIT],
)
def test_columns_of_known_data_sets_are_found(tmp_path, columns):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 3, columns=columns)
  row = sources.open_source(str(tmp_path))[2]
  assert (row.instructions, row.pairs) == ((tiny_pairs.instruction(2),), (tiny_pairs.pair(2),))
  captions = {role for column, role in columns.items() if column not in ('img_id', 'task')}
  assert bool(row.caption) == ('caption' in captions)
  assert bool(row.edited_caption) == ('edited_caption' in captions)


def test_a_list_of_instructions_is_several_instructions(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 3, columns=tiny_pairs.OMNI_EDIT)
  row = sources.open_source(str(tmp_path))[1]
  assert row.instructions == (tiny_pairs.instruction(1), f'Please {tiny_pairs.instruction(1)}.')


def test_an_inverse_instruction_is_a_row_back(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 3, columns=tiny_pairs.HQ_EDIT)
  source = sources.open_source(str(tmp_path))
  assert len(source) == 6
  there, back = source[2], source[3]
  assert there[1:] == expected(1, 1)[0]
  assert back.instructions == (f'undo {tiny_pairs.instruction(1)}',)
  assert back.pairs == ((there.pairs[0].edited_image, there.pairs[0].input_image),)
  assert (back.caption, back.edited_caption) == (there.edited_caption, there.caption)
  assert len(sources.open_source(str(tmp_path), columns='inverse=')) == 3


def test_a_row_without_an_inverse_instruction_goes_forwards(tmp_path):
  tiny_pairs.write_metadata(tmp_path, 2, columns=tiny_pairs.HQ_EDIT)
  lines = json_lines(tmp_path / 'metadata.jsonl')
  lines[1]['inverse-edit'] = None
  (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  source = sources.open_source(str(tmp_path))
  assert source[3] == source[2]


def test_the_user_names_unusual_columns(tmp_path):
  columns = {'Vorher': 'input', 'nachher': 'edited', 'was': 'instruction', 'edit': 'number'}
  tiny_pairs.write_metadata(tmp_path, 2, columns=columns)
  choice = 'input=Vorher, edited=nachher,instruction=was'
  assert sources.open_source(str(tmp_path), columns=choice)[1].pairs == (tiny_pairs.pair(1),)
  with pytest.raises(
    InputError, match=r'a name known for the input image.* Vorher, nachher, was, edit;.*input='
  ):
    sources.open_source(str(tmp_path))


def test_one_choice_can_serve_several_data_sets():
  choice = 'input=a,input=b'
  for name in ('a', 'b'):
    assert find([name, 'edited', 'edit'], choice).input == name


def test_columns_that_fit_two_ways_or_none_are_refused():
  cases = {
    ('source_img', 'input_image', 'edited', 'edit'): "'source_img' and 'input_image' could each",
    ('input', 'edited'): 'known for the instruction; the columns are input, edited',
    (): 'no column has a name known for the input image; there are no columns',
  }
  for names, message in cases.items():
    with pytest.raises(InputError, match=message):
      find(names, place='set')
  with pytest.raises(InputError, match=r"set: there is no column 'x' \(for the caption\)"):
    find(['input', 'edited', 'edit'], 'caption=x', place='set')
  for choice in ('before=x', 'input'):
    with pytest.raises(InputError, match='is not a role and a column'):
      find(['input', 'edited', 'edit'], choice)


# Text-to-image


def test_text_to_image_needs_an_image_and_a_caption(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 3, columns=tiny_pairs.CAPTIONED)
  row = sources.open_source(str(tmp_path), task='text_to_image')[1]
  assert row.pairs == ((None, tiny_pairs.pair(1).edited_image),)
  assert row.instructions == (row.edited_caption,) == (tiny_pairs.edited_caption(1),)
  with pytest.raises(InputError, match='no column has a name known for the edited image'):
    sources.open_source(str(tmp_path))


def test_text_to_image_takes_edited_images_and_their_captions(tmp_path):
  tiny_pairs.write_original(tmp_path / 'original', prompts=4, pairs=1)
  tiny_pairs.write_metadata(tmp_path / 'metadata', 3)
  tiny_pairs.write_parquet(tmp_path / 'parquet' / 'a.parquet', 3, columns=tiny_pairs.HQ_EDIT)
  pack.pack({'train': tiny_pairs.rows(3)}, tmp_path / 'packed', workers=0, say=str)
  for name in ('original', 'metadata', 'parquet', 'packed'):
    source = sources.open_source(str(tmp_path / name), task='text_to_image')
    assert len(source) == 3
    assert source[2].pairs == ((None, tiny_pairs.pair(2).edited_image),)
    assert source[2].instructions == (tiny_pairs.edited_caption(2),)


def test_the_user_names_columns_of_text_to_image(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'a.parquet', 2)
  source = sources.open_source(
    str(tmp_path), columns='image=original_image,text=original_prompt', task='text_to_image'
  )
  assert source[1].pairs == ((None, tiny_pairs.pair(1).input_image),)
  assert source[1].instructions == (tiny_pairs.caption(1),)


# All layouts


def test_sources_can_be_pickled_after_use(tmp_path):
  tiny_pairs.write_original(tmp_path / 'original', prompts=4)
  tiny_pairs.write_metadata(tmp_path / 'jsonl', 3)
  tiny_pairs.write_metadata(tmp_path / 'csv', 3, 'csv')
  tiny_pairs.write_parquet(tmp_path / 'parquet' / 'a.parquet', 3)
  for name in ('original', 'jsonl', 'csv', 'parquet'):
    source = sources.open_source(str(tmp_path / name))
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_other_files_and_folders_are_refused(tmp_path):
  for name in ('empty', 'unet', 'text'):
    (tmp_path / name).mkdir()
  (tmp_path / 'unet' / 'model_index.json').write_text('{}')
  (tmp_path / 'text' / 'notes.txt').write_text('')
  (tmp_path / 'set.zip').write_text('')
  for name in ('empty', 'unet', 'text', 'set.zip'):
    with pytest.raises(
      InputError, match=rf'{name}: no data set was recognised; looked for .*seeds'
    ):
      sources.open_source(str(tmp_path / name))
  with pytest.raises(InputError, match='nowhere: no such data set'):
    sources.open_source(str(tmp_path / 'nowhere'))
  tiny_pairs.write_original(tmp_path / 'original', prompts=2)
  with pytest.raises(InputError, match='the folder of one prompt'):
    sources.open_source(str(tmp_path / 'original' / '0000001'))


def test_empty_data_sets_are_refused(tmp_path):
  for name, text in (('a.jsonl', '\n'), ('b.csv', 'input,edited,edit\n'), ('c.csv', '')):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f'{name}: the data set is empty'):
      sources.open_source(str(tmp_path / name))
  (tmp_path / 'seeds.json').write_text('[]')
  with pytest.raises(InputError, match='the data set is empty'):
    sources.open_source(str(tmp_path))


def test_unknown_splits_and_tasks_are_refused(tmp_path):
  with pytest.raises(InputError, match="split 'val' is unknown; use train, validation, test"):
    sources.open_source(str(tmp_path), 'val')
  with pytest.raises(InputError, match="task 'edits' is unknown; use edit, text_to_image"):
    sources.open_source(str(tmp_path), task='edits')


def test_a_mixture_is_paths_and_weights():
  assert sources.mixture('a') == [('a', 1)]
  assert sources.mixture('/data/a=3, b=0.5') == [('/data/a', 3), ('b', 0.5)]
  assert sources.mixture('a,b') == [('a', 1), ('b', 1)]
  assert sources.mixture('run=7=2') == [('run=7', 2)]


@pytest.mark.parametrize('path', ['', 'a,', '=3', 'a=', 'a=b', 'a=0', 'a=-1', 'a=nan', 'a=inf'])
def test_an_impossible_mixture_is_refused(path):
  with pytest.raises(InputError, match=r'data\.path: .*PATH=NUMBER'):
    sources.mixture(path)


@pytest.mark.parametrize(
  'instruction',
  [
    'put a hat on the left', 'the Right-hand man', 'leftmost tree', 'rotate it counter-clockwise',
    'turn anticlockwise', 'mirror it', 'flip the car', 'write hello', 'a sign that says stop',
    'add the text hello', 'change the letters', 'a "stop" sign', 'a “stop” sign', "say 'stop'",
    'add the number 5',
  ],
)  # fmt: skip
def test_an_instruction_with_a_side_or_writing_is_not_mirrored(instruction):
  assert not may_flip(instruction)


@pytest.mark.parametrize(
  'instruction',
  [
    'make it bright', 'copyright free', 'an upright piano', "the dog's hat and the cats' toys",
    'add texture', 'in the context of war', 'as a swordsman', "make it '80s like the dog's",
    'remove the essay', 'a cleft chin',
  ],
)  # fmt: skip
def test_other_instructions_are_mirrored(instruction):
  assert may_flip(instruction)


def test_every_layout_marks_rows_not_to_mirror(tmp_path):
  tiny_pairs.write_original(tmp_path / 'original', prompts=2)
  (tmp_path / 'original' / '0000000' / 'prompt.json').write_text('{"edit": "look left"}')
  tiny_pairs.write_metadata(tmp_path / 'metadata', 1)
  text = (tmp_path / 'metadata' / 'metadata.jsonl').read_text()
  text = text.replace(tiny_pairs.instruction(0), 'look left')
  (tmp_path / 'metadata' / 'metadata.jsonl').write_text(text)
  for name in ('original', 'metadata'):
    assert not sources.open_source(str(tmp_path / name))[0].may_flip


def test_tables_open_whatever_their_columns(tmp_path):
  tiny_pairs.write_parquet(tmp_path / 'set' / 'test-0.parquet', 3)
  for path, split in ((tmp_path / 'set', 'test'), (tmp_path / 'set' / 'test-0.parquet', 'train')):
    assert len(sources.open_table(str(path), split)) == 3
  assert sources.open_table(str(tmp_path / 'set'), 'train') is None
  tiny_pairs.write_original(tmp_path / 'folders', prompts=2)
  with pytest.raises(InputError, match='give its folder'):
    sources.open_table(str(tmp_path / 'folders'), 'train')
