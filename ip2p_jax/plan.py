"""What a training run will cost on a TPU, told by the real TPU compiler on a machine without one.

The compiler comes with `pip install 'jax[tpu]'`. It is given the very step that `train.py` runs, on
the shapes of the config, for a described slice of TPUs; memory is what it will allocate, FLOPs,
bytes and cycles are its own cost model, collectives are read from the program it made. Nothing is
timed.
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from ip2p_jax import attention, flops, optimizer, parameters, sharding, train_step
from ip2p_jax.config import TrainConfig, check_values
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from ip2p_jax.networks import Networks, networks_of_configs
from ip2p_jax.setup_run import trained_shapes
from ip2p_jax.train_step import Recipe

GIB = 1 << 30
# Less of the compiler's time and memory, for a slower program that needs about as much memory.
QUICK = {'exec_time_optimization_effort': -1.0}
NOT_TOLD = 'not told by --quick'


class Chip(NamedTuple):
  """Of one JAX device: memory in bytes, bandwidth in bytes/s, clock in Hz; system pages of Google.

  The clock turns the compiler's cycles into time, and is an assumption.
  """

  memory: float
  bandwidth: float
  clock: float


CHIPS = {
  'v3': Chip(16 * GIB, 450e9, 0.94e9),
  'v4': Chip(32 * GIB, 1228e9, 1.05e9),
  'v5e': Chip(16 * GIB, 819e9, 1.5e9),
  'v5p': Chip(95 * GIB, 2765e9, 1.75e9),
  'v6e': Chip(32 * GIB, 1640e9, 1.75e9),
}
# A slice is sold by its number of cores (v3, v4, v5p: two to a chip) or of chips (v5e, v6e).
SLICES = {
  'v3-8': 'v3:2x2', 'v3-32': 'v3:4x4', 'v3-128': 'v3:8x8',
  'v4-8': 'v4:2x2x1', 'v4-16': 'v4:2x2x2', 'v4-32': 'v4:2x2x4', 'v4-64': 'v4:2x4x4',
  'v5e-1': 'v5e:1x1', 'v5e-4': 'v5e:2x2', 'v5e-8': 'v5e:2x4', 'v5e-16': 'v5e:4x4',
  'v5e-32': 'v5e:4x8', 'v5e-64': 'v5e:8x8', 'v5e-128': 'v5e:8x16', 'v5e-256': 'v5e:16x16',
  'v5p-8': 'v5p:2x2x1', 'v5p-16': 'v5p:2x2x2', 'v5p-32': 'v5p:2x2x4', 'v5p-64': 'v5p:2x4x4',
  'v6e-1': 'v6e:1x1', 'v6e-4': 'v6e:2x2', 'v6e-8': 'v6e:2x4', 'v6e-16': 'v6e:4x4',
  'v6e-32': 'v6e:4x8', 'v6e-64': 'v6e:8x8', 'v6e-256': 'v6e:16x16',
}  # fmt: skip
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
# Else libtpu asks Google's network who it is, complains of having no answer, and a second process
# may not load it. Programs are the same.
ALONE = {
  'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
}  # fmt: skip
_WIDTHS = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2,
           's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}  # fmt: skip


class Collective(NamedTuple):
  """One exchange between devices: its kind, the bytes of its result on a device, whence it came."""

  kind: str
  bytes: int
  times: int
  source: str


class Compiled(NamedTuple):
  """What the compiler says of one program. Bytes, FLOPs and cycles are of one device.

  Bytes accessed and cycles are 0 of a program compiled quickly, which is not the one that will run.
  Cycles are 0, too, if jax could not read the program; then collectives are not known, either.

  `fits` is whether it compiled; then the rest is known, else only what `problem` says. What is in a
  loop counts once in FLOPs and bytes accessed, and as often as it runs in cycles and collectives.
  """

  fits: bool
  problem: str = ''
  argument_bytes: int = 0
  alias_bytes: int = 0
  temporary_bytes: int = 0
  flops: float = 0.0
  bytes_accessed: float = 0.0
  cycles: float = 0.0
  collectives: tuple[Collective, ...] = ()
  seconds: float = 0.0  # of compiling
  is_quick: bool = False


class Plan(NamedTuple):
  """What one training step needs; bytes and FLOPs are of one device."""

  topology: str
  devices: int
  device_batch: int
  parameters: int
  state_bytes: int
  frozen_bytes: int
  analytic_flops: float
  compiled: Compiled


def describe(topology: str) -> list[Any]:
  """Devices of a slice ('v5e-16') or shape ('v5e:4x4') that need not exist.

  InputError for a name that is unknown, or where libtpu is not installed.
  """
  name = SLICES.get(topology, topology)
  sides = r'\d+x\d+x\d+' if generation(name) in ('v4', 'v5p') else r'\d+x\d+'
  if not re.fullmatch(f'({"|".join(CHIPS)}):{sides}', name):
    raise InputError(
      f'topology is {topology!r}; use a slice such as v5e-16, or a shape such as v5e:4x4'
      f' (of {", ".join(CHIPS)}; v4 and v5p have three sides).'
    )
  for key, value in ALONE.items():
    os.environ.setdefault(key, value)
  try:
    # Both cores of a v4 are one device, as they are where JAX runs; the compiler has to be told.
    options = {'chip_config_name': 'megacore'} if generation(name) == 'v4' else {}
    sides = [int(side) for side in name.split(':')[1].split('x')]
    if generation(name) in ('v5e', 'v6e') and math.prod(sides) <= 8:  # all on one host
      options['chips_per_host_bounds'] = (*sides, 1)
    found = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
    return list(found.devices)
  except Exception as error:
    if importlib.util.find_spec('libtpu') is None:
      raise InputError(
        "the TPU compiler is missing: pip install 'jax[tpu]', which brings the libtpu that belongs"
      ) from None
    raise InputError(
      f'the TPU compiler knows no {topology!r} ({str(error).splitlines()[0][:120]}); use a shape'
      f' that is sold, such as v5e:4x4, or a slice: {", ".join(SLICES)}.'
    ) from None


def generation(topology: str) -> str:
  """'v5e' of 'v5e-16' or 'v5e:4x4'."""
  return re.split('[-:]', topology)[0]


def settled(config: TrainConfig, topology: str, device_batch: int | None = None) -> TrainConfig:
  """The config for a topology: accumulating as often as leaves `device_batch` examples at a time.

  InputError if a setting makes no sense, or the devices cannot share a batch evenly.
  """
  check_values(config)
  mesh = sharding.make_mesh(config.mesh.fsdp, describe(topology))
  share, rest = divmod(config.batch_size, mesh.size)
  advised = f'set batch_size to a multiple of {mesh.size}' if rest else f'use a divisor of {share}'
  if device_batch is not None:
    if device_batch < 1 or config.batch_size % (mesh.size * device_batch):
      raise InputError(
        f'--device-batch is {device_batch}, which {mesh.size} devices of {topology} cannot repeat'
        f' to batch_size={config.batch_size}; {advised}.'
      )
    accumulation = config.batch_size // (mesh.size * device_batch)
    config = dataclasses.replace(config, accumulation=accumulation)
  sharding.check_batch(mesh, config.batch_size, config.accumulation)
  return config


def chip_of(topology: str) -> Chip:
  return CHIPS[generation(topology)]


def stable_diffusion(is_editor: bool) -> Networks:
  """Stable Diffusion 1.5, with four more input channels if it is to edit."""
  unet = UNetConfig(in_channels=8 if is_editor else 4)
  return networks_of_configs(unet, VAEConfig(), TextConfig(), Schedule())


def lower_step(config: TrainConfig, networks: Networks, mesh: Mesh, from_latents: bool = True):
  """The training step of a config on shapes alone: (lowered, state, shardings, frozen)."""
  networks = networks._replace(attention=attention.dispatch(config.attention, mesh))
  shapes = parameters.flatten(networks.shapes['unet'])
  trained, _ = trained_shapes(config, shapes)
  transform = optimizer.adamw(config.optimizer, {*shapes, *trained}, config.steps)
  recipe = Recipe(networks, config, transform)
  state = jax.eval_shape(functools.partial(train_step.initial_state, recipe), trained)
  shardings = sharding.of_state(mesh, state, config.mesh.zero1)
  placed = lambda x, where, dtype=None: jax.ShapeDtypeStruct(
    x.shape, dtype or x.dtype, sharding=where
  )
  everywhere, rows = sharding.replicated(mesh), sharding.of_batch(mesh)
  length = networks.text_config.max_position_embeddings
  frozen = {
    part: jax.tree.map(lambda x: placed(x, everywhere, config.dtype), networks.shapes[part])
    for part in ('vae', 'text_encoder')
  }
  frozen['null_ids'] = jax.ShapeDtypeStruct((length,), jnp.int32, sharding=everywhere)
  frozen['unet'] = {
    name: placed(x, sharding.split(mesh, x.shape, ('fsdp',)), config.dtype)
    for name, x in shapes.items()
    if name not in trained
  }
  of = lambda shape, dtype: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=rows)
  batch = {'token_ids': of((length,), jnp.int32), 'weight': of((), jnp.float32)}
  batch['index'] = of((), jnp.int32)
  edits = ('edited_', 'input_') if config.task == 'edit' else ('edited_',)
  if from_latents:
    side = config.resolution // networks.vae_config.factor
    latents = (side, side, networks.vae_config.latent_channels)
    batch |= {f'{of_one}mean': of(latents, jnp.float16) for of_one in edits}
    batch['edited_log_variance'] = of(latents, jnp.float16)
  else:
    pixels = (config.resolution, config.resolution, 3)
    batch |= {f'{of_one}image': of(pixels, jnp.uint8) for of_one in edits}
  state = jax.tree.map(placed, state, shardings)
  step = train_step.jitted(recipe, mesh, shardings)
  return step.lower(state, frozen, batch), state, shardings, frozen


def plan(
  config: TrainConfig,
  networks: Networks,
  topology: str,
  from_latents: bool = True,
  say: Callable[[str], None] = lambda text: None,
  is_quick: bool = False,
) -> Plan:
  """Compiles the step for a topology; takes many minutes at full size, see `docs/tpu.md`.

  InputError for a resolution that the VAE does not take.
  """
  factor = networks.vae_config.factor
  if config.resolution % factor:
    raise InputError(f'resolution is {config.resolution}; use a multiple of {factor}.')
  devices = describe(topology)
  mesh = sharding.make_mesh(config.mesh.fsdp, devices)
  device_batch = sharding.check_batch(mesh, config.batch_size, config.accumulation)
  lowered, state, shardings, frozen = lower_step(config, networks, mesh, from_latents)
  per_example = flops.training_flops(
    networks, config.resolution, latents=from_latents,
    trained_fraction=flops.trained_fraction(networks, frozen['unet']),
  )  # fmt: skip
  known = {
    'topology': topology,
    'devices': len(devices),
    'device_batch': device_batch,
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(state['params'])),
    'state_bytes': sharding.bytes_per_device(state, shardings),
    'frozen_bytes': sharding.bytes_per_device(frozen, jax.tree.map(lambda x: x.sharding, frozen)),
    'analytic_flops': per_example * config.batch_size / len(devices),
  }
  say(f'{topology}: {len(devices)} devices, {device_batch} examples at a time each; compiling')
  return Plan(**known, compiled=compiled_for_tpu(lowered, is_quick))


def compiled_for_tpu(lowered: jax.stages.Lowered, is_quick: bool = False) -> Compiled:
  """Compiles, which may take many minutes; too little memory is a finding, not an error.

  `is_quick`: with little effort; then it is not told how long the program takes.
  """
  began = time.time()
  try:  # in a thread of its own, so that Ctrl-C is heard meanwhile
    options = QUICK if is_quick else None
    compiled = ThreadPoolExecutor(1).submit(lowered.compile, options).result()
  except Exception as error:
    found = re.search(r'Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm', str(error))
    if found is None and 'RESOURCE_EXHAUSTED' not in str(error):
      said = str(error).splitlines()[0][:300]
      raise InputError(f'the TPU compiler refuses this program: {said}') from error
    problem = 'needs more memory than there is'
    if found:
      problem = f'needs {found[1]} {found[2]}iB of {found[3]} {found[4]}iB'
    return Compiled(False, problem, seconds=time.time() - began, is_quick=is_quick)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  try:
    program = compiled.as_text()
  except Exception:  # of a compiler that knows operations which this jaxlib does not
    program = ''
  return Compiled(
    fits=True,
    argument_bytes=memory.argument_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    flops=cost.get('flops', 0.0),
    bytes_accessed=0.0 if is_quick else cost.get('bytes accessed', 0.0),
    cycles=0.0 if is_quick else cycles_of(program),
    collectives=tuple(collectives_of(program)),
    seconds=time.time() - began,
    is_quick=is_quick,
  )


# Reading the compiled program.


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


def walk(program: str):
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


# For people.


def report(found: Plan, config: TrainConfig) -> str:
  """A table of one plan, and what to do."""
  chip, compiled = chip_of(found.topology), found.compiled
  rows = [
    ('devices', f'{found.devices} of {gib(chip.memory)}'),
    (
      'examples',
      f'{config.batch_size} a step, {found.device_batch} at a time on a device'
      f' (accumulation {config.accumulation})',
    ),
    ('parameters learnt', f'{found.parameters:,}'),
    ('state on a device', gib(found.state_bytes)),
    ('frozen on a device', gib(found.frozen_bytes)),
  ]
  if compiled.fits:
    rounds = config.accumulation  # nearly all of a step is in that loop
    moved = rounds * compiled.bytes_accessed
    at_best = max(found.analytic_flops / peak_of(found.topology), moved / chip.bandwidth)
    rows += [
      *memory_rows(compiled, chip),
      ('reused for the new state', gib(compiled.alias_bytes)),
      (
        'FLOPs',
        f'{rounds * compiled.flops / 1e12:.2f} T compiled,'
        f' {found.analytic_flops / 1e12:.2f} T asked for',
      ),
      ('bytes moved', f'{moved / 1e9:.1f} GB' if moved else NOT_TOLD),
      ('time at best', f'{1e3 * at_best:.0f} ms, by FLOPs{" or bytes" * bool(moved)}'),
      ('time as scheduled', scheduled_time(compiled, chip)),
    ]
    rows += collective_rows(compiled.collectives)
  return table(found.topology, compiled, rows, advice(found, config))


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


def memory_rows(compiled: Compiled, chip: Chip) -> list[tuple[str, str]]:
  needed = compiled.argument_bytes + compiled.temporary_bytes
  return [
    ('temporary', gib(compiled.temporary_bytes)),
    ('memory in all', f'{gib(needed)}, {needed / chip.memory:.0%}'),
  ]


def scheduled(compiled: Compiled, chip: Chip) -> float:
  """Seconds."""
  return compiled.cycles / chip.clock


def peak_of(topology: str) -> float:
  """FLOP/s of one device."""
  return flops.peak_of_kind(f'TPU {generation(topology)}')


def gib(count: float) -> str:
  return f'{count / GIB:.2f} GiB'


def advice(found: Plan, config: TrainConfig) -> list[str]:
  """What to change, most effective first; nothing if it fits with room."""
  compiled, memory = found.compiled, chip_of(found.topology).memory
  if compiled.fits:
    share = (compiled.argument_bytes + compiled.temporary_bytes) / memory
    return ['Tight: accumulate more if it fails.'] if share > 0.95 else []
  told = []
  if found.device_batch > 1:
    told.append(f'Try --config.accumulation={2 * config.accumulation}: half as many at a time.')
  if found.state_bytes > 0.5 * memory and found.devices > config.mesh.fsdp:
    ways = min(found.devices, max(4, 2 * config.mesh.fsdp))
    told.append(f'Try --config.mesh.fsdp={ways}: weights split over {ways} devices.')
  if config.remat != 'full':
    told.append('Try --config.remat=full: more is computed twice.')
  return told or ['It will not fit on these devices; use larger ones, or more.']
