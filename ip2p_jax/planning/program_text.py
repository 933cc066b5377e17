"""Reads the text of a compiled program, in XLA's own form, for TPUs, GPUs or CPUs."""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
           's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}  # fmt: skip
# Operations that move no bytes: they name arrays, or call operations that are counted themselves.
_MOVES_NOTHING = {
  'parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id',
}  # fmt: skip


class Collective(NamedTuple):
  """One exchange between devices; `bytes` is its result on a device, `source` its operation."""

  kind: str
  bytes: int
  times: int
  source: str


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
  """Lines of every computation by name, and the name of the entry."""
  computations, entry, name = {}, '', None
  for line in program.splitlines():
    opened = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if opened and not line.startswith(' '):
      name = opened[2]
      computations[name] = []
      entry = name if opened[1] else entry
    elif name is not None and line.startswith(' '):
      computations[name].append(line)
  return computations, entry


def walk(program: str, *, into_fusions: bool = True):
  """Yields (line, times) for every line that runs; `times` counts the steps of its loops."""
  computations, entry = _computations(program)
  waiting = [(entry, 1)]
  while waiting:
    name, times = waiting.pop()
    for line in computations.get(name, ()):
      yield line, times
      body = re.search(r'\bwhile\(.*body=%?([\w.\-]+)', line)
      if body:
        waiting.append((body[1], times * _rounds(line, computations)))
      if not into_fusions and ' fusion(' in line:
        continue
      # Branches, and operations that are fused with an exchange between devices or wait for one.
      for called in re.findall(
        r'(?:branch_computations=\{|_computation=|calls=)%?([\w.\-]+)', line
      ):
        waiting.append((called, times))


def _rounds(line: str, computations: dict[str, list[str]]) -> int:
  """The number of a loop's steps; 1 if the program does not show it."""
  if match := re.search(r'known_trip_count\D+(\d+)', line):
    return int(match[1])
  # A TPU's program only has a limit: it counts from 0 while `counter < constant`.
  condition = computations.get(re.search(r'condition=%?([\w.\-]+)', line)[1], ())
  if not any('direction=LT' in text for text in condition):
    return 1
  limits = [match[1] for text in condition if (match := re.search(r'\bconstant\((\d+)\)', text))]
  return int(limits[0]) if len(limits) == 1 else 1


def cycles_of(program: str) -> float:
  """The compiler's estimate for one run, without custom kernels."""
  total = 0.0
  for line, times in walk(program):  # fusions have an estimate, operations inside them do not
    if match := re.search(r'"estimated_cycles":"(\d+)"', line):
      total += times * int(match[1])
  return total


def kernels_of(program: str) -> dict[str, int]:
  """Calls of libraries and custom kernels by name; calls in a loop count once."""
  return collections.Counter(
    match[1]
    for line, _ in walk(program)
    if (match := re.search(r'custom_call_target="([^"]+)"', line))
  )


def bytes_moved(program: str) -> float:
  """Bytes that one run reads and writes, if every kernel reads and writes each of its arrays once.

  One-dimensional arrays of bytes count as scratch, which moves nothing.
  """
  lines = [line for block in _computations(program)[0].values() for line in block]
  parsed = {line: match for line in lines if (match := _OPERATION.match(line))}
  # A library may use its scratch, but need not move it.
  moved = lambda shape: _bytes(re.sub(r'\b[su]8\[\d*\]', '', shape))
  sizes = {match['name']: moved(match['shape']) for match in parsed.values()}
  total = 0.0
  for line, times in walk(program, into_fusions=False):
    match = parsed.get(line)
    if match is None or match['kind'] in _MOVES_NOTHING or match['kind'].endswith('-done'):
      continue
    inputs = re.findall(r'%([\w.\-]+)', match['inputs'])
    total += times * (sizes[match['name']] + sum(sizes.get(name, 0) for name in inputs))
  return total


# name = shape kind(%input, %input, ...)
_OPERATION = re.compile(
  r'\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<kind>[a-z][a-z\-]*)\((?P<inputs>[^)]*)\)'
)


def collectives_of(program: str) -> list[Collective]:
  """The exchanges between devices, equal ones together, the largest first."""
  counts = collections.Counter()
  pattern = re.compile(rf'= (.*?) ({"|".join(COLLECTIVES)})(-start)?\(')
  for line, times in walk(program):
    match = pattern.search(line)
    if not match:
      continue
    is_pair = match[3] and match[2] != 'all-reduce'  # started: (inputs, results, ...)
    size = _bytes(_elements(match[1])[1] if is_pair else match[1])
    source = re.search(r'op_name="([^"]*)"', line)
    counts[match[2], size, source[1] if source else ''] += times
  return sorted(
    (Collective(kind, size, times, source) for (kind, size, source), times in counts.items()),
    key=lambda collective: -collective.bytes * collective.times,
  )


def _elements(shape: str) -> list[str]:
  """The elements of a tuple's shape, '(f32[2]{0}, (f32[8], u32[]))', which may be tuples."""
  elements, depth = [''], 0
  for character in shape.strip()[1:-1]:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth:
      elements.append('')
    else:
      elements[-1] += character
  return elements


def _bytes(shapes: str) -> int:
  return sum(
    _WIDTHS.get(kind, 0) * math.prod(map(int, sides.split(','))) if sides else _WIDTHS.get(kind, 0)
    for kind, sides in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
  )
