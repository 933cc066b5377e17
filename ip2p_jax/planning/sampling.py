"""The cost of edits, or of drawing pairs, on a host's TPUs or GPUs, by their compiler alone.

The compiled program is the one that `Editor` or `ip2p pairs` runs on all devices of one host. As in
`planning.training`, nothing is timed.
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
  """The work of one call of a program.

  Attributes:
    made: 'edits' or 'pairs'.
    size: of the images, pixels.
    batch: the number of edits or pairs in one call, on all devices together.
  """

  made: str
  size: int
  batch: int
  steps: int


class SamplingPlan(NamedTuple):
  """The plan of one call; bytes and FLOPs are of one device. Weights are in bfloat16."""

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
    specs: how devices share each input.
  """

  program: Callable
  settings: EditSpec | PairSpec
  inputs: tuple
  specs: tuple


def host_mesh(topology: str) -> Mesh:
  """The devices of one host of a topology; one process of edits or pairs runs on all of them."""
  devices = describe(topology)
  return sharding.make_mesh(
    devices=[device for device in devices if device.process_index == devices[0].process_index]
  )


def work_on(topology: str, made: str, size: int, batch: int | None, steps: int) -> Work:
  """Work for a topology; `batch` None is 8 per device. InputError if devices cannot share it."""
  devices = host_mesh(topology).size
  batch = 8 * devices if batch is None else batch
  if batch % devices:
    raise InputError(
      f'--batch-size is {batch}; use a multiple of the {devices} devices of a {topology} host.'
    )
  return Work(made, size, batch, steps)


def lower_call(networks: Networks, work: Work, mesh: Mesh) -> tuple[jax.stages.Lowered, Call]:
  """The program that the devices of a mesh would run, and its call."""
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
  # Kernels hide their products, so FLOPs are counted in a program of one device without kernels.
  single = sharding.make_mesh(devices=jax.devices()[:1])
  plain = _CALLS[work.made](
    networks._replace(attention=attention.attend), work._replace(batch=share), single
  )
  operations = flops.count(lambda *inputs: plain.program(plain.settings, *inputs), *plain.inputs)
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(call.inputs[0]))
  return SamplingPlan(topology, mesh.size, work, weights, float(operations), compiled)


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
  jitted = program.compiled(KIND, networks, mesh).whole
  return Call(jitted, settings, inputs, (sharding.WHOLE, program.SPLIT))


def _pairs(networks: Networks, work: Work, mesh: Mesh) -> Call:
  """Pairs like the paper's: shared self-attention, and CLIP ViT-L/14 for scores."""
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


def sampling_report(plan: SamplingPlan) -> str:
  """A table of one plan, with advice."""
  chip, compiled, work = chip_of(plan.topology), plan.compiled, plan.work
  rows = [
    ('devices', f'{plan.devices} of {gib(chip.memory)}, of one host'),
    (
      f'{work.made} in a call',
      f'{work.batch} of {work.size} px, {work.batch // plan.devices} on a device,'
      f' {work.steps} steps',
    ),
    ('weights on a device', gib(plan.weight_bytes)),
  ]
  if compiled.needed_bytes:
    is_gpu = gpus.is_gpu(plan.topology)  # a TPU's compiler counts the bytes of a loop only once
    moved = compiled.bytes_accessed if is_gpu else 0.0
    at_best = best_time(plan.topology, plan.analytic_flops, moved)
    seconds = scheduled(compiled, chip)
    hourly = 3600 * work.batch / max(seconds, at_best)
    rows += [
      *memory_rows(plan.topology, compiled),
      ('FLOPs', f'{plan.analytic_flops / 1e12:.1f} T asked for'),
      *([('bytes moved', f'{moved / 1e9:,.1f} GB')] if is_gpu else []),
      ('time at best', f'{at_best:.2f} s, by FLOPs{" or bytes" * is_gpu}'),
      *program_rows(plan.topology, compiled),
      (f'{work.made} an hour', f'{hourly:,.0f} {"as scheduled" if seconds else "at best"}'),
    ]
  is_more = work.batch > plan.devices
  advice = ['Try fewer at a time with --batch-size.'] if not compiled.fits and is_more else []
  return table(plan.topology, compiled, rows, advice)


def _array(dtype, *shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _grid(networks: Networks, steps: int):
  grid = samplers.noise_levels(networks.schedule, 'euler_ancestral', steps)
  return jax.tree.map(lambda x: _array(jnp.float32, *np.shape(x)), grid)


def _bfloat16(shapes):
  return jax.tree.map(lambda x: _array(jnp.bfloat16, *x.shape), shapes)
