"""What a compiled program does, read from its text (XLA's own form, of a TPU, a GPU or a CPU)."""

import collections
import math
import re
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
           's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}  # fmt: skip
# What names arrays, or calls what is counted by itself, and moves nothing.
_MOVES_NOTHING = {
  'parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id',
}  # fmt: skip


class Collective(NamedTuple):
  """One exchange between devices: its kind, the bytes of its result on a device, whence it came."""

  kind: str
  bytes: int
  times: int
  source: str


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
  """Lines of every computation by name, and the name of the entry."""
  found, entry, name = {}, '', None
  for line in program.splitlines():
    opened = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if opened and not line.startswith(' '):
      name = opened[2]
      found[name] = []
      entry = name if opened[1] else entry
    elif name is not None and line.startswith(' '):
      found[name].append(line)
  return found, entry


def walk(program: str, *, into_fusions: bool = True):
  """Every line that runs by itself, and how often: bodies of loops as often as these go round."""
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
      # Branches; and what is fused with an exchange between devices, or waits for one.
      for called in re.findall(
        r'(?:branch_computations=\{|_computation=|calls=)%?([\w.\-]+)', line
      ):
        waiting.append((called, times))


def _rounds(line: str, computations: dict[str, list[str]]) -> int:
  """How often a loop goes round; 1 if the program does not tell."""
  if known := re.search(r'known_trip_count\D+(\d+)', line):
    return int(known[1])
  # A TPU's program only says until where it counts: from 0, `counter < constant`.
  condition = computations.get(re.search(r'condition=%?([\w.\-]+)', line)[1], ())
  if not any('direction=LT' in one for one in condition):
    return 1
  limits = [found[1] for one in condition if (found := re.search(r'\bconstant\((\d+)\)', one))]
  return int(limits[0]) if len(limits) == 1 else 1


def cycles_of(program: str) -> float:
  """The compiler's estimate for one run; custom kernels count as nothing."""
  total = 0.0
  for line, times in walk(program):  # only whole fusions have an estimate, nothing within them
    if found := re.search(r'"estimated_cycles":"(\d+)"', line):
      total += times * int(found[1])
  return total


def kernels_of(program: str) -> dict[str, int]:
  """Calls of libraries and of kernels of others, by name; as often as they are written down."""
  return collections.Counter(
    found[1]
    for line, _ in walk(program)
    if (found := re.search(r'custom_call_target="([^"]+)"', line))
  )


def bytes_moved(program: str) -> float:
  """What one run reads and writes, if every kernel reads and writes each of its arrays once.

  Lines of bytes count as scratch, not as arrays.
  """
  lines = [line for block in _computations(program)[0].values() for line in block]
  parsed = {line: found for line in lines if (found := _OPERATION.match(line))}
  # A library's scratch is what it may use, not what it moves.
  moved = lambda shape: _bytes(re.sub(r'\b[su]8\[\d*\]', '', shape))
  sizes = {found['name']: moved(found['shape']) for found in parsed.values()}
  total = 0.0
  for line, times in walk(program, into_fusions=False):
    found = parsed.get(line)
    if found is None or found['kind'] in _MOVES_NOTHING or found['kind'].endswith('-done'):
      continue
    taken = re.findall(r'%([\w.\-]+)', found['taken'])
    total += times * (sizes[found['name']] + sum(sizes.get(name, 0) for name in taken))
  return total


# name = shape kind(%what, %is, %taken)
_OPERATION = re.compile(
  r'\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<kind>[a-z][a-z\-]*)\((?P<taken>[^)]*)\)'
)


def collectives_of(program: str) -> list[Collective]:
  """What devices exchange, equal ones together, the largest first."""
  found = collections.Counter()
  pattern = re.compile(rf'= (.*?) ({"|".join(COLLECTIVES)})(-start)?\(')
  for line, times in walk(program):
    match = pattern.search(line)
    if not match:
      continue
    is_pair = match[3] and match[2] != 'all-reduce'  # started: (what it takes, what it gives, ...)
    size = _bytes(_elements(match[1])[1] if is_pair else match[1])
    source = re.search(r'op_name="([^"]*)"', line)
    found[match[2], size, source[1] if source else ''] += times
  return sorted(
    (Collective(kind, size, times, source) for (kind, size, source), times in found.items()),
    key=lambda one: -one.bytes * one.times,
  )


def _elements(shape: str) -> list[str]:
  """The elements of a tuple's shape, '(f32[2]{0}, (f32[8], u32[]))', which may be tuples."""
  found, depth = [''], 0
  for character in shape.strip()[1:-1]:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and not depth:
      found.append('')
    else:
      found[-1] += character
  return found


def _bytes(shapes: str) -> int:
  return sum(
    _WIDTHS.get(kind, 0) * math.prod(map(int, sides.split(','))) if sides else _WIDTHS.get(kind, 0)
    for kind, sides in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shapes)
  )
