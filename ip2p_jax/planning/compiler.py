"""The real compilers of TPUs and GPUs, and what they say of a program; nothing runs."""

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from ip2p_jax.errors import InputError
from ip2p_jax.planning import gpus
from ip2p_jax.planning.devices import chip_of, gib
from ip2p_jax.planning.program_text import (
  Collective,
  bytes_moved,
  collectives_of,
  cycles_of,
  kernels_of,
)
from ip2p_jax.xla_alarms import quietly

# Less of the compiler's time and memory, for a slower program that needs about as much memory.
QUICK = {'exec_time_optimization_effort': -1.0}


class Compiled(NamedTuple):
  """What the compiler says of one program. Bytes, FLOPs and cycles are of one device.

  Bytes moved and cycles are 0 of a program compiled quickly, which is not the one that will run.
  Cycles are 0, too, if jax could not read the program; then collectives are not known, either.
  FLOPs and cycles are a TPU's alone, kernels a GPU's.

  `fits` is whether the memory is enough. A TPU's compiler stops if not, and then nothing else is
  known; a GPU's does not look at it. What is in a loop counts once in FLOPs, a TPU's bytes and
  kernels, and as often as it runs in a GPU's bytes, cycles and collectives.
  """

  fits: bool
  problem: str = ''
  argument_bytes: int = 0
  alias_bytes: int = 0
  temporary_bytes: int = 0
  result_bytes: int = 0  # besides those that take the place of arguments
  flops: float = 0.0
  bytes_accessed: float = 0.0
  cycles: float = 0.0
  collectives: tuple[Collective, ...] = ()
  kernels: Mapping[str, int] = {}
  seconds: float = 0.0  # of compiling
  is_quick: bool = False

  @property
  def needed_bytes(self) -> int:
    return self.argument_bytes + self.temporary_bytes + self.result_bytes


def compiled_for(topology: str, lowered: jax.stages.Lowered, is_quick: bool = False) -> Compiled:
  """Compiles, which may take many minutes; too little memory is a finding, not an error.

  `is_quick`, of TPUs: with little effort; then it is not told how long the program takes.
  """
  if gpus.is_gpu(topology):
    return compiled_for_gpu(lowered, chip_of(topology).memory)
  return compiled_for_tpu(lowered, is_quick)


def compiled_for_tpu(lowered: jax.stages.Lowered, is_quick: bool = False) -> Compiled:
  began = time.time()
  try:
    compiled = _compile(lowered, QUICK if is_quick else None)
  except Exception as error:
    found = re.search(r'Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm', str(error))
    if found is None and 'RESOURCE_EXHAUSTED' not in str(error):
      raise _refused('TPU', error) from error
    problem = 'needs more memory than there is'
    if found:
      problem = f'needs {found[1]} {found[2]}iB of {found[3]} {found[4]}iB'
    return Compiled(False, problem, seconds=time.time() - began, is_quick=is_quick)
  cost = compiled.cost_analysis() or {}
  try:
    program = compiled.as_text()
  except Exception:  # of a compiler that knows operations which this jaxlib does not
    program = ''
  return Compiled(
    fits=True,
    **_memory(compiled),
    flops=cost.get('flops', 0.0),
    bytes_accessed=0.0 if is_quick else cost.get('bytes accessed', 0.0),
    cycles=0.0 if is_quick else cycles_of(program),
    collectives=tuple(collectives_of(program)),
    seconds=time.time() - began,
    is_quick=is_quick,
  )


def compiled_for_gpu(lowered: jax.stages.Lowered, memory: float) -> Compiled:
  """For a GPU with so many bytes."""
  began = time.time()
  try:
    compiled = _compile(lowered, gpus.OPTIONS)
  except Exception as error:
    raise _refused('GPU', error) from error
  program = compiled.as_text()
  found = Compiled(
    fits=True,
    **_memory(compiled),
    bytes_accessed=bytes_moved(program),
    collectives=tuple(collectives_of(program)),
    kernels=kernels_of(program),
    seconds=time.time() - began,
  )
  if found.needed_bytes <= gpus.LARGEST_SHARE * memory:
    return found
  return found._replace(fits=False, problem=f'needs {gib(found.needed_bytes)} of {gib(memory)}')


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> jax.stages.Compiled:
  """In a thread of its own, so that Ctrl-C is heard meanwhile."""
  return ThreadPoolExecutor(1).submit(quietly, lowered.compile, options).result()


def _refused(whose: str, error: Exception) -> InputError:
  said = str(error).splitlines()[0][:300]
  return InputError(f'the {whose} compiler refuses this program: {said}')


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  found = compiled.memory_analysis()
  return {
    'argument_bytes': found.argument_size_in_bytes,
    'alias_bytes': found.alias_size_in_bytes,
    'temporary_bytes': found.temp_size_in_bytes,
    'result_bytes': max(found.output_size_in_bytes - found.alias_size_in_bytes, 0),
  }
