"""The one exception for mistakes that the user can fix."""

from collections.abc import Collection


class InputError(ValueError):
  """Something the user gave is wrong: a path, a file, a key, a value.

  The message is one clear sentence. It names the file, key or flag, and says what is wrong and what
  to do. Commands print it on one line and exit with status 2. It never reports a bug of ours.
  """


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
  """Raises InputError if `value` is none of the choices."""
  if value not in choices:
    raise InputError(f'{name} is {value!r}; use one of {", ".join(filter(None, choices))}.')


def check_multiple(name: str, value: int, factor: int) -> None:
  """Raises InputError if `value`, in pixels, is no multiple of a VAE's factor."""
  if value % factor:
    raise InputError(f'{name} is {value}; use a multiple of {factor}.')
