"""NVIDIA GPUs that need not be present: the data that the GPU compiler needs.

The compiler comes with `pip install 'jax[cuda13]'` and needs no GPU.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ip2p_jax.errors import InputError


class Gpu(NamedTuple):
  """OpenXLA's description of one GPU: counts, bytes, bytes/s, GHz.

  `fpus` and `threads` are per core (streaming multiprocessor); `shared` is the memory that its
  threads share, `shared_of_block` the most of it that one block of threads may use.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  fpus: int
  threads: int
  memory: int
  bandwidth: float
  clock: float
  l2: int
  shared: int
  shared_of_block: int


GPUS = {
  'a100-40': Gpu('NVIDIA A100-SXM4-40GB', (8, 0), 108, 64, 2048,
                 42331013120, 1555.2e9, 1.41, 41943040, 167936, 166912),
  'a100-80': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 64, 2048,
                 85100068864, 2039.04e9, 1.41, 41943040, 167936, 166912),
  'a6000': Gpu('NVIDIA RTX A6000', (8, 6), 84, 128, 1536,
               51041271808, 768.1e9, 1.8, 6291456, 102400, 101376),
  'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 128, 2048,
              84942979072, 3352.3e9, 1.98, 52428800, 233472, 232448),
  'h200': Gpu('NVIDIA H200', (9, 0), 132, 128, 2048,
              151397597184, 4800e9, 1.98, 52428800, 233472, 232448),
  'b200': Gpu('NVIDIA B200', (10, 0), 148, 128, 2048,
              191514411008, 7672e9, 1.965, 132644864, 233472, 232448),
}  # fmt: skip
MOST = 16  # GPUs of one host
# JAX's share of the memory by default, and the largest share to set: the rest is for CUDA itself
# and for NCCL.
SHARE, LARGEST_SHARE = 0.75, 0.92
SETTING = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
# To choose kernels by trying them needs a GPU; without that, some Triton kernels cannot be built.
OPTIONS = {'xla_gpu_autotune_level': 0, 'xla_gpu_enable_triton_gemm': False}

# XLA's GpuTargetConfig in the text form of protocol buffers.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared_of_block}
  threads_per_core_limit: {gpu.threads} core_count: {gpu.cores} fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{gpu.kind}"
"""


def is_gpu(topology: str) -> bool:
  """Whether a name is like 'h100' or 'h100x8'; no TPU's name starts with a GPU's."""
  return topology.startswith(tuple(GPUS))


def parse(topology: str) -> tuple[Gpu, int]:
  """The GPU and the number on one host: one for 'h100', eight for 'h100x8'; else InputError."""
  match = re.fullmatch(rf'({"|".join(GPUS)})(?:x(\d+))?', topology)
  count = int(match[2] or 1) if match else 0
  if not 1 <= count <= MOST:
    raise InputError(
      f'topology is {topology!r}; use {", ".join(GPUS)}, or several on one host, such as h100x8'
      f' (1 to {MOST}; several hosts of GPUs cannot be planned).'
    )
  return GPUS[match[1]], count


def describe(topology: str) -> list[Any]:
  """Devices that need not exist; InputError if the compiler is not installed."""
  gpu, count = parse(topology)
  if not any(importlib.util.find_spec(f'jax_cuda{major}_plugin') for major in (13, 12)):
    raise InputError(
      "the GPU compiler is missing: pip install 'jax[cuda13]', with the same version as jax; it"
      ' needs 3 GB on the disk, and no GPU.'
    )
  jax.devices()  # loads the plugin, which the next call needs
  try:
    description = topologies.get_topology_desc(
      topology_name='', platform='cuda', target_config=_TARGET.format(gpu=gpu),
      topology=f'1x1x{count}',  # slices, hosts of each, GPUs of a host
    )  # fmt: skip
  except Exception as error:
    raise InputError(
      f'the GPU compiler does not start ({str(error).splitlines()[0][:200]}); install jax and'
      ' jax[cuda13] of the same version, and set JAX_PLATFORMS=cpu if there is no GPU.'
    ) from None
  return list(description.devices)


@contextlib.contextmanager
def lowering_for(device: Any) -> Iterator[None]:
  """Context for lowering a program for a described GPU.

  jax asks the GPUs that are present what cuDNN's attention can do. Inside the context, it gets the
  answers for the described GPU.
  """
  if device.platform not in ('gpu', 'cuda'):
    yield
    return
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  version = lambda text: tuple(int(part) for part in text.split('.'))
  capability = version(device.compute_capability)
  checks = {
    'check_compute_capability': lambda wanted: capability >= version(wanted),
    'is_cuda_compute_capability_equal': lambda wanted: capability == version(wanted),
  }
  before = {name: getattr(cudnn, name) for name in checks if hasattr(cudnn, name)}
  try:
    for name in before:
      setattr(cudnn, name, checks[name])
    yield
  finally:
    for name, check in before.items():
      setattr(cudnn, name, check)
