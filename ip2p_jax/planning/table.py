"""Plans as tables of text."""

import collections
from collections.abc import Sequence

from ip2p_jax.planning import gpus
from ip2p_jax.planning.compiler import Compiled
from ip2p_jax.planning.devices import Chip, chip_of, gib, peak_of
from ip2p_jax.planning.program_text import Collective

UNKNOWN = 'unknown with --quick'


def table(
  name: str, compiled: Compiled, rows: Sequence[tuple[str, str]], advice: Sequence[str]
) -> str:
  """The verdict, a line per row, and the advice."""
  rows = [*rows, ('compiled in', f'{compiled.seconds:.0f} s')]
  if compiled.is_quick and not compiled.fits:
    advice = ['If it is close: the real program may need less than that of --quick.', *advice]
  width = max(len(label) for label, _ in rows)
  verdict = 'fits' if compiled.fits else f'DOES NOT FIT: {compiled.problem}'
  lines = [f'{label:{width}}  {value}' for label, value in rows]
  return '\n'.join([f'{name}: {verdict}', *(f'  {line}' for line in (*lines, *advice))])


def memory_rows(topology: str, compiled: Compiled) -> list[tuple[str, str]]:
  share = compiled.needed_bytes / chip_of(topology).memory
  advice = ''
  if gpus.is_gpu(topology) and compiled.fits:
    default = f'JAX takes {gpus.SHARE:.0%} by default'
    advice = f'; {default}'
    if share > gpus.SHARE:
      advice = f'; set {gpus.SETTING}={gpus.LARGEST_SHARE}, since {default}'
  return [
    ('temporary', gib(compiled.temporary_bytes)),
    ('memory in all', f'{gib(compiled.needed_bytes)}, {share:.0%}{advice}'),
  ]


def best_time(topology: str, operations: float, moved: float) -> float:
  """Seconds of a device for these FLOPs, or for moving `moved` bytes if that takes longer."""
  return max(operations / peak_of(topology), moved / chip_of(topology).bandwidth)


def program_rows(topology: str, compiled: Compiled) -> list[tuple[str, str]]:
  """The time for a TPU or the kernels for a GPU, and the exchanges between devices."""
  if gpus.is_gpu(topology):
    calls = sorted(compiled.kernels.items(), key=lambda item: -item[1])
    first = ('kernels called', ', '.join(f'{count} {name}' for name, count in calls) or 'none')
  else:
    first = ('time as scheduled', scheduled_time(compiled, chip_of(topology)))
  return [first, *collective_rows(compiled.collectives)]


def collective_rows(collectives: Sequence[Collective]) -> list[tuple[str, str]]:
  """The bytes that each kind moves, and their largest source."""
  by_kind, by_source = collections.Counter(), collections.defaultdict(collections.Counter)
  for collective in collectives:
    moved = collective.bytes * collective.times
    by_kind[collective.kind] += moved
    by_source[collective.kind][collective.source or 'the compiler'] += moved
  rows = []
  for kind, size in by_kind.most_common():
    source, part = by_source[kind].most_common(1)[0]
    rows.append((kind, f'{size / 1e6:.1f} MB a device, {part / size:.0%} of {source}'))
  return rows


def scheduled_time(compiled: Compiled, chip: Chip) -> str:
  if compiled.is_quick:
    return UNKNOWN
  if not compiled.cycles:
    return (
      "unknown: libtpu is newer than this jax can read; pip install 'jax[tpu]' for the right one"
    )
  time = f'{1e3 * scheduled(compiled, chip):,.0f} ms'
  return f"{time}, by the compiler's cycles, without kernels and collectives"


def scheduled(compiled: Compiled, chip: Chip) -> float:
  """Seconds of one run by the compiler's cycles."""
  return compiled.cycles / chip.clock
