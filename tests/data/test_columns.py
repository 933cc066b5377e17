"""Which column has which role: in public data sets, by the user's choice, and refusals."""

import csv
import itertools
import json

import pyarrow
import pytest
import tiny_pairs
from pyarrow import parquet

from ip2p_jax.data.columns import Columns, find
from ip2p_jax.data.sources import open_source
from ip2p_jax.errors import InputError

# Columns of public data sets, as on their cards, with their content: P images, T text, N numbers,
# L lists of text, - nothing; then the user's choice of columns, if one is needed; and the roles
# (input, edited, instruction, inverse, caption, edited_caption).
LAYOUTS = {
  'timbrooks/instructpix2pix-clip-filtered': (
    'original_prompt T, original_image P, edit_prompt T, edited_prompt T, edited_image P', '',
    ('original_image', 'edited_image', 'edit_prompt', None, 'original_prompt', 'edited_prompt'),
  ),
  'fusing/instructpix2pix-1000-samples': (
    'input_image P, edit_prompt T, edited_image P', '',
    ('input_image', 'edited_image', 'edit_prompt', None, None, None),
  ),
  'osunlp/MagicBrush': (
    'img_id T, turn_index N, source_img P, mask_img P, instruction T, target_img P', '',
    ('source_img', 'target_img', 'instruction', None, None, None),
  ),
  'BleachNick/UltraEdit': (
    'clip_sim_source N, clip_sim_target N, dinov2_sim N, ssim N, source_image P, mask_image -,'
    'edit_prompt T, edited_image P, source_caption T, target_caption T, idx N, edit_object T', '',
    ('source_image', 'edited_image', 'edit_prompt', None, 'source_caption', 'target_caption'),
  ),
  'UCSC-VLAA/HQ-Edit': (
    'input T, input_image P, edit T, inverse_edit T, output T, output_image P', '',
    ('input_image', 'output_image', 'edit', 'inverse_edit', 'input', 'output'),
  ),
  'TIGER-Lab/OmniEdit-Filtered-1.2M': (
    'omni_edit_id T, task T, src_img P, edited_img P, edited_prompt_list L, width N, height N,'
    'sc_score_1 N, sc_reasoning T, pq_score N, o_score N', '',
    ('src_img', 'edited_img', 'edited_prompt_list', None, None, None),
  ),
  'Bin1117/AnyEdit': (
    'edit_instruction T, edit_type T, image_file P, edited_file P, input T, output T,'
    'visual_input P', '',
    ('image_file', 'edited_file', 'edit_instruction', None, 'input', 'output'),
  ),
  'fusing/fill50k': (
    'image P, conditioning_image P, text T', '',
    ('conditioning_image', 'image', 'text', None, None, None),
  ),
  'fusing/fill50k, with a choice': (
    'conditioning_image P, image P, text T', 'edited=image',
    ('conditioning_image', 'image', 'text', None, None, None),
  ),
  'DiffSynth': (
    'edit_image P, image P, prompt T', 'edited=image',
    ('edit_image', 'image', 'prompt', None, None, None),
  ),
  'DiffSynth, with a choice of the input': (
    'image P, edit_image P, mask P, prompt T', 'input=edit_image',
    ('edit_image', 'image', 'prompt', None, None, None),
  ),
  'instruction-tuning-sd/cartoonization': (
    'original_image P, edit_prompt T, cartoonized_image P', '',
    ('original_image', 'cartoonized_image', 'edit_prompt', None, None, None),
  ),
  'instruction-tuning-sd/low-level-image-proc': (
    'instruction T, input_image P, ground_truth_image P', '',
    ('input_image', 'ground_truth_image', 'instruction', None, None, None),
  ),
}  # fmt: skip
UNKNOWN = 'no column has a name known for the'


def value(kind, column, i, folder=None):
  """The content of a cell. Images and texts are different in each column and row."""
  number = 1000 * sum(map(ord, column)) + i
  if kind == 'P':
    content = tiny_pairs.photo(number, (40, 40))
    if folder is None:
      return {'bytes': content, 'path': None}
    (folder / f'{column}-{i}.jpg').write_bytes(content)
    return f'{column}-{i}.jpg'
  return {'T': f'{column} of {i}', 'L': [f'{column} of {i}', 'or so'], 'N': i, '-': None}[kind]


