"""Small folders in the layouts of published protocols."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import tiny_pairs
from PIL import Image
from pyarrow import parquet

SIZE = tiny_pairs.SIZE


def photo(i: int) -> np.ndarray:
  """uint8 [H, W, 3]; another for every i."""
  with Image.open(io.BytesIO(tiny_pairs.photo(i, form='PNG'))) as image:
    return np.asarray(image)


def write_photo(file: Path, i: int) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_bytes(tiny_pairs.photo(i, form='PNG'))


def cell(i: int) -> dict:
  return {'bytes': tiny_pairs.photo(i, form='PNG'), 'path': None}


def hole(box: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> Image.Image:
  """A photograph that is transparent in a box."""
  image = Image.new('RGBA', size, (90, 20, 200, 255))
  image.paste((0, 0, 0, 0), box)
  return image


def magicbrush(folder: Path) -> Path:
  """Session 30 with photos 0 and 1 (its input, its edit), and session 139 with photos 10 to 13."""
  sessions, captions = {}, {}
  for place, (session, turns) in enumerate({'30': 1, '139': 3}.items()):
    names = [f'{session}-input.png', *(f'{session}-output{k}.png' for k in range(1, turns + 1))]
    for k, name in enumerate(names):
      write_photo(folder / 'images' / session / name, 10 * place + k)
    hole((0, 0, 8, 4)).save(folder / 'images' / session / f'{session}-mask1.png')
    sessions[session] = [
      {'input': names[k], 'output': names[k + 1], 'instruction': f'do {session} {k + 1}'}
      for k in range(turns)
    ]
    sessions[session][0]['mask'] = f'{session}-mask1.png'
    captions[session] = {name: f'shows {name}' for name in names}
  (folder / 'edit_sessions.json').write_text(json.dumps(sessions))
  (folder / 'local_captions.json').write_text(json.dumps(captions))
  return folder


def emu(folder: Path) -> Path:
  """Three rows for the test and two for validation; the second row's captions are equal."""
  for split, start, count in (('test', 0, 3), ('validation', 3, 2)):
    numbers = range(start, start + count)
    table = {
      'image': [cell(i) for i in numbers],
      'instruction': [f'do {i}' for i in numbers],
      'input_caption': [f'a {i}' for i in numbers],
      'output_caption': [f'a {i}' if i == 1 else f'b {i}' for i in numbers],
      'task': ['add' if i % 2 else 'style' for i in numbers],
      'split': [split] * count,
      'idx': [100 + i for i in numbers],
      'hash': [f'h{i}' for i in numbers],
    }
    file = folder / 'data' / f'{split}-00000-of-00001.parquet'
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(table), file, row_group_size=2)
  return folder


def pie(folder: Path) -> Path:
  """Two rows; their images are 512 x 512."""
  names = ('0_random_140/000000000000.jpg', '9_style_80/2_natural/911000000000.jpg')
  items = {}
  for i, name in enumerate(names):
    file = folder / 'annotation_images' / name
    file.parent.mkdir(parents=True)
    file.write_bytes(tiny_pairs.photo(i, (512, 512)))
    items[Path(name).stem] = {
      'image_path': name,
      'original_prompt': 'a [round] cake on a plate',
      'editing_prompt': 'a [square] cake on a [blue] plate',
      'editing_instruction': 'make the cake square',
      'editing_type_id': name[0],
      'blended_word': 'cake cake',
      'mask': [512 * 5 + 7, 3, 512 * 512 - 512 * 3 + 9, 10**6],
    }
  (folder / 'mapping_file.json').write_text(json.dumps(items))
  return folder


def gedit(folder: Path) -> Path:
  kinds = ['background_change', 'background_change', 'subject-add']
  table = {
    'task_type': kinds,
    'key': ['k0', 'k0', 'k2'],
    'instruction': ['do 0', '换背景', 'do 2'],
    'instruction_language': ['en', 'cn', 'en'],
    'input_image': [cell(i) for i in range(3)],
    'input_image_raw': [cell(10 + i) for i in range(3)],
    'Intersection_exist': [True, False, True],
  }
  (folder / 'data').mkdir(parents=True)
  file = folder / 'data' / 'train-00000-of-00001.parquet'
  parquet.write_table(pyarrow.table(table), file, row_group_size=2)
  return folder


def imgedit(folder: Path) -> Path:
  items = {}
  for i, (key, name, kind) in enumerate(
    [('1082', 'animal/000342021.jpg', 'adjust'), ('673', 'style/000278574.jpg', 'style')]
  ):
    write_photo(folder / name, i)
    items[key] = {'id': name, 'prompt': f'do {i}', 'edit_type': kind}
  (folder / 'basic_edit.json').write_text(json.dumps(items))
  return folder
