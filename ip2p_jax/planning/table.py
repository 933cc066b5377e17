"""Plans as tables for people."""

import collections
from collections.abc import Sequence

from ip2p_jax.planning import gpus
from ip2p_jax.planning.compiler import Compiled
from ip2p_jax.planning.devices import Chip, chip_of, gib, peak_of
from ip2p_jax.planning.program_text import Collective

NOT_TOLD = 'not told by --quick'


def table(
  name: str, compiled: Compiled, rows: Sequence[tuple[str, str]], told: Sequence[str]
) -> str:
  """The verdict, a line per row, and what to do."""
  rows = [*rows, ('compiled in', f'{compiled.seconds:.0f} s')]
  if compiled.is_quick and not compiled.fits:
    told = ['If it is close: the real program may need less than that of --quick.', *told]
  width = max(len(label) for label, _ in rows)
  verdict = 'fits' if compiled.fits else f'DOES NOT FIT: {compiled.problem}'
  lines = [f'{label:{width}}  {value}' for label, value in rows]
  return '\n'.join([f'{name}: {verdict}', *(f'  {line}' for line in (*lines, *told))])


def memory_rows(topology: str, compiled: Compiled) -> list[tuple[str, str]]:
  share = compiled.needed_bytes / chip_of(topology).memory
  told = ''
  if gpus.is_gpu(topology) and compiled.fits:
    taken = f'JAX takes {gpus.SHARE:.0%} if not told'
    told = f'; {taken}'
    if share > gpus.SHARE:
      told = f'; set {gpus.SETTING}={gpus.LARGEST_SHARE}, for {taken}'
  return [
    ('temporary', gib(compiled.temporary_bytes)),
    ('memory in all', f'{gib(compiled.needed_bytes)}, {share:.0%}{told}'),
  ]


def best_time(topology: str, operations: float, moved: float) -> float:
  """Seconds that a device takes for so many FLOPs, or to move so many bytes if that is longer."""
  return max(operations / peak_of(topology), moved / chip_of(topology).bandwidth)


def program_rows(topology: str, compiled: Compiled) -> list[tuple[str, str]]:
  """Of a TPU the time, of a GPU the kernels; and what devices exchange."""
  if gpus.is_gpu(topology):
    calls = sorted(compiled.kernels.items(), key=lambda item: -item[1])
    first = ('kernels called', ', '.join(f'{count} {name}' for name, count in calls) or 'none')
  else:
    first = ('time as scheduled', scheduled_time(compiled, chip_of(topology)))
  return [first, *collective_rows(compiled.collectives)]


def collective_rows(collectives: Sequence[Collective]) -> list[tuple[str, str]]:
  """What each kind moves, and whence most of it comes."""
  by_kind, by_source = collections.Counter(), collections.defaultdict(collections.Counter)
  for one in collectives:
    by_kind[one.kind] += one.bytes * one.times
    by_source[one.kind][one.source or 'the compiler'] += one.bytes * one.times
  rows = []
  for kind, size in by_kind.most_common():
    source, part = by_source[kind].most_common(1)[0]
    rows.append((kind, f'{size / 1e6:.1f} MB a device, {part / size:.0%} of {source}'))
  return rows


def scheduled_time(compiled: Compiled, chip: Chip) -> str:
  if compiled.is_quick:
    return NOT_TOLD
  if not compiled.cycles:
    return (
      "unknown: libtpu is newer than this jax can read; pip install 'jax[tpu]' for what belongs"
    )
  time = f'{1e3 * scheduled(compiled, chip):,.0f} ms'
  return f"{time}, by the compiler's cycles; no kernels, no collectives"


def scheduled(compiled: Compiled, chip: Chip) -> float:
  """Seconds."""
  return compiled.cycles / chip.clock
