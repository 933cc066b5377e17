"""TPUs and GPUs that need not be present: names, data, and devices to compile for."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ip2p_jax.errors import InputError
from ip2p_jax.planning import gpus
from ip2p_jax.training import flops

GIB = 1 << 30


class Chip(NamedTuple):
  """One JAX device: memory in bytes, bandwidth in bytes/s, clock in Hz.

  Values for TPUs are from Google's system pages, except the clock, which is an assumption; it turns
  the compiler's cycles into time. `kind` is the device's name in `flops.PEAKS`.
  """

  memory: float
  bandwidth: float
  clock: float
  kind: str


CHIPS = {
  'v3': Chip(16 * GIB, 450e9, 0.94e9, 'TPU v3'),
  'v4': Chip(32 * GIB, 1228e9, 1.05e9, 'TPU v4'),
  'v5e': Chip(16 * GIB, 819e9, 1.5e9, 'TPU v5e'),
  'v5p': Chip(95 * GIB, 2765e9, 1.75e9, 'TPU v5p'),
  'v6e': Chip(32 * GIB, 1640e9, 1.75e9, 'TPU v6e'),
}
# Names of slices have the number of cores (v3, v4, v5p: two per chip) or of chips (v5e, v6e).
SLICES = {
  'v3-8': 'v3:2x2', 'v3-32': 'v3:4x4', 'v3-128': 'v3:8x8',
  'v4-8': 'v4:2x2x1', 'v4-16': 'v4:2x2x2', 'v4-32': 'v4:2x2x4', 'v4-64': 'v4:2x4x4',
  'v5e-1': 'v5e:1x1', 'v5e-4': 'v5e:2x2', 'v5e-8': 'v5e:2x4', 'v5e-16': 'v5e:4x4',
  'v5e-32': 'v5e:4x8', 'v5e-64': 'v5e:8x8', 'v5e-128': 'v5e:8x16', 'v5e-256': 'v5e:16x16',
  'v5p-8': 'v5p:2x2x1', 'v5p-16': 'v5p:2x2x2', 'v5p-32': 'v5p:2x2x4', 'v5p-64': 'v5p:2x4x4',
  'v6e-1': 'v6e:1x1', 'v6e-4': 'v6e:2x2', 'v6e-8': 'v6e:2x4', 'v6e-16': 'v6e:4x4',
  'v6e-32': 'v6e:4x8', 'v6e-64': 'v6e:8x8', 'v6e-256': 'v6e:16x16',
}  # fmt: skip
# Without these, libtpu asks Google's network for its identity and warns that there is no answer,
# and a second process may not load it. Programs are the same.
ALONE = {
  'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
}  # fmt: skip


def describe(topology: str) -> list[Any]:
  """Devices of a slice ('v5e-16'), a shape ('v5e:4x4') or GPUs ('h100x8'), which need not exist.

  InputError for an unknown name, or if the compiler is not installed.
  """
  use_none()
  check_name(topology)
  if gpus.is_gpu(topology):
    return gpus.describe(topology)
  name = SLICES.get(topology, topology)
  for key, value in ALONE.items():
    os.environ.setdefault(key, value)
  try:
    # Both cores of a v4 are one device, as when JAX runs; the compiler needs the option for that.
    options = {'chip_config_name': 'megacore'} if generation(name) == 'v4' else {}
    sides = [int(side) for side in name.split(':')[1].split('x')]
    if generation(name) in ('v5e', 'v6e') and math.prod(sides) <= 8:  # all on one host
      options['chips_per_host_bounds'] = (*sides, 1)
    description = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
    return list(description.devices)
  except Exception as error:
    if importlib.util.find_spec('libtpu') is None:
      raise InputError(
        "the TPU compiler is missing: pip install 'jax[tpu]', which brings the right libtpu."
      ) from None
    raise InputError(
      f'the TPU compiler does not know {topology!r} ({str(error).splitlines()[0][:120]}); use an'
      f' existing shape, such as v5e:4x4, or a slice: {", ".join(SLICES)}.'
    ) from None


def use_none() -> None:
  """Keeps jax off the devices that are present."""
  jax.config.update('jax_platforms', 'cpu')


def check_name(topology: str) -> None:
  """Raises InputError for a name that is not like those of `describe`."""
  if gpus.is_gpu(topology):
    gpus.parse(topology)
    return
  name = SLICES.get(topology, topology)
  sides = r'\d+x\d+x\d+' if generation(name) in ('v4', 'v5p') else r'\d+x\d+'
  if not re.fullmatch(f'({"|".join(CHIPS)}):{sides}', name):
    raise InputError(
      f'topology is {topology!r}; use a slice such as v5e-16, or a shape such as v5e:4x4'
      f' (of {", ".join(CHIPS)}; v4 and v5p have three sides), or GPUs of one host: one of'
      f' {", ".join(gpus.GPUS)}, or h100x8.'
    )


def generation(topology: str) -> str:
  """'v5e' of 'v5e-16' or 'v5e:4x4'."""
  return re.split('[-:]', topology)[0]


def chip_of(topology: str) -> Chip:
  """The data of a topology's devices; InputError for unknown GPUs."""
  if gpus.is_gpu(topology):
    gpu, _ = gpus.parse(topology)
    return Chip(gpu.memory, gpu.bandwidth, 1e9 * gpu.clock, gpu.kind)
  return CHIPS[generation(topology)]


def peak_of(topology: str) -> float:
  """FLOP/s of one device, bfloat16 products with float32 sums, no sparsity."""
  return flops.peak_of_kind(chip_of(topology).kind)


def gib(count: float) -> str:
  return f'{count / GIB:.2f} GiB'
