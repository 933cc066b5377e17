"""Settings in files and flags, and values such as 'attn2=0.5,.*=1' and '3e-5'."""

import ast
import difflib
import os
import re
import runpy
from collections.abc import Sequence
from typing import Any

from ip2p_jax.config import TrainConfig, knobs, set_knob
from ip2p_jax.config_check import without_idle
from ip2p_jax.errors import InputError

_NUMBER = r'[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?'
_RULE = re.compile(rf'\s*(.*?)\s*=\s*({_NUMBER})\s*(?:,|$)')


RULES = ('optimizer.rates', 'optimizer.decays')


def check_overrides(argv: Sequence[str], kinds: Sequence[type] = (TrainConfig,)) -> None:
  """Raises an InputError for a `--config.KEY` that no kind has; it names the nearest setting."""
  settings = [name for kind in kinds for name, _ in knobs(kind())]
  for argument in argv:
    name = argument.lstrip('-').partition('=')[0].removeprefix('config.')
    if argument.startswith(('--config.', '-config.')) and name not in settings:
      near = _nearest(name, settings)
      hint = f'did you mean --config.{near}?' if near else 'ip2p_jax/config.py lists them all.'
      raise InputError(f'--config.{name} is no setting of a training run; {hint}')


def plain_overrides(argv: Sequence[str], kinds: Sequence[type]) -> list[str]:
  """The arguments, with tuples rewritten from the form of `parse` to the form of absl."""
  defaults = {name: value for kind in kinds for name, value in knobs(kind())}
  argv = list(argv)
  for i, argument in enumerate(argv):
    flag, is_joined, text = argument.partition('=')
    name = flag.lstrip('-').removeprefix('config.')
    if not flag.startswith(('--config.', '-config.')) or not isinstance(defaults.get(name), tuple):
      continue
    if is_joined:
      argv[i] = f'{flag}={parse(name, text, defaults[name])!r}'
    elif i + 1 < len(argv):
      argv[i + 1] = repr(parse(name, argv[i + 1], defaults[name]))
  return argv


def load_config(
  path: str | os.PathLike, changes: Sequence[str] = (), kind: type = TrainConfig
) -> Any:
  """The result of a file's `get_config()`, with changes such as 'optimizer.learning_rate=3e-5'.

  `kind` is its type: `TrainConfig` or `LanguageConfig`. InputError for a file that returns another
  type, a name that is no setting, or a value of another type.
  """
  if not os.path.isfile(path):
    raise InputError(f'{path}: no such file; see configs/.')
  try:
    config = runpy.run_path(os.fspath(path)).get('get_config', lambda: None)()
  except Exception as error:  # a file that is no config may raise anything
    raise InputError(f'{path}: cannot be run ({type(error).__name__}: {error}).') from error
  if not isinstance(config, kind):
    raise InputError(
      f'{path}: is no config for this, a file whose get_config() gives a {kind.__name__}.'
    )
  check_overrides([f'--config.{change}' for change in changes], [kind])
  for change in changes:
    name, has_value, text = change.partition('=')
    if not has_value:
      raise InputError(f'{change}: has no value; write {name}=VALUE.')
    set_knob(config, name, parse(name, text, dict(knobs(config))[name]))
  return without_idle(config, [change.partition('=')[0] for change in changes])


def _nearest(name, settings):
  section, _, word = name.rpartition('.')
  for full in sorted(settings, key=lambda full: full.rpartition('.')[0] != section):
    last = full.rpartition('.')[2]
    if word in (last, ''.join(part[0] for part in last.split('_') if '_' in last)):  # lr
      return full
  by_word = {full.rpartition('.')[2]: full for full in settings}
  near = difflib.get_close_matches(name, settings, 1) or difflib.get_close_matches(word, by_word, 1)
  return by_word.get(near[0], near[0]) if near else None


def parse(name: str, text: str, current: Any) -> Any:
  """The value of the setting `name` in `text`, of the type of its `current` value.

  Rules, ((pattern, number), ...), may be written as 'pattern=number,pattern=number', as a dict, or
  as a tuple; other tuples with or without their brackets. InputError for any other text.
  """
  if isinstance(current, str):
    return text
  value = _rules(text) if name in RULES else _plain(text, current)
  is_fitting = type(value) is type(current)
  if is_fitting and isinstance(current, tuple) and name not in RULES:
    is_fitting = list(map(type, value)) == list(map(type, current))
  if not is_fitting:
    kind, shown = f'a {type(current).__name__}', current
    if name in RULES:
      kind, shown = 'rules', "'attn2=0.5,.*=1' (the first pattern that is found in a name wins)"
    elif isinstance(current, tuple):
      kind, shown = 'two whole numbers, of steps', '100,5'
    raise InputError(f'{name}={text}: {name} takes {kind}, as in {name}={shown}.')
  return value


def _plain(text, current):
  if isinstance(current, bool) and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  value = _literal(text)
  is_whole = isinstance(value, int) and not isinstance(value, bool)
  return float(value) if isinstance(current, float) and is_whole else value


def _rules(text):
  """Rules in any form; None for any other text."""
  value = _literal(text)
  if value is None:
    return _short_rules(text)
  if isinstance(value, dict):
    value = tuple(value.items())
  if not isinstance(value, (tuple, list)):
    return None
  # `parameters` refuses a rule that is no pair.
  return tuple(tuple(rule) if isinstance(rule, list) else rule for rule in value)


def _short_rules(text):
  """'attn2=0.5,.*=1': a number ends a rule, so patterns may have commas and equal signs."""
  rules, end = [], 0
  while end < len(text):
    rule = _RULE.match(text, end)
    if not rule:
      return None
    rules.append((rule[1], float(rule[2])))
    end = rule.end()
  return tuple(rules) or None


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return None
