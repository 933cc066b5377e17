"""Properties that speed depends on, without a clock: arithmetic, memory, layout, compilations.

`planning/test_training.py` tests that the state is donated, and that products are in bfloat16.
"""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny_models
import tiny_pairs
import tiny_training as tiny
from PIL import Image
from tiny_models import TINY_TEXT, TINY_UNET

from ip2p_jax import Editor, sharding
from ip2p_jax.config import DataConfig, LogConfig, MeshConfig, OptimizerConfig, TrainConfig
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from ip2p_jax.models.layers import REMATS
from ip2p_jax.pipeline.networks import networks_of, networks_of_configs
from ip2p_jax.planning.training import lower_step
from ip2p_jax.training import flops, train
from ip2p_jax.training.loss import Draws, Inputs, example_losses

BATCH = 13  # divides no other side, so that it can be found in any shape
# Heads of the UNet, the text encoder, and the VAE.
HEADS = TINY_UNET['attention_head_dim'], TINY_TEXT['num_attention_heads'], 1


def lowered(resolution, width=32, remat='none', from_latents=True):
  """(networks, the training step of `BATCH` examples as lowered), bfloat16, one device."""
  networks = networks_of(tiny_models.checkpoint(tiny.ONE_LEVEL | {'block_out_channels': [width]}))
  config = TrainConfig(
    checkpoint='x', resolution=resolution, batch_size=BATCH, remat=remat, data=DataConfig(path='x')
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return networks, lower_step(config, networks, mesh, from_latents)[0]


def products(program):
  """Operations of all convolutions and matrix products of a compiled program; loops count once.

  Counted as `flops` does: with padding, without zeros between pixels. The compiler's count leaves
  out padding, and includes element-wise operations, which are a large part of a narrow step.
  """
  shapes = {
    match[1]: [int(side) for side in match[2].split(',') if side]
    for match in re.finditer(r'%([\w.\-]+) = \w+\[([\d,]*)\]', program)
  }
  total, count = 0, 0
  for match in re.finditer(
    r'%([\w.\-]+) = \S+ (dot|convolution)\(%([\w.\-]+), %([\w.\-]+)\)(.*)', program
  ):
    out, kind, lhs, rhs, options = match.groups()
    if kind == 'dot':
      axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', options)[1]
      terms = math.prod(shapes[lhs][int(axis)] for axis in axes.split(',') if axis)
    else:
      axes = re.search(r'dim_labels=\w+_(\w+)->', options)[1]
      terms = math.prod(shapes[rhs]) // shapes[rhs][axes.index('o')]
      if dilation := re.search(r'lhs_dilate=([\dx]+)', options):
        terms //= math.prod(map(int, dilation[1].split('x')))
    total, count = total + 2 * math.prod(shapes[out]) * terms, count + 1
  assert count > 50
  return total


@pytest.mark.long
@pytest.mark.parametrize('remat', ['none', 'convdot'])
def test_the_compiled_step_does_only_the_planned_arithmetic(remat):
  """With convdot, only the scores of attention are computed twice.

  This test counts recomputation by remat, as all of the program. `training_flops`, from which MFU
  is computed, does not. With `full` the count would be 1.2 times as much.
  """
  networks, step = lowered(64, width=64, remat=remat)
  asked = BATCH * flops.training_flops(networks, 64, latents=True)
  assert products(step.compile().as_text()) == pytest.approx(asked, rel=0.03)


@pytest.mark.long
def test_a_sample_keeps_at_most_150_megabytes_for_backward():
  """Stable Diffusion 1.5 at 256 px, bfloat16, default remat; the difference of two batch sizes."""
  assert TrainConfig().remat == 'convdot'
  residuals = [bytes_for_backward('convdot', batch) for batch in (2, 3)]
  assert 20e6 < residuals[1] - residuals[0] <= 150e6


def bytes_for_backward(remat, batch, side=32):
  """Bytes of all values that the gradient by the UNet's weights keeps, with the weights."""
  networks = networks_of_configs(UNetConfig(in_channels=8), VAEConfig(), TextConfig(), Schedule())
  array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *shape), dtype)
  of = lambda shape: jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16)
  latents = array(side, side, 4)
  inputs = Inputs(latents, latents, array(77, 768, dtype=jnp.bfloat16))
  draws = Draws(latents, latents, array(dtype=jnp.int32), array())

  def backward(params, inputs, draws):
    loss = lambda params: example_losses(
      networks, params, inputs, draws, remat=REMATS[remat]
    ).mean()
    return jax.vjp(loss, params)[1]

  residuals = jax.eval_shape(backward, jax.tree.map(of, networks.shapes['unet']), inputs, draws)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(residuals))


