"""Columns of a table, whatever they are called, and the rows made of them.

A role is what we need ('input', 'instruction'); a column is what a data set calls it, and has one
role at most. Names that data sets on the Hugging Face hub are known to use are found by themselves;
others are said by `columns`, such as 'input=before,edited=after,instruction=text'. What a column
holds counts as well as its name: a column of text is never taken for pictures, or the other way.
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
# What people call them.
NOUNS = {role: role for role in ALIASES} | {
  'input': 'input picture',
  'edited': 'edited picture',
  'inverse': 'inverse instruction',
  'caption': 'caption of the input picture',
  'edited_caption': 'caption of the edited picture',
  'image': 'picture',
  'text': 'caption',
}
# Beside one of these, 'image' is the picture that is made, as in diffusers' ControlNet scripts.
CONDITIONS = ('conditioning_image', 'control_image')
PICTURES = ('input', 'edited', 'image')
ROLES = {
  'edit': ('input', 'edited', 'instruction', 'inverse', 'caption', 'edited_caption'),
  'text_to_image': ('image', 'text', 'edited', 'edited_caption'),
}
# Columns whose equal values tell that rows are about one picture, as turns of an edit are.
GROUPS = ('img_id', 'image_id')
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
  """The column of each role; None where there is none. Text-to-image has no `input`.

  `group` is the column that tells which rows are about one picture.
  """

  input: str | None
  edited: str
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
) -> Columns:
  """Which column has which role. No column has two.

  Args:
    names: of the columns there are. Hugging Face's 'input_image_file_name' counts as
      'input_image', and 'file_name' as 'image'.
    columns: what the user says, 'role=column,...'. A role may be named several times where several
      data sets are mixed; a role without a column ('inverse=') is left out.
    task: 'edit' or 'text_to_image', which takes the edited picture and its caption of an edit set.
    place: the data set, for messages.
    kinds: what columns hold, 'picture', 'text' or anything else in words; a column that is not in
      it may hold anything.

  Raises InputError if a role has no column, or more than one that it could be, or one that holds
  something else.
  """
  said = parse(columns, task)
  search = _Search(names, said, kinds or {}, place)
  if task == 'text_to_image':
    if not {'image', 'text'} & set(said):
      is_said = bool(said)
      edited = search.pick('edited', required=is_said)
      caption = search.pick('edited_caption', required=is_said)
      if edited and caption:
        return Columns(None, edited, caption, edited_caption=caption, group=search.group())
      search.taken.clear()
    image, text = search.pick('image'), search.pick('text')
    return Columns(None, image, text, edited_caption=text, group=search.group())
  before = search.pick('input', rest='edited' in said)
  also = ('image',) if plain(before) in CONDITIONS else ()
  after = search.pick('edited', rest='input' in said, also=also)
  instruction = search.pick('instruction')
  optional = [search.pick(role, required=False) for role in ROLES['edit'][3:]]
  return Columns(before, after, instruction, *optional, search.group())


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
  """The texts of a cell, which holds one or a list; blank ones and what is no text left out."""
  cells = value if isinstance(value, list | tuple) else [value]
  return tuple(cell.strip() for cell in cells if isinstance(cell, str) and cell.strip())


def may_flip(instruction: str) -> bool:
  """Whether an English instruction stays true when both pictures are mirrored.

  False where it names a side, a sense of rotation, or writing (in quotation marks, or by word).
  Errs on the side of False: 'right' may mean 'now', and the price is one flip.
  """
  return not SIDED.search(instruction)


def parse(columns: str, task: str) -> dict[str, list[str]]:
  """What the user says as {role: columns}, without any for a role that is to be left out.

  Raises InputError if it is no list of roles and columns, or gives a column two roles.
  """
  said, role_of = {}, {}
  for item in filter(None, (item.strip() for item in columns.split(','))):
    role, equals, column = (part.strip() for part in item.partition('='))
    if not equals or role not in ALIASES:
      raise InputError(
        f'columns: {item!r} is not a role and a column, such as input=before; roles are '
        f'{", ".join(ALIASES)}'
      )
    if role not in ROLES[task]:
      raise InputError(
        f'columns: {item!r} is of no use for {task}, whose roles are {", ".join(ROLES[task])}'
      )
    if column and role_of.setdefault(column, role) != role:
      raise InputError(
        f'columns: {column!r} is named for both the {role_of[column]} and the {role}; a column has'
        ' one role'
      )
    said.setdefault(role, []).extend([column] if column else [])
  if {'image', 'text'} & set(said) and {'edited', 'edited_caption'} & set(said):
    raise InputError('columns: give image and text, or edited and edited_caption, not some of each')
  return said


class _Search:
  """Columns that are still free, and what is known of them; `pick` takes one."""

  def __init__(self, names, said, kinds, place):
    self.names, self.said, self.kinds, self.place = names, said, kinds, place
    self.taken = set()

  def pick(self, role, required=True, rest=False, also=()):
    """The column of a role; with `rest`, where no name fits, the only pictures that are left."""
    said, groups = self.said.get(role), (*ALIASES[role], also)
    if said is None:
      groups = [[x for x in self._free(role) if plain(x) in group] for group in groups]
    else:
      groups = [[x for x in self.names if x in said]]
      for name in groups[0]:
        self._check_kind(role, name)
    found = next(filter(None, groups), [])
    if not found and said is None and rest:
      left = [
        x for x in self._free(role) if self.kinds.get(x) == 'picture' and 'mask' not in plain(x)
      ]
      found = left if len(left) == 1 else []
    if not found and not required and not said:
      return None
    if len(found) != 1 and (required or said or role in PICTURES):
      self._refuse(role, found)
    self.taken.add(found[0])
    return found[0]

  def group(self):
    """The free column that tells which rows are about one picture; None if there is none."""
    return next((x for x in self.names if plain(x) in GROUPS and x not in self.taken), None)

  def _free(self, role):
    """Columns that have no role yet, are said to have none, and hold what the role needs."""
    others = {name for columns in self.said.values() for name in columns} | self.taken
    return [x for x in self.names if x not in others and self._fits(role, x)]

  def _fits(self, role, name):
    return self.kinds.get(name, '') in ('', 'picture' if role in PICTURES else 'text')

  def _check_kind(self, role, name):
    if not self._fits(role, name):
      what = 'a picture' if role in PICTURES else 'text'
      raise InputError(
        f'{self.place}: columns: the {role} is to be {what}, and the column {name!r} holds'
        f' {self.kinds[name]}; {self._columns()}; name another'
      )

  def _columns(self):
    if not self.names:
      return 'there are no columns'
    return f'the columns are {", ".join(self.names)}'

  def _refuse(self, role, found):
    said = self.said.get(role)
    named = [x for groups in ALIASES[role] for x in groups]
    unfit = [x for x in self.names if plain(x) in named and not self._fits(role, x)]
    if found:
      problem = f'{" and ".join(map(repr, found))} could each be the {NOUNS[role]}'
    elif said:
      problem = f'there is no column {" or ".join(map(repr, said))} (for the {role})'
    elif said is not None:
      problem = f'columns: {role}= names no column, and the {role} is needed'
    else:
      problem = f'no column has a name known for the {NOUNS[role]}'
      if unfit:
        problem += f' ({unfit[0]!r} holds {self.kinds[unfit[0]]})'
    raise InputError(
      f'{self.place}: {problem}; {self._columns()}; say which it is by --columns {role}=NAME'
      f' (when training: --config.data.columns={role}=NAME)'
    )


def plain(name: str) -> str:
  """A column's name as aliases are written."""
  name = name.lower().replace('-', '_').replace(' ', '_')
  return 'image' if name == 'file_name' else name.removesuffix('_file_name')
