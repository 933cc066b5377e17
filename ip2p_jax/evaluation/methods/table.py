"""All methods of editing by name. A method's module is imported when it is made."""

import importlib
from typing import NamedTuple

from ip2p_jax.errors import InputError, check_choice


class Entry(NamedTuple):
  """A method in the table.

  Attributes:
    module: of this folder.
    function: in the module: `(model, settings) -> Method`.
    reads: the fields of `Texts` that it cannot do without, besides seeds.
    has_settings: whether the module's `Settings` are this method's.
  """

  module: str
  function: str
  reads: tuple[str, ...] = ('captions', 'edited_captions')
  has_settings: bool = True


METHODS = {
  'identity': Entry('plain', 'identity', (), has_settings=False),
  'vae': Entry('plain', 'vae', (), has_settings=False),
  'sdedit-caption': Entry('plain', 'sdedit_caption', ('edited_captions',)),
  'sdedit-instruction': Entry('plain', 'sdedit_instruction', ('instructions',)),
  'ddim': Entry('prompt_to_prompt', 'ddim'),
  'direct': Entry('prompt_to_prompt', 'direct'),
  'null-text': Entry('prompt_to_prompt', 'null_text'),
  'edit-friendly': Entry('edit_friendly', 'edit_friendly'),
  'plug-and-play': Entry('plug_and_play', 'plug_and_play', ('edited_captions',)),
}


def settings_of(name: str, **changes):
  """The method's settings, its authors' but for `changes`; None if it has none.

  InputError for an unknown method or setting.
  """
  entry = _entry(name)
  if not entry.has_settings:
    fields, settings = (), None
  else:
    settings = _module(entry).Settings()
    fields = settings._fields
  for key in changes:
    if key not in fields:
      known = f'its settings are {", ".join(fields)}' if fields else 'it has none'
      raise InputError(f'{key} is no setting of the method {name}; {known}.')
  return settings._replace(**changes) if changes else settings


def method(name: str, model, **changes):
  """A `Method` on a `TextToImage` model, by name; `changes` as in `settings_of`."""
  settings = settings_of(name, **changes)
  entry = _entry(name)
  return getattr(_module(entry), entry.function)(model, settings)


def _entry(name) -> Entry:
  check_choice('method', name, METHODS)
  return METHODS[name]


def _module(entry):
  return importlib.import_module(f'{__package__}.{entry.module}')
