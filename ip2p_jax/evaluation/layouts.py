"""Folders of edits: where each protocol's own script looks for them (`EditRow.file`).

  paper             FOLDER/0000123/456.png             prompt's folder and seed
  magicbrush        FOLDER/139/139_1.png, 139_inde_2.png, ...
  magicbrush-multi  FOLDER/139/139_1.png, 139_iter_2.png, ...
  emu               FOLDER/12.png                      the column idx
  pie               FOLDER/annotation_images/0_random_140/000000000000.jpg
  gedit             FOLDER/fullset/background_change/en/KEY.png and KEY_SRCIMG.png
  imgedit           FOLDER/KEY.png, or KEY_turn1.png, KEY_turn2.png, ...
  own               FOLDER/00000.png                   the column id, or the row's number

MagicBrush's script wants the edits of both of its protocols in one folder, for all sessions: it
stops if a session is missing or has more turns in one protocol than in the other, and counts every
folder in FOLDER as a session. GEdit-Bench's wants FOLDER as results/METHOD. PIE-Bench's wants
FOLDER as output/METHOD; its JPEG files were saved with Pillow's quality 75, ours have 95.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ip2p_jax import images
from ip2p_jax.errors import InputError
from ip2p_jax.evaluation.pie_bench import SIDE as PIE_SIDE
from ip2p_jax.evaluation.protocols import EditRow


def write_edit(
  folder: str | Path, row: EditRow, edit: Image.Image, settings: dict | None = None
) -> Path:
  """Writes an edit, and the input beside it if the judge looks for it; returns the edit's file.

  `settings` (JSON values) go into the file, as in `images.save`. Files appear whole or not at all,
  the edit last.
  """
  file = Path(folder, row.file)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f'{file.parent} cannot be made ({error.strerror}); choose another folder'
                     ) from error  # fmt: skip
  if row.shown_source is not None:
    images.save(row.shown_source(), source_file(file), {})
  images.save(edit, file, settings or {})
  return file


def source_file(file: Path) -> Path:
  """Where GEdit-Bench looks for the input of an edit: KEY_SRCIMG.png for KEY.png."""
  return file.with_name(f'{file.stem}_SRCIMG.png')


def find_edits(folder: str | Path, rows: Sequence[EditRow]) -> dict[str, Path]:
  """The files of the edits by id; any kind of image file counts, the right name first.

  Raises InputError if one is missing.
  """
  files, missing = {}, []
  for row in rows:
    named = Path(folder, row.file)
    others = (named.with_suffix(extension) for extension in images.READ_EXTENSIONS)
    files[row.id] = next((file for file in (named, *others) if file.is_file()), None)
    missing += [] if files[row.id] else [row.file]
  if missing:
    raise InputError(
      f'--outputs {folder}: {len(missing)} of {len(rows)} edits are missing, such as {missing[0]};'
      ' give the folder of one method, complete, or fewer --samples'
    )
  return files


def open_edit(file: str | Path, protocol: str) -> Image.Image:
  """An edit as RGB. For PIE-Bench, an image that is not square is a strip that ends in the edit.

  The authors' scripts write such strips: text, input, reconstruction, edit.
  """
  edit = images.shown(images.read(file))
  width, height = edit.size
  if protocol != 'pie' or width == height:
    return edit
  if min(width, height) < PIE_SIDE:
    raise InputError(f'{file}: is {width}x{height}; PIE-Bench counts square edits, and strips of'
                     f' images of {PIE_SIDE} pixels; give one of these')  # fmt: skip
  return edit.crop((width - PIE_SIDE, height - PIE_SIDE, width, height))