def write(folder, form, described, count=3):
  columns = dict(item.split() for item in described.split(','))
  folder.mkdir()
  if form == 'parquet':
    table = {name: [value(kind, name, i) for i in range(count)] for name, kind in columns.items()}
    parquet.write_table(pyarrow.table(table), folder / 'a.parquet')
    return
  rows = [
    {name: value(kind, name, i, folder) for name, kind in columns.items()} for i in range(count)
  ]
  with open(folder / f'metadata.{form}', 'w', newline='') as file:
    if form == 'jsonl':
      file.writelines(json.dumps(row) + '\n' for row in rows)
    else:
      writer = csv.DictWriter(file, columns)
      writer.writeheader()
      writer.writerows(rows)


@pytest.mark.parametrize('form', ['parquet', 'jsonl', 'csv'])
@pytest.mark.parametrize('name', LAYOUTS)
def test_public_layouts_are_read_with_the_right_roles(tmp_path, form, name):
  described, choice, roles = LAYOUTS[name]
  if form == 'csv' and ' L' in described:
    return  # CSV has no lists
  write(tmp_path / 'set', form, described)
  expected = Columns(*roles)
  row = open_source(str(tmp_path / 'set'), columns=choice)[2 if expected.inverse is None else 4]
  image = lambda column: value('P', column, 2)['bytes']
  assert row.pairs == ((image(expected.input), image(expected.edited)),)
  assert row.instructions[0] == f'{expected.instruction} of 2'
  captions = [f'{column} of 2' if column else '' for column in roles[4:]]
  assert [row.caption, row.edited_caption] == captions
  assert len([column for column in roles if column]) == len({column for column in roles if column})


@pytest.mark.parametrize('form', ['parquet', 'jsonl', 'csv'])
@pytest.mark.parametrize(
  ('described', 'choice', 'message'),
  [
    ('edit_image P, image P, prompt T', '', f'{UNKNOWN} edited image; the columns are edit_'),
    ('image P, prompt T', '', f'{UNKNOWN} edited image'),
    ('input T, output T, edit T', '', rf"{UNKNOWN} input image \('input' holds text\)"),
    ('input P, output T, edit T', '', rf"{UNKNOWN} edited image \('output' holds text\)"),
    ('input_image N, output P, edit T', '', f'{UNKNOWN} input image'),
    ('input P, output P, edit P', '', rf"{UNKNOWN} instruction \('edit' holds image\)"),
    ('a P, b P, edit T', 'input=a,edited=a', "'a' is named for both the input and the edited"),
    ('a P, b P, c T', 'input=a,edited=b,instruction=c,caption=c', "'c' is named for both"),
    ('a P, b P, c T', 'input=a,edited=c,instruction=c', "'c' is named for both"),
    ('a P, b P, c T, edit T', 'input=c,edited=b', "input must be an image, but the column 'c'"),
    ('a P, b P, edit T', 'input=a,edited=b,instruction=b', "'b' is named for both"),
    ('a P, b P, d P, e T', 'input=a,edited=b,instruction=d', 'instruction must be text, but the'),
    ('a P, b P, edit T', 'input=a,edited=none', "there is no column 'none' .for the edited."),
    ('a P, b P, edit T', 'input=a,edited=b,inverse=none', "no column 'none' .for the inverse."),
    ('a P, b P, edit T', 'input=,edited=b', 'input= names no column, but the input image'),
    ('a P, b P, d P, edit T', 'edited=b', f'{UNKNOWN} input image'),
    ('a P, b P, edit T', 'image=a,edited=b', "'image=a' does not fit edit"),
  ],
)
def test_impossible_columns_are_one_sentence(tmp_path, form, described, choice, message):
  if form == 'csv' and ' N' in described:
    return  # numbers are text there
  write(tmp_path / 'set', form, described)
  with pytest.raises(InputError, match=message) as caught:
    open_source(str(tmp_path / 'set'), columns=choice)
  assert '\n' not in str(caught.value)


