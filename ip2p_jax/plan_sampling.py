"""What an edit, or the drawing of pairs, costs on one TPU or GPU, told by its compiler alone.

Both run on every device by itself, so one device's program is all there is to compile. As in
`plan`, nothing is timed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ip2p_jax import (
  attention,
  edit_program,
  flops,
  gpus,
  pair_program,
  plan,
  plan_compiler,
  plan_devices,
  sharding,
)
from ip2p_jax.diffusion import guidance, samplers
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.layers import abstract
from ip2p_jax.networks import Networks
from ip2p_jax.prompt_to_prompt import Control
from ip2p_jax.similarity import Towers

BOTH = (guidance.TEXT_AND_IMAGE, guidance.IMAGE, guidance.UNCONDITIONAL)


class Work(NamedTuple):
  """What one call of a program does.

  Attributes:
    made: 'edits' or 'pairs'.
    size: of the pictures, pixels.
    batch: how many edits, or pairs, in one call.
  """

  made: str
  size: int
  batch: int
  steps: int


class Plan(NamedTuple):
  """Of one call on one device; weights are in bfloat16."""

  topology: str
  work: Work
  weight_bytes: int
  analytic_flops: float
  compiled: plan_compiler.Compiled


def plan_sampling(
  networks: Networks,
  work: Work,
  topology: str,
  say: Callable[[str], None] = lambda text: None,
  is_quick: bool = False,
) -> Plan:
  """Compiles one call for one device of a topology; takes minutes at full size.

  `networks` are those of an editor, or for pairs of a text-to-image model.
  """
  device = plan_devices.describe(topology)[0]
  mesh = sharding.make_mesh(devices=[device])
  program_of = {'edits': _edit, 'pairs': _pairs}[work.made]
  on_device = networks._replace(attention=attention.dispatch(mesh=mesh))
  program, params, inputs = program_of(on_device, work)
  where = sharding.replicated(mesh)
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (params, inputs)
  )
  say(f'{topology}: {work.batch} {work.made} of {work.size} px at a time; compiling')
  with gpus.lowering_for(device):
    lowered = jax.jit(program).lower(*placed)
  compiled = plan_compiler.compiled_for(topology, lowered, is_quick)
  # Kernels hide their products, so those of the same program without any are counted.
  plain, *_ = program_of(networks._replace(attention=attention.attend), work)
  weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  return Plan(topology, work, weights, float(flops.count(plain, params, inputs)), compiled)


def _edit(networks: Networks, work: Work):
  settings = edit_program.Plan('euler_ancestral', BOTH, False)
  B, length = work.batch, networks.text_config.max_position_embeddings
  request = edit_program.Request(
    images=_array(jnp.uint8, B, work.size, work.size, 3),
    token_ids=_array(jnp.int32, B, length),
    negative_ids=_array(jnp.int32, 1, length),
    text_guidance=_array(jnp.float32, B),
    image_guidance=_array(jnp.float32, B),
    seeds=_array(jnp.uint32, B),
    indices=_array(jnp.uint32, B),
    grid=_grid(networks, work.steps),
    guided_sigmas=_array(jnp.float32, 2),
    rescale=None, mask=None, init_noise=None, step_noise=None,
  )  # fmt: skip

  def program(params, request):
    return edit_program.edit_program(networks, settings, params, request)

  return program, _bfloat16(networks.shapes), request


def _pairs(networks: Networks, work: Work):
  """As the paper's: shared self-attention, and CLIP ViT-L/14 to score."""
  side = work.size // networks.vae_config.factor
  settings = pair_program.Plan('euler_ancestral', side, side)
  P, length = work.batch, networks.text_config.max_position_embeddings
  text, vision = TextConfig(), VisionConfig()
  text_def, text_shapes = abstract(lambda keys: TextEncoder(text, has_projection=True, rngs=keys))
  vision_def, vision_shapes = abstract(lambda keys: VisionEncoder(vision, rngs=keys))
  towers = Towers(text_def, vision_def, vision.image_size)
  params = networks.shapes | {'clip': {'text': text_shapes, 'vision': vision_shapes}}
  request = pair_program.Request(
    token_ids=_array(jnp.int32, 2, P, length),
    negative_ids=_array(jnp.int32, 1, length),
    guidance=_array(jnp.float32, P),
    seeds=_array(jnp.uint32, P),
    grid=_grid(networks, work.steps),
    control=Control(share_until=_array(jnp.int32, P)),
  )

  def program(params, inputs):
    request, clip_ids = inputs
    pairs, scores = pair_program.scored_pairs(networks, towers, settings, params, request, clip_ids)
    return jnp.round(pairs.images * 255).astype(jnp.uint8), scores

  return program, _bfloat16(params), (request, _array(jnp.int32, 2, P, length))


def report(found: Plan) -> str:
  """A table of one plan, and what to do."""
  chip, compiled, work = plan_devices.chip_of(found.topology), found.compiled, found.work
  rows = [
    ('device', f'one of {plan_devices.gib(chip.memory)}'),
    (f'{work.made} in a call', f'{work.batch} of {work.size} px, {work.steps} steps'),
    ('weights', plan_devices.gib(found.weight_bytes)),
  ]
  if compiled.needed_bytes:
    at_best = found.analytic_flops / plan_devices.peak_of(found.topology)
    seconds = plan.scheduled(compiled, chip)
    hourly = 3600 * work.batch / max(seconds, at_best)
    rows += [
      *plan.memory_rows(found.topology, compiled),
      ('FLOPs', f'{found.analytic_flops / 1e12:.1f} T asked for'),
      ('time at best', f'{at_best:.2f} s, by FLOPs'),
      *plan.program_rows(found.topology, compiled),
      (f'{work.made} an hour', f'{hourly:,.0f} {"as scheduled" if seconds else "at best"}'),
    ]
  told = ['Try fewer at a time with --batch-size.'] if not compiled.fits and work.batch > 1 else []
  return plan.table(found.topology, compiled, rows, told)


def _array(dtype, *shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _grid(networks: Networks, steps: int):
  grid = samplers.noise_levels(networks.schedule, 'euler_ancestral', steps)
  return jax.tree.map(lambda x: _array(jnp.float32, *np.shape(x)), grid)


def _bfloat16(shapes):
  return jax.tree.map(lambda x: _array(jnp.bfloat16, *x.shape), shapes)
