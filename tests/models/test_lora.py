"""Adapters: merging, gradients, and files that PyTorch reads."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import safetensors.numpy
import tiny_models
import torch_models as reference
from flax import nnx
from torch_models import nchw, nhwc, relative_error

from ip2p_jax import weights
from ip2p_jax.config import LoraConfig
from ip2p_jax.errors import InputError
from ip2p_jax.models import lora
from ip2p_jax.models.configs import UNetConfig
from ip2p_jax.models.unet import UNet
from ip2p_jax.parameters import flatten, unflatten
from ip2p_jax.pipeline.networks import networks_of, params_of
from ip2p_jax.weights import lora_file

torch = peers.module('torch')
convert_state_dict_to_diffusers = peers.module('diffusers.utils').convert_state_dict_to_diffusers
PeftConfig = peers.module('peft').LoraConfig
get_peft_model_state_dict = peers.module('peft.utils').get_peft_model_state_dict

EVERY_KERNEL = LoraConfig(rank=3, alpha=5.0, targets='')
ATTENTIONS = LoraConfig(rank=4, alpha=2.0)
SHAPES = {
  'to_q.kernel': jax.ShapeDtypeStruct((6, 8), np.float32),
  'conv.kernel': jax.ShapeDtypeStruct((3, 3, 6, 8), np.float32),
  'conv.bias': jax.ShapeDtypeStruct((8,), np.float32),
}


@pytest.fixture(scope='module')
def params():
  """Weights of a small UNet, by name."""
  checkpoint = tiny_models.checkpoint()
  return flatten(params_of(checkpoint, networks_of(checkpoint), 'float32')['unet'])


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """A pipeline of diffusers, our UNet with its weights, and those weights by name."""
  pipeline = reference.pipeline(folder=tmp_path_factory.mktemp('tokenizer'))
  config = UNetConfig.from_json(dict(pipeline.unet.config))
  unet_def, params = reference.convert(pipeline.unet, lambda keys: UNet(config, rngs=keys), 'unet')
  run = jax.jit(lambda params, *inputs: nnx.merge(unet_def, unflatten(params))(*inputs))
  return pipeline, run, flatten(params)


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(1)
  latents = rng.standard_normal((2, 8, 8, 8), np.float32)
  return latents, np.float32(301), rng.standard_normal((2, 7, 24), np.float32)


def filled(shapes, config, rng):
  """Adapters of a trained model: no half is zero."""
  new = lora.adapters(shapes, config, rng)
  return {name: rng.normal(0, 0.2, array.shape).astype(np.float32) for name, array in new.items()}


def torch_output(pipeline, latents, timestep, context):
  with torch.no_grad():
    return nhwc(pipeline.unet(nchw(latents), float(timestep), torch.from_numpy(context)).sample)


@pytest.fixture
def warned(caplog):
  """The warnings of diffusers and peft while a test runs."""
  loggers = [logging.getLogger(name) for name in ('diffusers', 'peft')]
  for logger in loggers:
    logger.addHandler(caplog.handler)
  yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  for logger in loggers:
    logger.removeHandler(caplog.handler)


def test_by_default_the_attentions_projections_get_adapters(params):
  adapters = lora.adapters(params, LoraConfig(rank=4), np.random.default_rng(0))
  kernels = {name.rsplit('.', 1)[0] for name in adapters}
  assert len(adapters) == 2 * len(kernels) == 2 * 8 * 4  # 4 transformer blocks of 2 attentions
  assert {name.rsplit('.', 1)[1] for name in kernels} == {'to_q', 'to_k', 'to_v', 'to_out'}


def test_an_adapters_shapes_follow_its_kernels(rng):
  adapters = lora.adapters(SHAPES, EVERY_KERNEL, rng)
  assert {name: array.shape for name, array in adapters.items()} == {
    'conv.lora_down': (3, 3, 6, 3),
    'conv.lora_up': (1, 1, 3, 8),
    'to_q.lora_down': (6, 3),
    'to_q.lora_up': (3, 8),
  }
  assert all(array.dtype == np.float32 for array in adapters.values())


def test_adapters_start_like_pefts(rng):
  shapes = {
    'to_q.kernel': jax.ShapeDtypeStruct((50, 8), np.float32),
    'conv.kernel': jax.ShapeDtypeStruct((3, 3, 20, 8), np.float32),
  }
  adapters = lora.adapters(shapes, LoraConfig(rank=64, targets=''), rng)
  for name, torch_shape in (('to_q', (64, 50)), ('conv', (64, 20, 3, 3))):
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(torch_shape), a=5**0.5).numpy()
    ours = adapters[f'{name}.lora_down']
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.01)
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.05)
    assert not adapters[f'{name}.lora_up'].any()


def test_the_same_seed_gives_the_same_adapters_in_any_order():
  once = lora.adapters(SHAPES, EVERY_KERNEL, np.random.default_rng(3))
  again = lora.adapters(dict(reversed(SHAPES.items())), EVERY_KERNEL, np.random.default_rng(3))
  for name in once:
    np.testing.assert_array_equal(once[name], again[name])


def test_new_adapters_leave_every_weight_as_it_was(params, rng):
  after = lora.merged(params, lora.adapters(params, EVERY_KERNEL, rng), EVERY_KERNEL)
  assert after.keys() == params.keys()
  for name in params:
    np.testing.assert_array_equal(after[name], params[name])


def linear(x, kernel):
  return x @ kernel


def convolution(strides):
  def apply(x, kernel):
    padding = [((side - 1) // 2,) * 2 for side in kernel.shape[:2]]
    step = strides if kernel.shape[0] > 1 else (1, 1)
    return jax.lax.conv_general_dilated(
      x, kernel, step, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  return apply


@pytest.mark.parametrize('name, layer, shape', [
  ('to_q', linear, (5, 6)),
  ('conv', convolution((1, 1)), (2, 7, 7, 6)),
  ('conv', convolution((2, 2)), (2, 7, 7, 6)),
])  # fmt: skip
def test_merging_and_its_gradients_equal_a_second_branch(name, layer, shape, rng):
  shapes = {f'{name}.kernel': SHAPES[f'{name}.kernel']}
  kernel = rng.normal(size=shapes[f'{name}.kernel'].shape).astype(np.float32)
  adapters = filled(shapes, EVERY_KERNEL, rng)
  x = rng.normal(size=shape).astype(np.float32)
  target = jnp.cos(jnp.arange(8, dtype=jnp.float32))

  def merged(adapters):
    kernels = lora.merged({f'{name}.kernel': kernel}, adapters, EVERY_KERNEL)
    return layer(x, kernels[f'{name}.kernel'])

  def two_branches(adapters):
    narrow = layer(x, adapters[f'{name}.lora_down'])
    return layer(x, kernel) + 5 / 3 * layer(narrow, adapters[f'{name}.lora_up'])

  def loss(outputs):
    return lambda adapters: (outputs(adapters) ** 2 @ target).sum()

  ours, theirs = (
    jax.jit(jax.value_and_grad(loss(outputs)))(adapters) for outputs in (merged, two_branches)
  )
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
  for part in adapters:
    assert relative_error(ours[1][part], np.asarray(theirs[1][part], np.float64)) <= 2e-6


def test_merging_computes_in_float32_and_keeps_the_type(rng):
  kernel = rng.normal(size=(6, 8)).astype(jnp.bfloat16)
  adapters = filled({'to_q.kernel': kernel}, EVERY_KERNEL, rng)
  small = {name: array.astype(jnp.bfloat16) for name, array in adapters.items()}
  product = small['to_q.lora_down'].astype(np.float64) @ small['to_q.lora_up'].astype(np.float64)
  wanted = (kernel.astype(np.float64) + 5 / 3 * product).astype(jnp.bfloat16)
  result = lora.merged({'to_q.kernel': jnp.asarray(kernel)}, small, EVERY_KERNEL)['to_q.kernel']
  assert result.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(result), wanted)


@pytest.mark.parametrize('config', [EVERY_KERNEL, ATTENTIONS], ids=['every kernel', 'attentions'])
def test_diffusers_with_our_file_equals_our_merged_unet(
  models, inputs, config, tmp_path, rng, warned
):
  pipeline, run, params = models
  adapters = filled(params, config, rng)
  lora_file.write(adapters, config, tmp_path)
  without = torch_output(pipeline, *inputs)
  pipeline.load_lora_weights(tmp_path)
  try:
    theirs = torch_output(pipeline, *inputs)
  finally:
    pipeline.unload_lora_weights()
  ours = run(lora.merged(params, adapters, config), *inputs)
  assert relative_error(ours, theirs) <= 1e-5
  assert relative_error(without, theirs) > 0.1
  # The file has no adapters for the text encoder; diffusers says that this is safe to ignore.
  assert all('No LoRA keys associated to CLIPTextModel' in message for message in warned())


@pytest.mark.parametrize(
  ('config', 'name', 'dtype', 'tolerances'),
  [
    (EVERY_KERNEL, 'some/mine.safetensors', 'float32', {'rtol': 3e-7}),
    (ATTENTIONS, 'some/mine.safetensors', 'float32', {'rtol': 3e-7}),
    (ATTENTIONS, '', 'float16', {'rtol': 1e-3, 'atol': 1e-6}),
  ],
  ids=['every kernel', 'attentions', 'half precision'],
)
def test_a_written_file_is_read_as_float32(params, config, name, dtype, tolerances, tmp_path, rng):
  adapters = filled(params, config, rng)
  file = lora_file.write(adapters, config, tmp_path / name, dtype)
  result, result_config = lora_file.read(file, params)
  assert result_config == config
  assert result.keys() == adapters.keys()
  for name in adapters:
    assert result[name].dtype == np.float32
    np.testing.assert_allclose(result[name], adapters[name], **tolerances)


@pytest.mark.parametrize('style', ['peft', 'diffusers'])
def test_files_that_diffusers_writes_are_read(models, inputs, style, tmp_path):
  pipeline, run, params = models
  config = PeftConfig(r=4, lora_alpha=6, target_modules=['to_q', 'to_out.0', 'conv1', 'proj'])
  pipeline.unet.add_adapter(config, 'theirs')
  try:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
      if 'lora' in name:
        parameter.data.normal_(0, 0.2, generator=generator)
    layers = get_peft_model_state_dict(pipeline.unet, adapter_name='theirs')
    if style == 'diffusers':
      layers = convert_state_dict_to_diffusers(layers)
    note = {'r': 4, 'lora_alpha': 6, 'target_modules': ['to_q'], 'alpha_pattern': {}}
    pipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=note)
    theirs = torch_output(pipeline, *inputs)
  finally:
    pipeline.unload_lora_weights()
  adapters, settings = lora_file.read(tmp_path, params)
  assert (settings.rank, settings.alpha) == (4, 6)
  assert relative_error(run(lora.merged(params, adapters, settings), *inputs), theirs) <= 1e-5
  assert lora.adapters(params, settings, np.random.default_rng(0)).keys() == adapters.keys()


def test_without_a_note_alpha_is_the_rank(params, tmp_path, rng):
  adapters = filled(params, ATTENTIONS, rng)
  tensors = lora_file.to_diffusers(adapters, LoraConfig(rank=4, alpha=4.0))
  weights.write_safetensors(tmp_path / lora_file.FILE_NAME, tensors)
  result, config = lora_file.read(tmp_path, params)
  assert (config.rank, config.alpha) == (4, 4)
  np.testing.assert_array_equal(
    result['mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_up'],
    adapters['mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_up'],
  )


@pytest.mark.parametrize('config, message', [
  (LoraConfig(rank=4, targets='atn'), "lora.targets: 'atn' matches no kernel"),
  (LoraConfig(rank=4, targets='bias'), "lora.targets: 'bias' matches no kernel"),
  (LoraConfig(rank=4, targets='('), r"lora.targets: '\(' is not a regular expression"),
  (LoraConfig(rank=0), 'lora.rank is 0'),
  (LoraConfig(rank=4, alpha=0.0), 'lora.alpha is 0.0'),
])  # fmt: skip
def test_a_wrong_setting_is_named(config, message, rng):
  with pytest.raises(InputError, match=message):
    lora.adapters(SHAPES, config, rng)


def test_adapters_of_another_unet_are_refused(rng):
  adapters = filled(SHAPES, EVERY_KERNEL, rng)
  fixed = {name: np.zeros(leaf.shape, np.float32) for name, leaf in SHAPES.items()}
  with pytest.raises(InputError, match=r'no to_q\.kernel of the shape'):
    lora.merged(fixed | {'to_q.kernel': np.zeros((6, 9), np.float32)}, adapters, EVERY_KERNEL)
  with pytest.raises(InputError, match=r'no conv\.kernel of the shape'):
    lora.merged({'to_q.kernel': fixed['to_q.kernel']}, adapters, EVERY_KERNEL)


def test_an_older_file_is_not_replaced_unasked(tmp_path, rng):
  adapters = filled(SHAPES, EVERY_KERNEL, rng)
  lora_file.write(adapters, EVERY_KERNEL, tmp_path)
  with pytest.raises(InputError, match='already exists'):
    lora_file.write(adapters, EVERY_KERNEL, tmp_path)
  lora_file.write(adapters, EVERY_KERNEL, tmp_path, overwrite=True)


def wrong_file(change):
  """Tensors and metadata of a file for `SHAPES`, with one mistake."""
  tensors = lora_file.to_diffusers(
    filled(SHAPES, EVERY_KERNEL, np.random.default_rng(0)), EVERY_KERNEL
  )
  up, metadata = 'unet.to_q.lora_B.weight', {}
  if change == 'kohya':
    tensors['lora_unet_to_q.lora_down.weight'] = tensors.pop('unet.to_q.lora_A.weight')
  elif change == 'text':
    tensors['text_encoder.to_q.lora_A.weight'] = tensors[up]
  elif change == 'half':
    del tensors[up]
  elif change == 'layer':
    tensors['unet.to_x.lora_B.weight'] = tensors.pop(up)
  elif change == 'shape':
    tensors[up] = tensors[up][:-1]
  elif change == 'rank':
    tensors['unet.to_q.lora_A.weight'] = tensors['unet.to_q.lora_A.weight'][:2]
  elif change == 'nan':
    tensors[up] = np.full_like(tensors[up], np.nan)
  elif change == 'dora':
    metadata = {'lora_adapter_metadata': json.dumps({'unet.use_dora': True})}
  elif change == 'note':
    metadata = {'lora_adapter_metadata': '{'}
  return tensors, metadata


@pytest.mark.parametrize('change, message', [
  ('kohya', "lora_unet_to_q.lora_down.weight is not a UNet's adapter in diffusers' format"),
  ('text', "text_encoder.to_q.lora_A.weight is not a UNet's adapter"),
  ('half', 'lora_up: unet lacks 1 tensor: to_q.weight'),
  ('layer', 'adapts layers that the UNet does not have, such as to_x.weight'),
  ('shape', r'lora_up: .*to_q.weight is \(7, 3\) and should be \(8, 3\)'),
  ('rank', r'adapters of ranks \[2, 3\]'),
  ('nan', 'to_q.weight holds NaN'),
  ('dora', 'made with use_dora'),
  ('note', 'metadata is not valid JSON'),
])  # fmt: skip
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
  tensors, metadata = wrong_file(change)
  safetensors.numpy.save_file(tensors, tmp_path / lora_file.FILE_NAME, metadata)
  with pytest.raises(InputError, match=f'{lora_file.FILE_NAME}: .*{message}'):
    lora_file.read(tmp_path, SHAPES)


def test_a_folder_without_adapters_is_named(tmp_path):
  with pytest.raises(InputError, match=r'pytorch_lora_weights\.safetensors: no such file'):
    lora_file.read(tmp_path, SHAPES)
