"""Parameters by dotted name, and rules over those names.

A parameter's name is its path, joined: 'down_blocks.0.resnets.1.conv1.kernel'. Numbers in it are
indices of an `nnx.List`. Rules are ((pattern, value), ...): `re.search`, the first match wins.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ip2p_jax.errors import InputError


def flatten(tree: Mapping) -> dict[str, Any]:
  """{dotted name: leaf} of nested dicts with str and int keys, in the tree's order."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[str(key)] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
  """The inverse of `flatten`: nested dicts; digits become int keys, which `nnx.merge` expects."""
  tree: dict = {}
  for name, leaf in flat.items():
    *path, last = (int(key) if key.isdecimal() else key for key in name.split('.'))
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def first_match(rules: Collection[tuple[str, Any]], name: str, what: str) -> Any:
  """The value of the first rule whose pattern is found in `name`.

  Args:
    rules: ((pattern, value), ...).
    name: a parameter's dotted name.
    what: the setting that holds the rules, for messages: 'optimizer.decays'.

  Raises:
    InputError: no rule matches, or the rules are not patterns and values.
  """
  for pattern, value in _pairs(rules, what):
    if compiled(pattern, what).search(name):
      return value
  raise InputError(
    f"{what}: no rule matches parameter {name}; end the rules with ('', VALUE), on the command line"
    ' .*=VALUE, for all the rest.'
  )


def check_rules(rules: Collection[tuple[str, Any]], names: Collection[str], what: str) -> None:
  """Raises an InputError for a rule that matches no name: it is probably a typo."""
  for pattern, _ in _pairs(rules, what):
    search = compiled(pattern, what).search
    if not any(search(name) for name in names):
      raise InputError(
        f'{what}: rule {pattern!r} matches no parameter; fix the pattern or leave it out '
        f'(names are like {next(iter(names), "conv_in.kernel")}).'
      )


def check_order(rules: Collection[tuple[str, Any]], names: Collection[str], what: str) -> None:
  """Raises an InputError for a rule whose names all match earlier rules."""
  patterns = [pattern for pattern, _ in _pairs(rules, what)]
  searches = [compiled(pattern, what).search for pattern in patterns]
  matching = [[i for i, search in enumerate(searches) if search(name)] for name in names]
  first = {indices[0] for indices in matching if indices}
  for i, pattern in enumerate(patterns):
    matched = sum(i in indices for indices in matching)
    is_rest = i == len(patterns) - 1 and matched == len(matching)  # for all other names, if any
    if i in first or not matched or is_rest:
      continue
    raise InputError(
      f'{what}: rule {pattern!r} does nothing: earlier rules match all of its names, and the first'
      ' match wins; put it before them, or leave it out.'
    )


def compiled(pattern: str, what: str) -> re.Pattern:
  """The regular expression; InputError with the setting's name if it is none."""
  try:
    return re.compile(pattern)
  except (re.error, TypeError) as error:
    raise InputError(f'{what}: {pattern!r} is not a regular expression ({error}).') from None


def _pairs(rules, what):
  # A tuple of one rule without its comma is a rule, not rules.
  pairs = [tuple(rule) if isinstance(rule, (tuple, list)) else () for rule in rules]
  if any(len(pair) != 2 for pair in pairs):
    raise InputError(f"{what}: is {rules!r}; write (('pattern', VALUE), ...), with the commas.")
  return pairs
