"""The examples of published protocols, as one type of row. One small reader for each protocol.

  paper             the original's folders: the examples of its own curves (Figures 8 and 10)
  magicbrush        MagicBrush's test folder, each turn from the true image before it
  magicbrush-multi  the same, each turn from the method's own edit before it
  emu               the Emu Edit test set, Parquet files
  pie               PIE-Bench, mapping_file.json beside annotation_images/
  gedit             GEdit-Bench, Parquet files
  imgedit           ImgEdit-Bench, a JSON file beside its images
  own               metadata.jsonl, metadata.csv or Parquet files

Texts are read at once, images when they are asked for. Images are RGB of sRGB, upright, at their
own size. The edits that belong to the rows are in `layouts`.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ip2p_jax.data import original, sources
from ip2p_jax.data.columns import find, plain, texts
from ip2p_jax.errors import InputError, check_choice
from ip2p_jax.evaluation import lazy_images, pie_bench, torch_random
from ip2p_jax.evaluation.lazy_images import Opener
from ip2p_jax.storage import read_json

MAGICBRUSH_CAPTIONS = 'local_captions.json'  # as in its README; the script's default is global
IMGEDIT_FILES = ('basic_edit.json', 'UGE_edit.json')
TURNS = ('turn1', 'turn2', 'turn3')  # of ImgEdit-Bench
MASKS = ('mask', 'mask_image', 'mask_img')


class EditRow(NamedTuple):
  """One edit of a protocol.

  Attributes:
    id: unique in its protocol, and the same in every run.
    file: where the edit belongs, relative to the folder of a method's edits; as the protocol's own
      script has it.
    source: opens the input image. In `magicbrush-multi` it is the session's first image.
    instruction: what to do.
    target: opens the true edited image, if there is one.
    mask: gives what may change as float32 [H, W] of the source's size, 1 = edit; None if unknown.
    source_caption, target_caption: of the image before and after; '' if unknown.
    words: the changed words of the two captions, if the protocol names them.
    turn: of a session of edits, from 1.
    group: the kind of edit, for averages; '' if there are no kinds.
    previous: the id of the row whose edit is this row's input, instead of `source`; '' for none.
    is_last: whether no other row has this one as `previous`; only such rows are scored.
    shown_source: opens the input as a judge sees it, if that is another file than the source.
  """

  id: str
  file: str
  source: Opener
  instruction: str
  target: Opener | None = None
  mask: Callable[[], np.ndarray] | None = None
  source_caption: str = ''
  target_caption: str = ''
  turn: int = 1
  group: str = ''
  previous: str = ''
  is_last: bool = True
  shown_source: Opener | None = None
  words: tuple[str, str] | None = None


def read_rows(
  path: str, protocol: str, samples: int | None = None, split: str = '', columns: str = ''
) -> list[EditRow]:
  """The rows of a protocol.

  Args:
    path: the data, as it was published; see the head of this file.
    protocol: one of `READERS`.
    samples: how many rows; None for all. `paper` takes its own random ones, in their order; others
      take rows at equal distances, and also every turn before a row.
    split: for `emu` and `own`: 'train', 'validation' or 'test'. '' is test, and for `own` train if
      there is no test split.
    columns: for `own`: unusual names, as in `sources.open_source`.

  Raises InputError for a file or key that is missing or damaged; for an image when it is opened.
  """
  check_choice('--protocol', protocol, tuple(READERS))
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise InputError(f'{path}: no such data; give a folder or file on this machine')
  for value, flag, allowed in (
    (split, '--split', ('emu', 'own')),
    (columns, '--columns', ('own',)),
  ):
    if value and protocol not in allowed:
      raise InputError(f'{flag}: of no use with --protocol {protocol}; leave it out.')
  if samples is not None and samples < 1:
    raise InputError(f'--samples is {samples}; use 1 or more.')
  options = {'paper': {'samples': samples}, 'emu': {'split': split or 'test'}}
  options['own'] = {'split': split, 'columns': columns}
  rows = READERS[protocol](path, **options.get(protocol, {}))
  _check(rows, path)
  return rows if samples is None else _spread(rows, min(samples, len(rows)))


def without_equal_captions(rows: Sequence[EditRow]) -> list[EditRow]:
  """Rows whose captions before and after differ, as some papers count the Emu Edit test set.

  Rows without captions stay. Raises InputError for sessions of edits, which would lose turns.
  """
  if any(row.previous for row in rows):
    raise InputError('--drop-equal-captions: of no use with sessions of edits; leave it out.')
  return [row for row in rows if not row.source_caption or row.source_caption != row.target_caption]


def paper(path: str, samples: int | None = None, seed: int = 0) -> list[EditRow]:
  """The examples of the original's metrics/compute_metrics.py, in its order.

  One generator draws the order of the test split, and then two integers for each example: which
  pair of the prompt, and a size from `res` to `res`. The original takes 5,000 samples.
  """
  source = original.open_original(path, 'test')
  count = len(source) if samples is None else samples
  if not len(source):
    raise InputError(f'{path}: has no test split (the last 5 % of the prompts, if `ip2p filter` did'
                     ' not write the folder); give the published data set')  # fmt: skip
  if count > len(source):
    raise InputError(f'{path}: has {len(source)} prompts for the test; use --samples {len(source)}'
                     ' or less')  # fmt: skip
  generator = torch_random.Generator(seed)
  rows = []
  for i in generator.permutation(len(source))[:count]:
    name, seeds = source.entry(i)
    chosen = seeds[generator.integer(len(seeds))]
    generator.integer(1)
    folder = Path(path, name)
    prompt = original.read_texts(str(folder))
    before, after = (_shown_file(folder / f'{chosen}_{side}.jpg') for side in (0, 1))
    id, instruction = f'{name}/{chosen}', _text(prompt, 'edit', f'{folder}/prompt.json')
    captions = prompt['caption'], prompt['output']
    rows.append(EditRow(id, f'{id}.png', before, instruction, after, None, *captions))
  return rows


def magicbrush(path: str, is_multi: bool = False) -> list[EditRow]:
  """The turns of MagicBrush's sessions: edit_sessions.json, images/, local_captions.json.

  A turn's input is the true image before it ("single-turn"). With `is_multi` it is the method's own
  edit, and only the last turn counts ("multi-turn").
  """
  place = Path(path, 'edit_sessions.json')
  captions = Path(path, MAGICBRUSH_CAPTIONS)
  captions = read_json(captions, dict) if captions.exists() else {}
  rows = []
  for key, turns in read_json(place, dict).items():
    turns = turns if isinstance(turns, list) else [turns]
    turns = [_object(item, f'{place}: {key}') for item in turns]
    first = _text(turns[0], 'input', f'{place}: {key}') if turns else ''
    session = first.split('-')[0]
    folder, previous = Path(path, 'images', session), ''
    known = _object(captions.get(session, {}), f'{path}/{MAGICBRUSH_CAPTIONS}: {session}')
    for turn, item in enumerate(turns, 1):
      before = first if is_multi else _text(item, 'input', f'{place}: {key}')
      after = item.get('output') or f'{session}-output{turn}.png'
      source, mask = _shown_file(folder / before), None
      # In multi-turn a later turn's mask is not of the source, the session's first image.
      if item.get('mask') and not (is_multi and turn > 1):
        mask = lazy_images.mask(lazy_images.file(folder / item['mask']), source, item['mask'], True)
      way = ('iter_' if is_multi else 'inde_') if turn > 1 else ''
      id = f'{session}_{way}{turn}'
      rows.append(EditRow(
        id, f'{session}/{id}.png', source, _text(item, 'instruction', f'{place}: {key}'),
        _shown_file(folder / after), mask, known.get(before, ''), known.get(after, ''), turn,
        previous=previous, is_last=not is_multi or turn == len(turns),
      ))  # fmt: skip
      previous = id if is_multi else ''
  return rows


def emu(path: str, split: str = 'test') -> list[EditRow]:
  """The Emu Edit test set. It has no true edits, and some of its captions say nothing new.

  In facebook/emu_edit_test_set_generations the labels of validation and test are exchanged.
  """
  names = ('instruction', 'input_caption', 'output_caption', 'task', 'idx')
  rows = []
  for place, row, cell in _table_rows(_table(path, split), path, names, ('image',)):
    captions = (' '.join(texts(row[name])) for name in names[1:3])
    rows.append(EditRow(
      str(row['idx']), f'{row["idx"]}.png', lazy_images.shown(cell('image')),
      _text(row, 'instruction', place), None, None, *captions, group=str(row['task'] or ''),
    ))  # fmt: skip
  return rows


def pie(path: str) -> list[EditRow]:
  """PIE-Bench: mapping_file.json and annotation_images/ in one folder."""
  rows = []
  for key, item in read_json(Path(path, 'mapping_file.json'), dict).items():
    place = f'{path}/mapping_file.json: {key}'
    item = _object(item, place)
    file, kind = _text(item, 'image_path', place), str(item.get('editing_type_id', ''))
    captions = (
      _text(item, name, place).replace('[', '').replace(']', '')
      for name in ('original_prompt', 'editing_prompt')
    )
    rows.append(EditRow(
      key, f'annotation_images/{file}', _shown_file(Path(path, 'annotation_images', file)),
      _text(item, 'editing_instruction', place), None,
      functools.partial(pie_bench.mask, item.get('mask'), place), *captions,
      group=dict(zip('0123456789', pie_bench.KINDS, strict=True)).get(kind, kind),
      words=pie_bench.words(item.get('blended_word')),
    ))  # fmt: skip
  return rows


def gedit(path: str) -> list[EditRow]:
  """GEdit-Bench. The raw image is edited, at the size that the authors' script gives it.

  The judge sees `input_image` beside the edit.
  """
  names = ('task_type', 'key', 'instruction', 'instruction_language')
  image_columns = ('input_image', 'input_image_raw')
  rows = []
  for place, row, cell in _table_rows(_table(path, 'train'), path, names, image_columns):
    kind, key, instruction, language = (_text(row, name, place) for name in names)
    id = f'{kind}/{language}/{key}'
    seen, raw = (lazy_images.shown(cell(name)) for name in image_columns)
    rows.append(EditRow(
      id, f'fullset/{id}.png', lazy_images.resized(raw, gedit_size), instruction, group=kind,
      shown_source=seen,
    ))  # fmt: skip
  return rows


def gedit_size(width: int, height: int) -> tuple[int, int]:
  """About 512 * 512 pixels in multiples of 32, as generate_image_example.py computes it.

  If the area is not exact, its width goes one multiple down or up, whatever the height was.
  """
  area, ratio = 512 * 512, width / height
  exact = (area * ratio) ** 0.5
  width, height = (round(side / 32) * 32 for side in (exact, exact / ratio))
  return width + 32 * ((width * height < area) - (width * height > area)), height


def imgedit(path: str) -> list[EditRow]:
  """ImgEdit-Bench: `path` is its JSON file, or the folder with that file; images lie beside it.

  In its multi-turn files each turn starts from the edit before it. People judge them, and no script
  names their edits.
  """
  files = [path] if os.path.isfile(path) else [Path(path, name) for name in IMGEDIT_FILES]
  file = next(filter(os.path.isfile, files), None)
  if file is None:
    raise InputError(f'{path}: has none of {", ".join(IMGEDIT_FILES)}; give the JSON file, with the'
                     ' folders of its images beside it')  # fmt: skip
  rows = []
  for key, item in read_json(Path(file), dict).items():
    place = f'{file}: {key}'
    item = _object(item, place)
    source = _shown_file(Path(file).parent / _text(item, 'id', place))
    names, previous = [name for name in TURNS if item.get(name)] or ['prompt'], ''
    for turn, name in enumerate(names, 1):
      id = key if name == 'prompt' else f'{key}_{name}'
      rows.append(EditRow(
        id, f'{id}.png', source, _text(item, name, place), turn=turn, previous=previous,
        group=str(item.get('edit_type', '')), is_last=turn == len(names),
      ))  # fmt: skip
      previous = id
  return rows


def own(path: str, split: str = '', columns: str = '') -> list[EditRow]:
  """A folder of one's own. Edited images, captions, masks and ids may be absent.

  White in a mask is edited; in MagicBrush's column 'mask_img' it is what is transparent.
  The id is the column 'id', or else the row's number, '00000' for the first. A column 'group' has
  the kind of edit.
  """
  if not split:
    split = 'test' if sources.open_table(path, 'test') else 'train'
  reader = _table(path, split)
  found = find(reader.names, columns, 'edit', path, reader.kinds(), needs_edited=False)
  roles = {'source': found.input, 'target': found.edited}
  words = {
    'instruction': found.instruction,
    'source_caption': found.caption,
    'target_caption': found.edited_caption,
  }
  id, group = (name if name in reader.names else None for name in ('id', 'group'))
  mask = next((name for name in reader.names if plain(name) in MASKS), None)
  names = [name for name in (id, group, mask, *words.values()) if name]
  image_columns = [name for name in (mask, *roles.values()) if name]
  rows = []
  for place, row, cell in _table_rows(reader, path, names, image_columns):
    name = f'{len(rows):05d}' if id is None else '' if row[id] is None else str(row[id])
    if not name.strip():
      raise InputError(f"{place}: its 'id' is empty; fill it in, or leave the column 'id' out.")
    opened = {role: lazy_images.shown(cell(column)) for role, column in roles.items() if column}
    if mask and row[mask]:
      is_magicbrush = mask == 'mask_img'  # of its Parquet files, whose masks are transparent
      opened['mask'] = lazy_images.mask(cell(mask), opened['source'], place, is_magicbrush)
    written = {role: ' '.join(texts(row.get(column))[:1]) for role, column in words.items()}
    _text(written, 'instruction', place)
    kind = str(row[group] or '') if group else ''
    rows.append(EditRow(name, f'{name}.png', **opened, **written, group=kind))
  return rows


READERS = {
  'paper': paper,
  'magicbrush': magicbrush,
  'magicbrush-multi': functools.partial(magicbrush, is_multi=True),
  'emu': emu,
  'pie': pie,
  'gedit': gedit,
  'imgedit': imgedit,
  'own': own,
}


def _spread(rows, samples):
  """Rows at equal distances, with all turns before each."""
  chosen = {rows[i * len(rows) // samples].id for i in range(samples)}
  for row in reversed(rows):
    chosen |= {row.previous} if row.id in chosen else set()
  return [row for row in rows if row.id in chosen]


def _check(rows, path):
  """Raises InputError if there are no rows, or two of one id, or files outside of a folder."""
  if not rows:
    raise InputError(f'{path}: holds no row; check that it was copied completely')
  seen = set()
  for row in rows:
    if row.id in seen:
      raise InputError(f'{path}: two rows have the id {row.id!r}; make the ids unique')
    if Path(row.file).is_absolute() or '..' in Path(row.file).parts:
      raise InputError(f'{path}: {row.file!r} is no name for a file in a folder; rename it')
    seen.add(row.id)


def _table(path, split):
  reader = sources.open_table(path, split)
  if reader is None:
    raise InputError(f'{path}: has no row of the split {split!r}; give another --split')
  return reader


def _table_rows(
  reader, path, names, image_columns
) -> Iterator[tuple[str, dict[str, Any], Callable]]:
  """(place for messages, values by name, cell) of each row; `cell(column)` opens an image."""
  missing = [name for name in (*names, *image_columns) if name not in reader.names]
  if missing:
    raise InputError(f'{path}: has no column {missing[0]!r}; the columns are'
                     f' {", ".join(reader.names)}')  # fmt: skip
  # A reader for each column of images: one that changes columns starts its row group again.
  readers = {column: copy.copy(reader) for column in image_columns}
  for i in range(len(reader)):
    place, _, values = reader.read(i, list(names))
    values = {name: values.get(name) for name in names}
    yield place, values, functools.partial(_cell, readers, i)


def _cell(readers, i, column):
  return lazy_images.cell(readers[column], i, column)


def _shown_file(path):
  return lazy_images.shown(lazy_images.file(path))


def _object(item, place):
  if not isinstance(item, dict):
    raise InputError(f'{place}: does not hold keys and values; fix it or remove it')
  return item


def _text(item, key, place):
  text = ' '.join(texts(item.get(key)))
  if not text:
    raise InputError(f'{place}: has no text {key!r}; fill it in or take it out')
  return text
