"""Finds the columns of a table that hold an edit, and makes rows of them.

A role is a part of an edit ('input', 'instruction'). A column is its name in a data set; it has at
most one role. Names that data sets on the Hugging Face hub use are recognised. The user gives other
names by `columns`, such as 'input=before,edited=after,instruction=text'. The content of a column
counts as well as its name. A column of text never becomes an image column, or the other way round.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ip2p_jax.data.rows import Pair, Row
from ip2p_jax.errors import InputError

# Names of columns by role, in groups. A later group counts only if no name of an earlier group is
# present. So 'input' is a caption if there is 'input_image' (HQ-Edit), and else the image.
ALIASES = {
  'input': (
    (
      'input_image', 'original_image', 'source_image', 'source_img', 'src_img', 'before_image',
      'image_file', 'conditioning_image', 'control_image',
    ),
    ('input', 'original', 'source', 'before', 'image'),
  ),
  'edited': (
    (
      'edited_image', 'output_image', 'target_image', 'target_img', 'edited_img', 'after_image',
      'edited_file', 'ground_truth_image', 'cartoonized_image',
    ),
    ('edited', 'output', 'target', 'after'),
  ),
  'instruction': (
    (
      'instruction', 'instructions', 'edit_prompt', 'edit', 'edited_prompt_list',
      'edit_instruction',
    ),
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
}  # fmt: skip
# Names of roles in messages.
NOUNS = {role: role for role in ALIASES} | {
  'input': 'input image',
  'edited': 'edited image',
  'inverse': 'inverse instruction',
  'caption': 'caption of the input image',
  'edited_caption': 'caption of the edited image',
  'image': 'image',
  'text': 'caption',
}
# Beside one of these, 'image' is the edited image, as in diffusers' ControlNet scripts.
CONDITIONS = ('conditioning_image', 'control_image')
IMAGE_ROLES = ('input', 'edited', 'image')
ROLES = {
  'edit': ('input', 'edited', 'instruction', 'inverse', 'caption', 'edited_caption'),
  'text_to_image': ('image', 'text', 'edited', 'edited_caption'),
}
# Rows with equal values in such a column are about the same image, for instance turns of an edit.
GROUPS = ('img_id', 'image_id')
# English words that a mirrored image would make wrong: sides, senses of rotation, writing.
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
  """The column of each role, or None. Text-to-image has no `input`.

  Rows with the same value in the column `group` are about the same image.
  """

  input: str | None
  edited: str | None
  instruction: str
  inverse: str | None = None
  caption: str | None = None
  edited_caption: str | None = None
  group: str | None = None


def find(
  names: Sequence[str],
  columns: str = '',
  task: str = 'edit',
  place: str = '',
  kinds: Mapping[str, str] | None = None,
  needs_edited: bool = True,
) -> Columns:
  """Finds the column of each role. No column has two roles.

  Args:
    names: names of all columns. Hugging Face's 'input_image_file_name' counts as
      'input_image', and 'file_name' as 'image'.
    columns: the user's choice, 'role=column,...'. A role may come several times if several data
      sets are mixed. A role without a column ('inverse=') is left out.
    task: 'edit' or 'text_to_image'. From a data set of edits, 'text_to_image' takes the edited
      image and its caption.
    place: the data set, for messages.
    kinds: what each column holds: 'image', 'text' or other words for anything else. A column
      that is absent here may hold anything.
    needs_edited: whether edits must have an edited image; if not, its column may be None.

  Raises InputError if a role has no column, several possible columns, or a column that holds
  something else.
  """
  choices = parse(columns, task)
  search = _Search(names, choices, kinds or {}, place)
  if task == 'text_to_image':
    if not {'image', 'text'} & set(choices):
      has_choices = bool(choices)
      edited = search.pick('edited', required=has_choices)
      caption = search.pick('edited_caption', required=has_choices)
      if edited and caption:
        return Columns(None, edited, caption, edited_caption=caption, group=search.group())
      search.taken.clear()
    image, text = search.pick('image'), search.pick('text')
    return Columns(None, image, text, edited_caption=text, group=search.group())
  before = search.pick('input', rest='edited' in choices)
  also = ('image',) if plain(before) in CONDITIONS else ()
  after = search.pick('edited', needs_edited, rest='input' in choices, also=also)
  instruction = search.pick('instruction')
  optional = [search.pick(role, required=False) for role in ROLES['edit'][3:]]
  return Columns(before, after, instruction, *optional, search.group())


def to_row(
  name: str,
  values: Mapping[str, Any],
  columns: Columns,
  read_image: Callable[[Any, str], bytes],
  inverse: bool = False,
) -> Row:
  """Makes a Row of a row of a table.

  Args:
    name: place of the row, for messages.
    values: cells by column.
    columns: result of `find`.
    read_image: (value, column) -> an encoded image.
    inverse: whether to go from the edited image back to the input, by the inverse instruction.
      A row without an inverse instruction is used in the normal direction.

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
  pair = Pair(
    read_image(values[before], before) if before else None, read_image(values[after], after)
  )
  group = values.get(columns.group)
  return Row(
    name,
    instructions,
    (pair,),
    all(map(may_flip, instructions)),
    *(' '.join(texts(values.get(column))[:1]) for column in (caption, edited_caption)),
    '' if group is None else str(group),
  )