def test_captions_are_told_from_names_of_files(tmp_path):
  """By type. A string may be either, so the majority of the first values decides."""
  tiny_pairs.write_metadata(tmp_path / 'set', 12, columns={'input': 'input', 'output': 'edited',
                                                      'edit': 'instruction'})  # fmt: skip
  for i in range(12):
    for side in ('input', 'edited'):
      (tmp_path / 'set' / 'pictures' / f'{i}_{side}.jpg').rename(tmp_path / 'set' / f'{i}{side}')
  file = tmp_path / 'set' / 'metadata.jsonl'
  lines = file.read_text().replace('pictures/', '').replace('_', '').replace('.jpg', '')
  file.write_text(lines)  # names without an extension
  (tmp_path / 'set' / '3input').unlink()
  source = open_source(str(tmp_path / 'set'))
  assert source[2].pairs == (tiny_pairs.pair(2),)
  with pytest.raises(InputError, match=r'line 4: cannot read the image .*3input'):
    source[3]


@pytest.mark.parametrize(
  ('column', 'message'),
  [
    (pyarrow.array([[{'bytes': b'x', 'path': None}]]), r'holds lists \(image\)'),
    (pyarrow.array([{'width': 3}]), 'holds structures'),
    (pyarrow.array([['a.jpg', 'b.jpg']]), r'holds lists \(image\)'),
    (pyarrow.array(['https://example.com/a.jpg']), 'holds web addresses'),
    (pyarrow.array([1.5]), 'holds numbers'),
  ],
)
def test_a_column_without_images_is_refused(tmp_path, column, message):
  table = {'input_image': column, 'edited_image': [tiny_pairs.photo(1)], 'edit': ['x']}
  parquet.write_table(pyarrow.table(table), tmp_path / 'a.parquet')
  with pytest.raises(InputError, match=message):
    open_source(str(tmp_path / 'a.parquet'))


@pytest.mark.parametrize('text', ['dictionary', 'large_string', 'string_view'])
def test_strings_of_any_type_are_text(tmp_path, text):
  words = pyarrow.array(['make it red'] * 3)
  words = (
    words.dictionary_encode() if text == 'dictionary' else words.cast(getattr(pyarrow, text)())
  )
  table = {'input': [tiny_pairs.photo(1)] * 3, 'edited': [tiny_pairs.photo(2)] * 3, 'edit': words}
  parquet.write_table(pyarrow.table(table), tmp_path / 'a.parquet')
  assert open_source(str(tmp_path / 'a.parquet'))[1].instructions == ('make it red',)


def test_text_to_image_has_the_same_rules(tmp_path):
  write(tmp_path / 'set', 'parquet', 'conditioning_image P, image P, text T')
  opened = lambda columns: open_source(str(tmp_path / 'set'), columns=columns, task='text_to_image')
  assert opened('')[1].pairs[0].edited_image == value('P', 'image', 1)['bytes']
  for choice, message in (
    ('image=image,text=image', "'image' is named for both the image and the text"),
    ('image=text', 'image must be an image'),
    ('input=image', "'input=image' does not fit text_to_image"),
    ('image=image,edited=conditioning_image', 'give image and text, or edited and'),
    ('edited=image', f'{UNKNOWN} caption of the edited image'),
  ):
    with pytest.raises(InputError, match=message):
      opened(choice)


def test_no_names_give_a_column_two_roles():
  """All sets of three names that could each have several roles, whatever the columns hold."""
  names = ('input', 'output', 'image', 'edit', 'text', 'prompt', 'caption', 'source', 'target',
           'conditioning_image', 'edit_image', 'edited_prompt')  # fmt: skip
  layouts = 0
  for a, b, c in itertools.permutations(names, 3):
    for choice in ('', f'input={a}', f'edited={a}', f'input={a},edited={b}'):
      try:
        roles = [column for column in find((a, b, c), choice) if column]
      except InputError:
        continue
      layouts += 1
      assert len(roles) == len(set(roles)), (a, b, c, choice)
  assert layouts > 100


def test_an_edited_image_may_be_no_requirement():
  kinds = {'image': 'image', 'mask': 'image', 'prompt': 'text'}
  found = find(list(kinds), kinds=kinds, needs_edited=False)
  assert (found.input, found.edited, found.instruction) == ('image', None, 'prompt')
  with pytest.raises(InputError, match='no column has a name known for the edited image'):
    find(list(kinds), kinds=kinds)
