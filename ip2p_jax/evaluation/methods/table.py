"""All methods of editing by name. A method's module is imported when it is made."""

import importlib
from typing import Any, NamedTuple

from ip2p_jax.errors import InputError, check_choice

# What a method edits with, and how messages say it.
DIFFUSION, CLIP = 'a text-to-image checkpoint', 'the folder of a CLIPModel'
TEXT2LIVE_SIDE = 512  # pixels, of its authors' images


class Entry(NamedTuple):
  """A method in the table.

  Attributes:
    module: of this folder.
    function: in the module: `(model, settings) -> Method`.
    reads: the fields of `Texts` that it cannot do without, besides seeds.
    has_settings: whether the module's `Settings` are this method's.
    base: what it edits with: DIFFUSION, CLIP, or '' for nothing.
    calls: in the module: `settings -> UNet predictions for an image`; '' for none.
    is_trained: whether it is trained for each image, so that one image at a time is enough.
    longest: side in pixels at which it works at most, if its base has no resolution.
  """

  module: str
  function: str
  reads: tuple[str, ...] = ('captions', 'edited_captions')
  has_settings: bool = True
  base: str = DIFFUSION
  calls: str = 'calls'
  is_trained: bool = False
  longest: int | None = None


METHODS = {
  'identity': Entry('plain', 'identity', (), has_settings=False, base='', calls=''),
  'vae': Entry('plain', 'vae', (), has_settings=False, calls=''),
  'sdedit-caption': Entry('plain', 'sdedit_caption', ('edited_captions',), calls='sdedit_calls'),
  'sdedit-instruction': Entry(
    'plain', 'sdedit_instruction', ('instructions',), calls='sdedit_calls'
  ),
  'ddim': Entry('prompt_to_prompt', 'ddim'),
  'direct': Entry('prompt_to_prompt', 'direct'),
  'null-text': Entry('prompt_to_prompt', 'null_text', calls='null_text_calls'),
  'edit-friendly': Entry('edit_friendly', 'edit_friendly'),
  'plug-and-play': Entry('plug_and_play', 'plug_and_play', ('edited_captions',)),
  'text2live': Entry(
    'text2live', 'text2live', base=CLIP, calls='', is_trained=True, longest=TEXT2LIVE_SIDE
  ),
}


def settings_of(name: str, **changes):
  """The method's settings, its authors' but for `changes`; None if it has none.

  InputError for an unknown method or setting, or a value of another kind.
  """
  entry = _entry(name)
  if not entry.has_settings:
    fields, settings = (), None
  else:
    settings = _module(entry).Settings()
    fields = settings._fields
  for key, value in changes.items():
    if key not in fields:
      known = f'its settings are {", ".join(fields)}' if fields else 'it has none'
      raise InputError(f'{key} is no setting of the method {name}; {known}.')
    if not _fits(value, default := getattr(settings, key)):
      raise InputError(f'{key} is {value!r}; the method {name} takes a value such as {default!r}.')
  return settings._replace(**changes) if changes else settings


def network_calls(name: str, **changes) -> float:
  """Predictions of the UNet for one image and edit; a guided prediction counts 2.

  Forward passes alone. Of `null-text` they are the most that there can be, and its gradients come
  on top: at most 10 a step, each for about one prediction. `text2live` has no UNet. It trains a
  small network by a CLIP. `changes` and errors as in `settings_of`.
  """
  settings, entry = settings_of(name, **changes), _entry(name)
  return float(getattr(_module(entry), entry.calls)(settings)) if entry.calls else 0.0


def load(kind: str, base: str | None, dtype: str | None = None) -> Any:
  """What a method with `Entry.base` of this kind edits with: a `TextToImage`, a `Clip` or None.

  InputError if `base`, a local path, is damaged. `dtype` is for a `TextToImage`.
  """
  if kind == DIFFUSION:
    from ip2p_jax.pipeline.text_to_image import TextToImage

    return TextToImage.load(base, dtype)
  if kind == CLIP:
    from ip2p_jax.pipeline.clip_scores import Clip

    return Clip.load(base)
  return None


def check_base(name: str, base: str | None) -> None:
  """Raises InputError if the method needs a base and has none, or the other way round."""
  needs = _entry(name).base
  if needs and base is None:
    raise InputError(f'--method {name} needs --base, {needs}.')
  if base is not None and not needs:
    raise InputError(f'--base: of no use with --method {name}; leave it out.')


def method(name: str, model, **changes):
  """A `Method` on what `load` gives, by name; `changes` as in `settings_of`."""
  settings = settings_of(name, **changes)
  entry = _entry(name)
  return getattr(_module(entry), entry.function)(model, settings)


def _entry(name) -> Entry:
  check_choice('method', name, METHODS)
  return METHODS[name]


def _module(entry):
  return importlib.import_module(f'{__package__}.{entry.module}')


def _fits(value, default):
  if isinstance(default, float):
    return isinstance(value, int | float) and not isinstance(value, bool)
  return type(value) is type(default)
