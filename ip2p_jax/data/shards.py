"""Packed data sets: the contents of the folder, and random access to its rows.

The folder is one of TensorFlow Datasets (`tfds.builder_from_directory(folder).as_data_source()`
reads it), but neither writing nor reading needs TensorFlow. P pairs, I instructions, L tokens,
h w latent sides. In it:

  pack.json              the plan: settings, rows and shards of each split; written first
  progress/              while packing, a note for every finished shard
  edits-train.array_record-00003-of-00021
                         rows in the source's order, a tf.Example each, not compressed since
                         images and latents hardly shrink; ArrayRecord adds checksums
  features.json, metadata.json, dataset_info.json
                         for TFDS; the last is written last and makes the data set complete
"""

import bisect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from ip2p_jax import storage
from ip2p_jax.data.rows import SPLITS, LatentRow, Pair, Row, Source
from ip2p_jax.errors import InputError

NAME = 'edits'
FORMAT = 1
PLAN, PROGRESS, COMPLETE = 'pack.json', 'progress', 'dataset_info.json'
LATENTS = ('input_mean', 'edited_mean', 'edited_log_variance')


def is_shards(path: str | os.PathLike) -> bool:
  """Whether the folder was made by `ip2p pack`, finished or not."""
  return (Path(path) / PLAN).is_file()


def open_shards(path: str | os.PathLike, split: str) -> Source:
  """The rows of a split: `Row` or `LatentRow`, see `describe`. An absent split is empty.

  Raises InputError if packing was not finished, or a file is missing. `source[i]` raises it if
  that record is damaged.
  """
  if split not in SPLITS:
    raise InputError(f'{path}: split {split!r} is unknown; use one of {", ".join(SPLITS)}.')
  plan = _finished_plan(path)
  for info in storage.read_json(Path(path) / COMPLETE).get('splits', []):
    if info['name'] == split:
      return Shards(path, split, [int(length) for length in info['shardLengths']], plan)
  return ()


def describe(path: str | os.PathLike) -> dict[str, Any]:
  """The contents of a finished packed data set.

  `kind` is 'images' or 'latents', `splits` {split: rows}, `settings` all settings of the pack,
  `skipped` the broken rows that were left out, a line each. `resolution`, in pixels, and
  `fingerprint`, of the checkpoint, are for latents; they are None for images.
  """
  plan = _finished_plan(path)
  splits = storage.read_json(Path(path) / COMPLETE).get('splits', [])
  return {
    'kind': plan['kind'],
    'resolution': plan['settings'].get('resolution'),
    'fingerprint': plan['settings'].get('fingerprint'),
    'splits': {info['name']: sum(map(int, info['shardLengths'])) for info in splits},
    'settings': plan['settings'],
    'skipped': storage.read_json(Path(path) / 'metadata.json')['skipped'],
  }


