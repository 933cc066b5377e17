"""What edits, or the drawing of pairs, cost on a host's TPUs or GPUs, told by their compiler alone.

Compiled is the very program that `Editor` or `ip2p pairs` runs on all devices of one host. As in
`plan`, nothing is timed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ip2p_jax import sharding
from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.editing.program import KIND, EditSpec
from ip2p_jax.errors import InputError
from ip2p_jax.models import attention
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.layers import abstract
from ip2p_jax.pairs import generate
from ip2p_jax.pairs.program import PairRequest, PairSpec
from ip2p_jax.pairs.prompt_to_prompt import Control
from ip2p_jax.pipeline import program
from ip2p_jax.pipeline.clip_scores import Towers
from ip2p_jax.pipeline.networks import Networks
from ip2p_jax.planning import compiler, gpus
from ip2p_jax.planning.devices import chip_of, describe, gib
from ip2p_jax.planning.table import best_time, memory_rows, program_rows, scheduled, table
from ip2p_jax.training import flops

BOTH = (guidance.TEXT_AND_IMAGE, guidance.IMAGE, guidance.UNCONDITIONAL)


class Work(NamedTuple):
  """What one call of a program does.

  Attributes:
    made: 'edits' or 'pairs'.
    size: of the pictures, pixels.
    batch: how many edits, or pairs, in one call, on all devices together.
  """

  made: str
  size: int
  batch: int
  steps: int


class SamplingPlan(NamedTuple):
  """Of one call; bytes and FLOPs are of one device. Weights are in bfloat16."""

  topology: str
  devices: int
  work: Work
  weight_bytes: int
  analytic_flops: float
  compiled: compiler.Compiled


class Call(NamedTuple):
  """One call of a program on shapes alone.

  Attributes:
    program: jitted; takes a static plan, and the inputs.
    inputs: parameters first.
    specs: of how devices share each input.
  """

  program: Callable
  settings: EditSpec | PairSpec
  inputs: tuple
  specs: tuple


def host_mesh(topology: str) -> Mesh:
  """The devices of one host of a topology, all that one process of edits or pairs runs on."""
  devices = describe(topology)
  return sharding.make_mesh(
    devices=[device for device in devices if device.process_index == devices[0].process_index]
  )


def work_on(topology: str, made: str, size: int, batch: int | None, steps: int) -> Work:
  """`batch` None is 8 on each device; InputError for one that a host's devices cannot share."""
  devices = host_mesh(topology).size
  batch = 8 * devices if batch is None else batch
  if batch % devices:
    raise InputError(
      f'--batch-size is {batch}; use a multiple of the {devices} devices that a host of {topology}'
      ' has.'
    )
  return Work(made, size, batch, steps)


def lower_call(networks: Networks, work: Work, mesh: Mesh) -> tuple[jax.stages.Lowered, Call]:
  """The program that the devices of a mesh would run, with all that it depends on."""
  networks = networks._replace(attention=attention.dispatch(mesh=mesh))
  call = _CALLS[work.made](networks, work, mesh)
  placed = sharding.placed(mesh, call.specs, call.inputs)
  with gpus.lowering_for(mesh.devices.flat[0]):
    return call.program.lower(call.settings, *placed), call


def plan_sampling(
  networks: Networks,
  work: Work,
  topology: str,
  say: Callable[[str], None] = lambda text: None,
  is_quick: bool = False,
) -> SamplingPlan:
  """Compiles one call for one host of a topology; takes minutes at full size.

  `networks` are those of an editor, or for pairs of a text-to-image model.
  """
  mesh = host_mesh(topology)
  lowered, call = lower_call(networks, work, mesh)
  share = work.batch // mesh.size
  say(f'{topology}: {mesh.size} devices, {share} {work.made} of {work.size} px each; compiling')
  compiled = compiler.compiled_for(topology, lowered, is_quick)
  # Kernels hide their products, so those of one device's program without any are counted.
  alone = sharding.make_mesh(devices=jax.devices()[:1])
  plain = _CALLS[work.made](
    networks._replace(attention=attention.attend), work._replace(batch=share), alone
  )
  counted = flops.count(lambda *inputs: plain.program(plain.settings, *inputs), *plain.inputs)
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(call.inputs[0]))
  return SamplingPlan(topology, mesh.size, work, weights, float(counted), compiled)


