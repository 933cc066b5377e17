"""The cost of a training run on TPUs or GPUs, by their real compiler, without the devices.

The compilers come with `pip install 'jax[tpu]'` and `'jax[cuda13]'`. They compile the step that
`train.py` runs, on the shapes of the config, for described devices. Memory is what a run allocates.
For a TPU, FLOPs, bytes and cycles come from the compiler's cost model. Collectives, and for a GPU
kernels and bytes, are read from the program. Nothing is timed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ip2p_jax import parameters, sharding
from ip2p_jax.config import TrainConfig
from ip2p_jax.config_check import check_values
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError, check_multiple
from ip2p_jax.models import attention
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from ip2p_jax.pipeline.networks import Networks, networks_of_configs
from ip2p_jax.planning import gpus
from ip2p_jax.planning.compiler import Compiled, compiled_for
from ip2p_jax.planning.devices import chip_of, describe, gib
from ip2p_jax.planning.table import UNKNOWN, best_time, memory_rows, program_rows, table
from ip2p_jax.training import flops
from ip2p_jax.training.run import learning
from ip2p_jax.training.step import Recipe, jitted


class TrainingPlan(NamedTuple):
  """The needs of one training step; bytes and FLOPs are of one device."""

  topology: str
  devices: int
  device_batch: int
  parameters: int
  state_bytes: int
  frozen_bytes: int
  analytic_flops: float
  compiled: Compiled


def settled(config: TrainConfig, topology: str, device_batch: int | None = None) -> TrainConfig:
  """The config for a topology; `device_batch` examples at a time decide its `accumulation`.

  InputError if a setting makes no sense, or if the devices cannot share a batch evenly.
  """
  check_values(config)
  mesh = sharding.make_mesh(config.mesh.fsdp, describe(topology))
  share, rest = divmod(config.batch_size, mesh.size)
  advised = f'set batch_size to a multiple of {mesh.size}' if rest else f'use a divisor of {share}'
  if device_batch is not None:
    if device_batch < 1 or config.batch_size % (mesh.size * device_batch):
      raise InputError(
        f'--device-batch is {device_batch}, but batch_size={config.batch_size} is no multiple of'
        f' that on {mesh.size} devices of {topology}; {advised}.'
      )
    accumulation = config.batch_size // (mesh.size * device_batch)
    config = dataclasses.replace(config, accumulation=accumulation)
  sharding.check_batch(mesh, config.batch_size, config.accumulation)
  return config


def stable_diffusion(is_editor: bool) -> Networks:
  """Stable Diffusion 1.5, for an editor with four more input channels."""
  unet = UNetConfig(in_channels=8 if is_editor else 4)
  return networks_of_configs(unet, VAEConfig(), TextConfig(), Schedule())


def lower_step(config: TrainConfig, networks: Networks, mesh: Mesh, from_latents: bool = True):
  """The training step of a config on shapes alone: (lowered, state, shardings, frozen)."""
  networks = networks._replace(attention=attention.dispatch(config.attention, mesh))
  shapes = parameters.flatten(networks.shapes['unet'])
  learner = learning(config, shapes, functools.partial(Recipe, networks, config), mesh)
  placed = lambda x, placement, dtype=None: jax.ShapeDtypeStruct(
    x.shape, dtype or x.dtype, sharding=placement
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
    if name not in learner.trained
  }
  array = lambda shape, dtype: jax.ShapeDtypeStruct(
    (config.batch_size, *shape), dtype, sharding=rows
  )
  batch = {'token_ids': array((length,), jnp.int32), 'weight': array((), jnp.float32)}
  batch['index'] = array((), jnp.int32)
  roles = ('edited', 'input') if config.task == 'edit' else ('edited',)
  if from_latents:
    side = config.resolution // networks.vae_config.factor
    latents = (side, side, networks.vae_config.latent_channels)
    batch |= {f'{role}_mean': array(latents, jnp.float16) for role in roles}
    batch['edited_log_variance'] = array(latents, jnp.float16)
  else:
    pixels = (config.resolution, config.resolution, 3)
    batch |= {f'{role}_image': array(pixels, jnp.uint8) for role in roles}
  state = jax.tree.map(placed, learner.state, learner.shardings)
  step = jitted(learner.recipe, mesh, learner.shardings)
  with gpus.lowering_for(mesh.devices.flat[0]):
    lowered = step.lower(state, frozen, batch)
  return lowered, state, learner.shardings, frozen


def plan_training(
  config: TrainConfig,
  networks: Networks,
  topology: str,
  from_latents: bool = True,
  say: Callable[[str], None] = lambda text: None,
  is_quick: bool = False,
) -> TrainingPlan:
  """Compiles the step for a topology; takes many minutes at full size, see `docs/tpu.md`.

  InputError for a resolution that the VAE does not take.
  """
  factor = networks.vae_config.factor
  check_multiple('resolution', config.resolution, factor)
  devices = describe(topology)
  mesh = sharding.make_mesh(config.mesh.fsdp, devices)
  device_batch = sharding.check_batch(mesh, config.batch_size, config.accumulation)
  lowered, state, shardings, frozen = lower_step(config, networks, mesh, from_latents)
  per_example = flops.training_flops(
    networks, config.resolution, latents=from_latents,
    trained_fraction=flops.trained_fraction(networks, frozen['unet']),
  )  # fmt: skip
  numbers = {
    'topology': topology,
    'devices': len(devices),
    'device_batch': device_batch,
    'parameters': sum(math.prod(x.shape) for x in jax.tree.leaves(state['params'])),
    'state_bytes': sharding.bytes_per_device(state, shardings),
    'frozen_bytes': sharding.bytes_per_device(frozen, jax.tree.map(lambda x: x.sharding, frozen)),
    'analytic_flops': per_example * config.batch_size / len(devices),
  }
  say(f'{topology}: {len(devices)} devices, {device_batch} examples at a time each; compiling')
  return TrainingPlan(**numbers, compiled=compiled_for(topology, lowered, is_quick))


def training_report(plan: TrainingPlan, config: TrainConfig) -> str:
  """A table of one plan, with advice."""
  chip, compiled = chip_of(plan.topology), plan.compiled
  rows = [
    ('devices', f'{plan.devices} of {gib(chip.memory)}'),
    (
      'examples',
      f'{config.batch_size} a step, {plan.device_batch} at a time on a device'
      f' (accumulation {config.accumulation})',
    ),
    ('parameters learnt', f'{plan.parameters:,}'),
    ('state on a device', gib(plan.state_bytes)),
    ('frozen on a device', gib(plan.frozen_bytes)),
  ]
  if compiled.needed_bytes:
    is_gpu = gpus.is_gpu(plan.topology)
    rounds = config.accumulation  # nearly all of a step is in that loop
    moved = compiled.bytes_accessed * (1 if is_gpu else rounds)
    at_best = best_time(plan.topology, plan.analytic_flops, moved)
    counted = '' if is_gpu else f'{rounds * compiled.flops / 1e12:.2f} T compiled, '
    rows += [
      *memory_rows(plan.topology, compiled),
      ('reused for the new state', gib(compiled.alias_bytes)),
      ('FLOPs', f'{counted}{plan.analytic_flops / 1e12:.2f} T asked for'),
      ('bytes moved', f'{moved / 1e9:.1f} GB' if moved else UNKNOWN),
      ('time at best', f'{1e3 * at_best:.0f} ms, by FLOPs{" or bytes" * bool(moved)}'),
      *program_rows(plan.topology, compiled),
    ]
  return table(plan.topology, compiled, rows, advice(plan, config))


def advice(plan: TrainingPlan, config: TrainConfig) -> list[str]:
  """Changes to try, most effective first; none if it fits with room."""
  compiled, memory = plan.compiled, chip_of(plan.topology).memory
  if compiled.fits:
    most = gpus.LARGEST_SHARE if gpus.is_gpu(plan.topology) else 1.0
    is_tight = compiled.needed_bytes > 0.95 * most * memory
    return ['Tight: accumulate more if it fails.'] if is_tight else []
  lines = []
  if plan.device_batch > 1:
    lines.append(f'Try --config.accumulation={2 * config.accumulation}: half as many at a time.')
  if plan.state_bytes > 0.5 * memory and plan.devices > config.mesh.fsdp:
    ways = min(plan.devices, max(4, 2 * config.mesh.fsdp))
    lines.append(f'Try --config.mesh.fsdp={ways}: weights split over {ways} devices.')
  if config.remat != 'full':
    lines.append('Try --config.remat=full: more is computed twice.')
  return lines or ['It will not fit on these devices; use larger ones, or more.']