@pytest.mark.long
@pytest.mark.parametrize(
  ('resolution', 'from_latents'),
  [(32, True), (128, True), (32, False)],
  ids=['64 tokens', '1024 tokens', 'from images'],
)
def test_only_heads_of_attention_are_transposed(resolution, from_latents):
  """Where heads are made, a head's queries, keys, values and results are not contiguous.

  Kernels of attention accept this layout; XLA's matrix product transposes them.
  """
  _, step = lowered(resolution, from_latents=from_latents)
  moved = [
    [int(side) for side in shape.split('x')[:-1]]
    for shape in re.findall(r'stablehlo\.transpose.*: \(tensor<([^>]*)>\)', step.as_text())
  ]
  assert moved
  is_activation = lambda shape: any(side % BATCH == 0 for side in shape)
  # Images have 8 rows or more here, so that their shapes differ from those of heads.
  is_of_heads = lambda shape: len(shape) == 4 and (shape[1] in HEADS or shape[2] in HEADS)
  assert [shape for shape in moved if is_activation(shape) and not is_of_heads(shape)] == []


@contextlib.contextmanager
def compilations():
  """A list to which the name of every compiled program is added."""
  names = []

  def note(event, _seconds, **about):
    if event == '/jax/core/compile/backend_compile_duration':
      names.append(about.get('fun_name', ''))

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny editor, `checkpoint`, and a data set of ten pairs, `data`."""
  folder = tmp_path_factory.mktemp('static')
  tiny_models.write(folder / 'checkpoint', tiny.ONE_LEVEL)
  tiny_pairs.write_metadata(folder / 'data', 10)
  return folder


def test_every_compilation_is_noticed():
  def a_program(x):
    return x + 1

  with compilations() as compiled:
    jax.jit(a_program)(1.0)
  assert any('a_program' in name for name in compiled)


@pytest.mark.long
def test_fifty_steps_at_fifty_learning_rates_compile_one_program(folder, tmp_path, monkeypatch):
  """After the first step, neither a step nor reading its numbers compiles anything."""
  device = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *_: device)
  config = TrainConfig(
    checkpoint=str(folder / 'checkpoint'), resolution=32, batch_size=2, steps=50, dtype='float32',
    mesh=MeshConfig(), data=DataConfig(path=str(folder / 'data'), workers=0),
    optimizer=OptimizerConfig(warmup_steps=10, schedule='cosine'),
    log=LogConfig(every=10, checkpoint_every=50, validate_every=0, previews=0),
  )  # fmt: skip
  with compilations() as compiled:
    assert train.train(config, str(tmp_path)) == 0
  assert ['train_step' in name for name in compiled].count(True) == 1
  assert 'train_step' in compiled[-1]


def test_another_instruction_scale_or_seed_compiles_nothing(folder):
  editor = Editor.load(folder / 'checkpoint')
  image = Image.linear_gradient('L').resize((32, 32)).convert('RGB')
  options = {'steps': 2, 'text_guidance': 7.5, 'image_guidance': 1.5, 'seed': 0}
  with compilations() as compiled:
    editor.edit(image, 'make it winter', **options)
  assert compiled
  with compilations() as compiled:
    for changed in (
      {'text_guidance': 3.0},
      {'image_guidance': 2.0},
      {'seed': 2**32 - 1},
      {'negative': 'people'},
      {'steps': 2, 'indices': [7]},
    ):
      editor.edit(image, 'a longer instruction, with many more words', **options | changed)
  assert compiled == []