def _edits(networks: Networks, work: Work, mesh: Mesh) -> Call:
  settings = EditSpec('euler_ancestral', BOTH, False)
  B, length = work.batch, networks.text_config.max_position_embeddings
  request = program.Request(
    images=_array(jnp.uint8, B, work.size, work.size, 3),
    token_ids=_array(jnp.int32, B, length),
    negative_ids=_array(jnp.int32, 1, length),
    text_guidance=_array(jnp.float32, B),
    image_guidance=_array(jnp.float32, B),
    seeds=_array(jnp.uint32, B),
    indices=_array(jnp.uint32, B),
    grid=_grid(networks, work.steps),
    guided_sigmas=_array(jnp.float32, 2),
  )
  inputs = _bfloat16(networks.shapes), request
  whole = program.compiled(KIND, networks, mesh).whole
  return Call(whole, settings, inputs, (sharding.WHOLE, program.SPLIT))


def _pairs(networks: Networks, work: Work, mesh: Mesh) -> Call:
  """As the paper's: shared self-attention, and CLIP ViT-L/14 to score."""
  side = work.size // networks.vae_config.factor
  settings = PairSpec('euler_ancestral', side, side)
  P, length = work.batch, networks.text_config.max_position_embeddings
  text, vision = TextConfig(), VisionConfig()
  text_def, text_shapes = abstract(lambda keys: TextEncoder(text, has_projection=True, rngs=keys))
  vision_def, vision_shapes = abstract(lambda keys: VisionEncoder(vision, rngs=keys))
  towers = Towers(text_def, vision_def, vision.image_size)
  params = networks.shapes | {'clip': {'text': text_shapes, 'vision': vision_shapes}}
  request = PairRequest(
    token_ids=_array(jnp.int32, 2, P, length),
    negative_ids=_array(jnp.int32, 1, length),
    guidance=_array(jnp.float32, P),
    seeds=_array(jnp.uint32, P),
    grid=_grid(networks, work.steps),
    control=Control(share_until=_array(jnp.int32, P)),
  )
  inputs = _bfloat16(params), request, _array(jnp.int32, 2, P, length), None
  return Call(generate.program(networks, towers, mesh), settings, inputs, generate.SPECS)


_CALLS = {'edits': _edits, 'pairs': _pairs}


def sampling_report(found: SamplingPlan) -> str:
  """A table of one plan, and what to do."""
  chip, compiled, work = chip_of(found.topology), found.compiled, found.work
  rows = [
    ('devices', f'{found.devices} of {gib(chip.memory)}, of one host'),
    (
      f'{work.made} in a call',
      f'{work.batch} of {work.size} px, {work.batch // found.devices} on a device,'
      f' {work.steps} steps',
    ),
    ('weights on a device', gib(found.weight_bytes)),
  ]
  if compiled.needed_bytes:
    is_gpu = gpus.is_gpu(found.topology)  # a TPU's compiler counts bytes of a loop but once
    moved = compiled.bytes_accessed if is_gpu else 0.0
    at_best = best_time(found.topology, found.analytic_flops, moved)
    seconds = scheduled(compiled, chip)
    hourly = 3600 * work.batch / max(seconds, at_best)
    rows += [
      *memory_rows(found.topology, compiled),
      ('FLOPs', f'{found.analytic_flops / 1e12:.1f} T asked for'),
      *([('bytes moved', f'{moved / 1e9:,.1f} GB')] if is_gpu else []),
      ('time at best', f'{at_best:.2f} s, by FLOPs{" or bytes" * is_gpu}'),
      *program_rows(found.topology, compiled),
      (f'{work.made} an hour', f'{hourly:,.0f} {"as scheduled" if seconds else "at best"}'),
    ]
  is_more = work.batch > found.devices
  told = ['Try fewer at a time with --batch-size.'] if not compiled.fits and is_more else []
  return table(found.topology, compiled, rows, told)


def _array(dtype, *shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _grid(networks: Networks, steps: int):
  grid = samplers.noise_levels(networks.schedule, 'euler_ancestral', steps)
  return jax.tree.map(lambda x: _array(jnp.float32, *np.shape(x)), grid)


def _bfloat16(shapes):
  return jax.tree.map(lambda x: _array(jnp.bfloat16, *x.shape), shapes)
