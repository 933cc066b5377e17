"""Columns of a table, whatever they are called, and the rows made of them.

A role is what we need ('input', 'instruction'); a column is what a data set calls it. Names that
data sets on the Hugging Face hub are known to use are found by themselves; others are said by
`columns`, such as 'input=before,edited=after,instruction=text'.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ip2p_jax.data.rows import Pair, Row
from ip2p_jax.errors import InputError

# By role, names in groups: a later group counts only where no name of an earlier one is there, so
# that 'input' is a caption beside 'input_image' (HQ-Edit), and a picture file without it.
ALIASES = {
  'input': (
    ('input_image', 'original_image', 'source_image', 'source_img', 'src_img', 'before_image'),
    ('input', 'original', 'source', 'before', 'image'),
  ),
  'edited': (
    ('edited_image', 'output_image', 'target_image', 'target_img', 'edited_img', 'after_image'),
    ('edited', 'output', 'target', 'after'),
  ),
  'instruction': (
    ('instruction', 'instructions', 'edit_prompt', 'edit', 'edited_prompt_list'),
    ('prompt', 'text'),
  ),
  'inverse': (('inverse_edit', 'inverse_instruction'),),
  'caption': (
    ('caption', 'input_caption', 'source_caption', 'original_prompt', 'input_prompt'),
    ('input',),
  ),
  'edited_caption': (
    ('edited_caption', 'output_caption', 'target_caption', 'edited_prompt', 'output_prompt'),
    ('output',),
  ),
  'image': (('image', 'img', 'picture', 'photo'),),
  'text': (('text', 'caption', 'captions', 'prompt'), ('input_caption', 'description')),
}
# English words after which a mirrored picture would be wrong: sides, senses of rotation, writing.
SIDED = re.compile(
  r"""\b(left|right)(-?(most|hand|handed|wards?|side))?\b
  | \b(counter-?|anti-?)?clockwise\b
  | \b(mirror|flip|revers)\w*
  | \b(text|caption|logo|inscription|lettering|letters?|words?|numbers?|numerals?|digits?)\b
  | \b(writ(e|es|ten|ing)|wrote|spell\w*|says?|saying|reads)\b
  | ["“”„«»]
  | (?<!\w)['‘][^'’]+['’](?!\w)""",
  re.IGNORECASE | re.VERBOSE,
)


class Columns(NamedTuple):
  """The column of each role; None where there is none. Text-to-image has no `input`."""

  input: str | None
  edited: str
  instruction: str
  inverse: str | None = None
  caption: str | None = None
  edited_caption: str | None = None


def find(names: Sequence[str], columns: str = '', task: str = 'edit', place: str = '') -> Columns:
  """Which column has which role.

  Args:
    names: of the columns there are. Hugging Face's 'input_image_file_name' counts as
      'input_image', and 'file_name' as 'image'.
    columns: what the user says, 'role=column,...'. A role may be named several times where several
      data sets are mixed; a role without a column ('inverse=') is left out.
    task: 'edit' or 'text_to_image', which takes the edited picture and its caption of an edit set.
    place: the data set, for messages.

  Raises InputError if a role has no column, or more than one that it could be.
  """
  said = _parse(columns)
  pick = lambda role, **options: _pick(role, names, said, place, **options)
  if task == 'text_to_image':
    if not {'image', 'text'} & set(said):
      edited = pick('edited', required=False)
      caption = pick('edited_caption', required=False, taken=(edited,))
      if edited and caption:
        return Columns(None, edited, caption, edited_caption=caption)
    image, text = pick('image'), pick('text')
    return Columns(None, image, text, edited_caption=text)
  before, after = pick('input'), pick('edited')
  instruction = pick('instruction')
  optional = lambda role: pick(role, required=False, taken=(before, after))
  return Columns(
    before,
    after,
    instruction,
    optional('inverse'),
    optional('caption'),
    optional('edited_caption'),
  )


def to_row(
  name: str,
  values: Mapping[str, Any],
  columns: Columns,
  picture: Callable[[Any, str], bytes],
  inverse: bool = False,
) -> Row:
  """A row of a table as a Row.

  Args:
    name: where it is, for messages.
    values: by column.
    columns: what `find` gives.
    picture: (value, column) -> an encoded picture.
    inverse: whether to go from the edited picture back to the input, by the inverse instruction;
      a row that has none is given forwards.

  Raises InputError if something is missing.
  """
  if inverse and texts(values.get(columns.inverse)):
    before, after, text, caption, edited_caption = (
      columns.edited, columns.input, columns.inverse, columns.edited_caption, columns.caption
    )  # fmt: skip
  else:
    before, after, text = columns.input, columns.edited, columns.instruction
    caption, edited_caption = columns.caption, columns.edited_caption
  for column in filter(None, (before, after, text)):
    if values.get(column) is None:
      raise InputError(f'{name}: has no {column!r}; fill it in or take the row out')
  instructions = texts(values[text])
  if not instructions:
    raise InputError(f'{name}: {text!r} holds no words; fill it in or take the row out')
  pair = Pair(picture(values[before], before) if before else None, picture(values[after], after))
  return Row(
    name,
    instructions,
    (pair,),
    all(map(may_flip, instructions)),
    *(' '.join(texts(values.get(column))[:1]) for column in (caption, edited_caption)),
  )


def texts(value: Any) -> tuple[str, ...]:
  """The texts of a cell, which holds one or a list; blank ones and what is no text left out."""
  cells = value if isinstance(value, list | tuple) else [value]
  return tuple(cell.strip() for cell in cells if isinstance(cell, str) and cell.strip())


def may_flip(instruction: str) -> bool:
  """Whether an English instruction stays true when both pictures are mirrored.

  False where it names a side, a sense of rotation, or writing (in quotation marks, or by word).
  Errs on the side of False: 'right' may mean 'now', and the price is one flip.
  """
  return not SIDED.search(instruction)


def _parse(columns):
  said = {}
  for item in filter(None, (item.strip() for item in columns.split(','))):
    role, equals, column = (part.strip() for part in item.partition('='))
    if not equals or role not in ALIASES:
      raise InputError(
        f'columns: {item!r} is not a role and a column, such as input=before; roles are '
        f'{", ".join(ALIASES)}'
      )
    said.setdefault(role, []).append(column)
  return {role: [column for column in found if column] for role, found in said.items()}


def _pick(role, names, said, place, required=True, taken=()):
  free = [name for name in names if name not in taken]
  if role in said:
    groups = [[name for name in free if name in said[role]]]
  else:
    groups = [[name for name in free if _plain(name) in group] for group in ALIASES[role]]
  found = next(filter(None, groups), [])
  if len(found) == 1 or (found and not required):
    return found[0]
  if not found and not required and not said.get(role):
    return None
  have = f'the columns are {", ".join(names)}' if names else 'there are no columns'
  wanted = ' or '.join(map(repr, said.get(role, ())))
  problem = (
    f'{" and ".join(map(repr, found))} could each be the {role}'
    if found
    else f'there is no column {wanted} (for the {role})'
    if wanted
    else f'no column looks like the {role}'
  )
  raise InputError(
    f'{place}: {problem}; {have}; say which it is by --columns {role}=NAME'
    f' (when training: --config.data.columns={role}=NAME)'
  )


def _plain(name):
  name = name.lower().replace('-', '_').replace(' ', '_')
  return 'image' if name == 'file_name' else name.removesuffix('_file_name')
