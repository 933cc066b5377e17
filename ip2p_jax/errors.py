"""The one exception for mistakes that the user can mend."""


class InputError(ValueError):
  """Something the user gave is wrong: a path, a file, a key, a value.

  The message is one clear sentence: it names the file, key or flag, says what is wrong and what to
  do. Commands print it on one line and exit with status 2; it is never used for our own bugs.
  """
