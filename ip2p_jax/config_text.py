"""Values of settings as people write them: 'attn2=0.5,.*=1', '(100, 5)', 'true', '3e-5'."""

import ast
import re
from typing import Any

from ip2p_jax.errors import InputError

_NUMBER = r'[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?'
_RULE = re.compile(rf'\s*(.*?)\s*=\s*({_NUMBER})\s*(?:,|$)')


RULES = ('optimizer.rates', 'optimizer.decays')


def parse(name: str, text: str, known: Any) -> Any:
  """The value that `text` gives the setting `name`, of the type of `known`, which it has else.

  Rules, ((pattern, number), ...), may be written as 'pattern=number,pattern=number', as a dict, or
  as they are; other tuples with or without their brackets. InputError for what is no such value.
  """
  if isinstance(known, str):
    return text
  value = _rules(text) if name in RULES else _plain(text, known)
  is_fitting = type(value) is type(known)
  if is_fitting and isinstance(known, tuple) and name not in RULES:
    is_fitting = list(map(type, value)) == list(map(type, known))
  if not is_fitting:
    kind, shown = f'a {type(known).__name__}', known
    if name in RULES:
      kind, shown = 'rules', "'attn2=0.5,.*=1' (the first pattern that is found in a name wins)"
    elif isinstance(known, tuple):
      kind, shown = 'two whole numbers, of steps', '100,5'
    raise InputError(f'{name}={text}: {name} takes {kind}, as in {name}={shown}.')
  return value


def _plain(text, known):
  if isinstance(known, bool) and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  value = _literal(text)
  is_whole = isinstance(value, int) and not isinstance(value, bool)
  return float(value) if isinstance(known, float) and is_whole else value


def _rules(text):
  """Rules in whatever form; None for anything else."""
  value = _literal(text)
  if value is None:
    return _short_rules(text)
  if isinstance(value, dict):
    value = tuple(value.items())
  if not isinstance(value, (tuple, list)):
    return None
  # What is no pair is refused by name when rules are used.
  return tuple(tuple(rule) if isinstance(rule, list) else rule for rule in value)


def _short_rules(text):
  """'attn2=0.5,.*=1': a number ends a rule, so patterns may have commas and equal signs."""
  found, end = [], 0
  while end < len(text):
    rule = _RULE.match(text, end)
    if not rule:
      return None
    found.append((rule[1], float(rule[2])))
    end = rule.end()
  return tuple(found) or None


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return None
