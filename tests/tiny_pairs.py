"""Small data sets of drawn pairs, in every layout on disk.

Example i of any layout has the same images and texts: `pair(i)`, `instruction(i)`, `caption(i)`.
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from ip2p_jax.data import examples
from ip2p_jax.data.rows import Pair, Row

SIZE = (96, 64)
NO_TOKENS = lambda texts: np.zeros((len(texts), 1))
# Columns of data sets on the Hugging Face hub, and their roles.
TIMBROOKS = {
  'original_image': 'input',
  'edit_prompt': 'instruction',
  'edited_image': 'edited',
  'original_prompt': 'caption',
  'edited_prompt': 'edited_caption',
}
FUSING = {'input_image': 'input', 'edit_prompt': 'instruction', 'edited_image': 'edited'}
MAGIC_BRUSH = {
  'img_id': 'caption',
  'turn_index': 'number',
  'source_img': 'input',
  'mask_img': 'mask',
  'instruction': 'instruction',
  'target_img': 'edited',
}
ULTRA_EDIT = {
  'clip_sim_source': 'number',
  'source_image': 'input',
  'mask_image': 'mask',
  'edit_prompt': 'instruction',
  'edited_image': 'edited',
  'source_caption': 'caption',
  'target_caption': 'edited_caption',
}
HQ_EDIT = {
  'input': 'caption',
  'input_image': 'input',
  'edit': 'instruction',
  'inverse-edit': 'inverse',
  'output': 'edited_caption',
  'output_image': 'edited',
}
OMNI_EDIT = {
  'task': 'caption',
  'src_img': 'input',
  'edited_img': 'edited',
  'edited_prompt_list': 'instructions',
  'sc_score_1': 'number',
}
CAPTIONED = {'image': 'edited', 'text': 'edited_caption'}


def decoded(encoded: bytes, resolution: int, resize: str = 'crop', name: str = 'a row'):
  """An image file as a training example holds it, uint8 [R, R, 3]; nothing is random."""
  framing = examples.Framing(resolution, 'text_to_image', resize)
  row = Row(name, ('',), (Pair(None, encoded),))
  return examples.example(row, None, framing, NO_TOKENS)['edited_image']


def photo(i: int, size: tuple[int, int] = SIZE, form: str = 'JPEG') -> bytes:
  """A smooth image as an encoded file; another for every i."""
  coarse = np.random.default_rng(i).integers(0, 256, (4, 6, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, form)
  return file.getvalue()


def pair(i: int, size: tuple[int, int] = SIZE) -> Pair:
  return Pair(photo(2 * i, size), photo(2 * i + 1, size))


def instruction(i: int) -> str:
  return f'make it shape {chr(97 + i % 26)}'


def caption(i: int) -> str:
  return f'a drawing, {i}'


def edited_caption(i: int) -> str:
  return f'a drawing of shape {chr(97 + i % 26)}, {i}'


def rows(count: int, pairs: int = 1, size: tuple[int, int] = SIZE) -> list[Row]:
  """A source in memory; row i has pairs i * pairs, i * pairs + 1, ..."""
  return [
    Row(
      f'memory: row {i}',
      (instruction(i),),
      tuple(pair(i * pairs + k, size) for k in range(pairs)),
      caption=caption(i),
      edited_caption=edited_caption(i),
    )
    for i in range(count)
  ]


def write_original(
  folder: Path,
  prompts: int = 20,
  pairs: int = 2,
  shards: int = 0,
  seeds: bool = True,
  key: str = 'caption',
) -> Path:
  """The original's folders, prompt i with pairs i * pairs ...; a share of them in each shard."""
  listed = []
  for i in range(prompts):
    shard = f'shard-{i * shards // prompts:02d}/' if shards else ''
    name = f'{shard}{i:07d}'
    (folder / name).mkdir(parents=True)
    texts = {key: caption(i), 'edit': instruction(i), 'output': edited_caption(i), 'url': ''}
    (folder / name / 'prompt.json').write_text(json.dumps(texts))
    (folder / name / 'metadata.jsonl').write_text('{"seed": 1, "p2p_threshold": 0.5}\n')
    numbers = [str(100 + k) for k in range(pairs)]
    for k, number in enumerate(numbers):
      for side, encoded in enumerate(pair(i * pairs + k)):
        (folder / name / f'{number}_{side}.jpg').write_bytes(encoded)
    listed.append([name, numbers])
  if seeds:
    (folder / 'seeds.json').write_text(json.dumps(listed))
  return folder


def write_metadata(
  folder: Path, count: int = 6, form: str = 'jsonl', columns: dict[str, str] | None = None
) -> Path:
  """`metadata.jsonl` or `.csv` beside a folder of images; `columns` as above."""
  columns = columns or TIMBROOKS
  (folder / 'pictures').mkdir(parents=True)
  table = []
  for i in range(count):
    values = _values(i)
    for role in ('input', 'edited'):
      name = f'pictures/{i}_{role}.jpg'
      (folder / name).write_bytes(values[role])
      values[role] = name
    table.append({column: values[role] for column, role in columns.items()})
  with open(folder / f'metadata.{form}', 'w', newline='') as file:
    if form == 'jsonl':
      file.writelines(json.dumps(row) + '\n' for row in table)
    else:
      writer = csv.DictWriter(file, columns)
      writer.writeheader()
      writer.writerows(table)
  return folder


def write_parquet(
  file: Path,
  count: int = 6,
  start: int = 0,
  columns: dict[str, str] | None = None,
  images: str = 'struct',
  group: int = 4,
) -> Path:
  """Examples start ... start + count - 1 in row groups of `group`.

  `images` is 'struct' (Hugging Face's {'bytes', 'path'}) or 'bytes'; or, with files beside it,
  'struct of path' or 'path'.
  """
  columns = columns or TIMBROOKS
  file.parent.mkdir(parents=True, exist_ok=True)
  table = {column: [] for column in columns}
  for i in range(start, start + count):
    for column, role in columns.items():
      value = _values(i)[role]
      if role in ('input', 'edited', 'mask') and value is not None:
        name = f'{file.stem}_{i}_{role}.jpg'
        if images.endswith('path'):
          (file.parent / name).write_bytes(value)
        value = {
          'struct': {'bytes': value, 'path': name},
          'struct of path': {'bytes': None, 'path': name},
          'bytes': value,
          'path': name,
        }[images]
      table[column].append(value)
  parquet.write_table(pyarrow.table(table), file, row_group_size=group)
  return file


def _values(i):
  return {
    **dict(zip(('input', 'edited'), pair(i), strict=True)),
    'instruction': instruction(i),
    'instructions': [instruction(i), f'Please {instruction(i)}.'],
    'inverse': f'undo {instruction(i)}',
    'caption': caption(i),
    'edited_caption': edited_caption(i),
    'number': i,
    'mask': None,
  }
