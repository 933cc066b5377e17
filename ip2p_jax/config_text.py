"""Values of settings as people write them: 'attn2=0.5,.*=1', '(100, 5)', 'true', '3e-5'."""

import ast
import re
from typing import Any

from ip2p_jax.errors import InputError

_NUMBER = r'[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?'
_RULE = re.compile(rf'\s*(.*?)\s*=\s*({_NUMBER})\s*(?:,|$)')


def parse(name: str, text: str, known: Any) -> Any:
  """The value that `text` stands for, of the type of `known`; InputError if it is none.

  Rules, ((pattern, number), ...), may be written as 'pattern=number,pattern=number', as a dict, or
  as they are; other tuples with or without their brackets.
  """
  if isinstance(known, str):
    return text
  is_rules = isinstance(known, tuple) and bool(known) and isinstance(known[0], tuple)
  value = _rules(text) if is_rules else _plain(text, known)
  if type(value) is not type(known) or (isinstance(known, tuple) and not is_rules and not (
    [type(x) for x in value] == [type(x) for x in known]
  )):  # fmt: skip
    how = f'{name}={_written(known, is_rules)}'
    kind = 'rules' if is_rules else f'a {type(known).__name__}'
    raise InputError(f'{name}={text}: {name} takes {kind}, as in {how}.')
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
    return tuple(value.items())
  if isinstance(value, (tuple, list)):
    return tuple(tuple(rule) if isinstance(rule, list) else rule for rule in value)
  return None


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


def _written(known, is_rules):
  if not is_rules:
    return ','.join(map(str, known)) if isinstance(known, tuple) else known
  return "'attn2=0.5,.*=1'"
