"""Runs the real compilers of TPUs and GPUs, and reads their analyses; no program runs."""

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

# The compiler takes less time and memory; the program is slower, and needs about as much memory.
QUICK = {'exec_time_optimization_effort': -1.0}


class Compiled(NamedTuple):
  """The compiler's analysis of one program. Bytes, FLOPs and cycles are of one device.

  A quickly compiled program is not the one that will run, so its bytes moved and cycles are 0. If
  jax could not read the program, its cycles are 0 and its collectives are unknown. Only TPUs have
  FLOPs and cycles, only GPUs have kernels.

  `fits` is whether the memory is enough. If not, a TPU's compiler stops, and nothing else is known;
  a GPU's compiler does not check. Operations in a loop count once in FLOPs, kernels and a TPU's
  bytes, and as often as they run in cycles, collectives and a GPU's bytes.
  """

  fits: bool
  problem: str = ''
  argument_bytes: int = 0
  alias_bytes: int = 0
  temporary_bytes: int = 0
  result_bytes: int = 0  # without those that reuse the memory of arguments
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
  """Compiles, which may take many minutes; too little memory is a result, not an error.

  `is_quick`, for TPUs: with little effort; then the time of the program stays unknown.
  """
  if gpus.is_gpu(topology):
    return compiled_for_gpu(lowered, chip_of(topology).memory)
  return compiled_for_tpu(lowered, is_quick)


def compiled_for_tpu(lowered: jax.stages.Lowered, is_quick: bool = False) -> Compiled:
  began = time.time()
  try:
    compiled = _compile(lowered, QUICK if is_quick else None)
  except Exception as error:
    match = re.search(r'Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm', str(error))
    if match is None and 'RESOURCE_EXHAUSTED' not in str(error):
      raise _refused('TPU', error) from error
    problem = 'needs more memory than there is'
    if match:
      problem = f'needs {match[1]} {match[2]}iB of {match[3]} {match[4]}iB'
    return Compiled(False, problem, seconds=time.time() - began, is_quick=is_quick)
  cost = compiled.cost_analysis() or {}
  try:
    program = compiled.as_text()
  except Exception:  # this jaxlib does not know all operations of a newer compiler
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
  """Compiles for a GPU with `memory` bytes."""
  began = time.time()
  try:
    compiled = _compile(lowered, gpus.OPTIONS)
  except Exception as error:
    raise _refused('GPU', error) from error
  program = compiled.as_text()
  result = Compiled(
    fits=True,
    **_memory(compiled),
    bytes_accessed=bytes_moved(program),
    collectives=tuple(collectives_of(program)),
    kernels=kernels_of(program),
    seconds=time.time() - began,
  )
  if result.needed_bytes <= gpus.LARGEST_SHARE * memory:
    return result
  return result._replace(fits=False, problem=f'needs {gib(result.needed_bytes)} of {gib(memory)}')


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> jax.stages.Compiled:
  """Compiles in another thread, so that Ctrl-C still works."""
  return ThreadPoolExecutor(1).submit(quietly, lowered.compile, options).result()


def _refused(kind: str, error: Exception) -> InputError:
  message = str(error).splitlines()[0][:300]
  return InputError(f'the {kind} compiler refuses this program: {message}')


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  memory = compiled.memory_analysis()
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'alias_bytes': memory.alias_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'result_bytes': max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
  }