class Part(NamedTuple):
  """Records of one file, in the form that ArrayRecordDataSource takes."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


class Shards(Sequence):
  """The rows of one split. Opens files on first use, and leaves them out of pickles."""

  def __init__(self, path: str | os.PathLike, split: str, lengths: list[int], plan: dict):
    files = [Path(path) / file_name(split, k, len(lengths)) for k in range(len(lengths))]
    for file in files:
      if not file.is_file():
        raise InputError(f'{file}: is missing; copy the folder again, or pack it again.')
    parts = [Part(str(f), 0, n, n) for f, n in zip(files, lengths, strict=True)]
    self._ends = list(itertools.accumulate(part.take for part in parts))
    self._parts = parts
    self._records = ArrayRecordDataSource(parts)
    self._read = latent_row if plan['kind'] == 'latents' else image_row
    self._settings = plan['settings']

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> Row | LatentRow:
    if not -len(self) <= i < len(self):
      raise IndexError(i)
    i %= len(self)
    try:
      example = tf_example_pb2.Example.FromString(self._records[i])
      return self._read(example.features.feature, self._settings)
    except (RuntimeError, OSError, DecodeError, IndexError, ValueError) as error:
      part = bisect.bisect_right(self._ends, i)
      record = i - self._ends[part] + self._parts[part].take
      raise InputError(
        f'{self._parts[part].filename}: record {record} cannot be read ({str(error)[:200]}); copy'
        ' the file again, or pack it again.'
      ) from error


def file_name(split: str, index: int, shards: int) -> str:
  return f'{NAME}-{split}.array_record-{index:05d}-of-{shards:05d}'


def features_of(plan: dict) -> tfds.features.FeaturesDict:
  """The TFDS features of a record."""
  f, settings = tfds.features, plan['settings']
  common = {'name': f.Text(), 'may_flip': f.Scalar(np.bool_)}
  if plan['kind'] == 'latents':
    latents = f.Tensor(
      shape=(None, 2, *settings['latent_shape']), dtype=np.float16, encoding='bytes'
    )
    names = LATENTS if settings['has_input'] else LATENTS[1:]
    token_ids = f.Tensor(shape=(None, settings['tokens']), dtype=np.int32)
    return f.FeaturesDict(common | {'token_ids': token_ids} | dict.fromkeys(names, latents))
  images = ('input_image', 'edited_image') if settings['has_input'] else ('edited_image',)
  texts = {'caption': f.Text(), 'edited_caption': f.Text(), 'group': f.Text()}
  pairs = f.Sequence({name: f.Image() for name in images})  # encoded files, stored as they are
  return f.FeaturesDict(common | texts | {'instructions': f.Sequence(f.Text()), 'pairs': pairs})


def image_example(row: Row, has_input: bool) -> dict[str, Any]:
  """A row as an example for `features_of` an 'images' plan."""
  edited = [pair.edited_image for pair in row.pairs]
  pairs = {'edited_image': edited}
  if has_input:
    pairs['input_image'] = [pair.input_image for pair in row.pairs]
  return {
    'name': row.name,
    'instructions': list(row.instructions),
    'pairs': pairs,
    'may_flip': row.may_flip,
    'caption': row.caption,
    'edited_caption': row.edited_caption,
    'group': row.group,
  }


def image_row(features, settings: dict) -> Row:
  edited = features['pairs/edited_image'].bytes_list.value
  inputs = [None] * len(edited)
  if settings['has_input']:
    inputs = features['pairs/input_image'].bytes_list.value
  return Row(
    _text(features, 'name'),
    tuple(text.decode() for text in features['instructions'].bytes_list.value),
    tuple(Pair(*pair) for pair in zip(inputs, edited, strict=True)),
    bool(features['may_flip'].int64_list.value[0]),
    _text(features, 'caption'),
    _text(features, 'edited_caption'),
    _text(features, 'group') if 'group' in features else '',  # older packs have none
  )


def latent_example(row: LatentRow) -> dict[str, Any]:
  """A row as an example for `features_of` a 'latents' plan."""
  return {key: value for key, value in row._asdict().items() if value is not None}


def latent_row(features, settings: dict) -> LatentRow:
  def latents(key):  # not copied, so read-only
    values = np.frombuffer(features[key].bytes_list.value[0], np.float16)
    return values.reshape(-1, 2, *settings['latent_shape'])

  token_ids = np.array(features['token_ids'].int64_list.value, np.int32)
  return LatentRow(
    _text(features, 'name'),
    token_ids.reshape(-1, settings['tokens']),
    latents('input_mean') if settings['has_input'] else None,
    latents('edited_mean'),
    latents('edited_log_variance'),
    bool(features['may_flip'].int64_list.value[0]),
  )


def _text(features, key):
  return features[key].bytes_list.value[0].decode()


def _finished_plan(path):
  if not is_shards(path):
    raise InputError(f'{path}: holds no packed data set ({PLAN} is missing).')
  if not (Path(path) / COMPLETE).is_file():
    raise InputError(f'{path}: packing was interrupted; run ip2p pack again to finish it.')
  return read_plan(path)


def read_plan(path: str | os.PathLike) -> dict:
  """The plan in the folder."""
  plan = storage.read_json(Path(path) / PLAN)
  if not isinstance(plan, dict) or plan.get('format') != FORMAT:
    raise InputError(f'{path}: was packed by another version; pack the data set again.')
  return plan