def texts(value: Any) -> tuple[str, ...]:
  """The texts of a cell that holds one text or a list. Leaves out blank texts and other values."""
  cells = value if isinstance(value, list | tuple) else [value]
  return tuple(cell.strip() for cell in cells if isinstance(cell, str) and cell.strip())


def may_flip(instruction: str) -> bool:
  """Whether an English instruction stays true when both images are mirrored.

  False if it names a side, a sense of rotation, or writing (by a word, or in quotation marks).
  In doubt it is False: 'right' may mean 'now', but then only one mirrored image is lost.
  """
  return not SIDED.search(instruction)


def parse(columns: str, task: str) -> dict[str, list[str]]:
  """The user's choice as {role: columns}; an empty list for a role that is left out.

  Raises InputError if it is not a list of roles and columns, or gives a column two roles.
  """
  choices, role_of = {}, {}
  for item in filter(None, (item.strip() for item in columns.split(','))):
    role, equals, column = (part.strip() for part in item.partition('='))
    if not equals or role not in ALIASES:
      raise InputError(
        f'columns: {item!r} is not a role and a column, such as input=before; roles are '
        f'{", ".join(ALIASES)}'
      )
    if role not in ROLES[task]:
      raise InputError(
        f'columns: {item!r} does not fit {task}; its roles are {", ".join(ROLES[task])}'
      )
    if column and role_of.setdefault(column, role) != role:
      raise InputError(
        f'columns: {column!r} is named for both the {role_of[column]} and the {role}; a column has'
        ' one role'
      )
    choices.setdefault(role, []).extend([column] if column else [])
  if {'image', 'text'} & set(choices) and {'edited', 'edited_caption'} & set(choices):
    raise InputError('columns: give image and text, or edited and edited_caption, not some of each')
  return choices


class _Search:
  """The columns, their kinds and the user's choices; `pick` takes a column for a role."""

  def __init__(self, names, choices, kinds, place):
    self.names, self.choices, self.kinds, self.place = names, choices, kinds, place
    self.taken = set()

  def pick(self, role, required=True, rest=False, also=()):
    """The column of a role. With `rest`, if no name fits, the only image column that is left."""
    choice, groups = self.choices.get(role), (*ALIASES[role], also)
    if choice is None:
      groups = [[x for x in self._free(role) if plain(x) in group] for group in groups]
    else:
      groups = [[x for x in self.names if x in choice]]
      for name in groups[0]:
        self._check_kind(role, name)
    candidates = next(filter(None, groups), [])
    if not candidates and choice is None and rest:
      left = [
        x for x in self._free(role) if self.kinds.get(x) == 'image' and 'mask' not in plain(x)
      ]
      candidates = left if len(left) == 1 else []
    if not candidates and not required and not choice:
      return None
    if len(candidates) != 1 and (required or choice or role in IMAGE_ROLES):
      self._refuse(role, candidates)
    self.taken.add(candidates[0])
    return candidates[0]

  def group(self):
    """A free column whose equal values mean the same image; None if there is none."""
    return next((x for x in self.names if plain(x) in GROUPS and x not in self.taken), None)

  def _free(self, role):
    """Columns without a role that the user did not name and that hold what the role needs."""
    reserved = {name for columns in self.choices.values() for name in columns} | self.taken
    return [x for x in self.names if x not in reserved and self._fits(role, x)]

  def _fits(self, role, name):
    return self.kinds.get(name, '') in ('', 'image' if role in IMAGE_ROLES else 'text')

  def _check_kind(self, role, name):
    if not self._fits(role, name):
      kind = 'an image' if role in IMAGE_ROLES else 'text'
      raise InputError(
        f'{self.place}: columns: the {role} must be {kind}, but the column {name!r} holds'
        f' {self.kinds[name]}; {self._columns()}; name another column'
      )

  def _columns(self):
    if not self.names:
      return 'there are no columns'
    return f'the columns are {", ".join(self.names)}'

  def _refuse(self, role, candidates):
    choice = self.choices.get(role)
    aliases = [x for groups in ALIASES[role] for x in groups]
    unfit = [x for x in self.names if plain(x) in aliases and not self._fits(role, x)]
    if candidates:
      problem = f'{" and ".join(map(repr, candidates))} could each be the {NOUNS[role]}'
    elif choice:
      problem = f'there is no column {" or ".join(map(repr, choice))} (for the {role})'
    elif choice is not None:
      problem = f'columns: {role}= names no column, but the {NOUNS[role]} is required'
    else:
      problem = f'no column has a name known for the {NOUNS[role]}'
      if unfit:
        problem += f' ({unfit[0]!r} holds {self.kinds[unfit[0]]})'
    raise InputError(
      f'{self.place}: {problem}; {self._columns()}; name the column by --columns {role}=NAME'
      f' (when training: --config.data.columns={role}=NAME)'
    )


def plain(name: str) -> str:
  """A column's name in the spelling of ALIASES."""
  name = name.lower().replace('-', '_').replace(' ', '_')
  return 'image' if name == 'file_name' else name.removesuffix('_file_name')
