"""Checkpoints read and written, byte for byte: diffusers folders, LDM files, our trees."""

import dataclasses
import json
import shutil

import numpy as np
import peers
import pytest
from safetensors.numpy import load_file, save_file

from ip2p_jax import weights
from ip2p_jax.errors import InputError
from ip2p_jax.models import clip, configs, layers, unet, vae
from ip2p_jax.weights import diffusers_folder, ldm_file, ldm_names
from ip2p_jax.weights.tensors import COMPONENTS, Tensors

torch = peers.module('torch')
transformers = peers.module('transformers')
diffusers = peers.module('diffusers')
single_file_utils = peers.module('diffusers.loaders.single_file_utils')

VOCABULARY = 520
TEXT = {
  'vocab_size': VOCABULARY,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 77,
  'bos_token_id': 518,
  'eos_token_id': 519,
  'pad_token_id': 519,
}
CONV_IN = 'conv_in.weight'


def randomized(module):
  """Random tensors, all different, norms too, so that swapped names are found."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for tensor in module.parameters():
      tensor.copy_(torch.randn(tensor.shape, generator=generator))
  return module


def small_tokenizer():
  files = weights.clip_tokenizer()
  merges = files['merges.txt'].decode().splitlines()[1:7]
  tokens = list(json.loads(files['vocab.json']))[:512]
  tokens += [merge.replace(' ', '') for merge in merges] + ['<|startoftext|>', '<|endoftext|>']
  vocabulary = {token: i for i, token in enumerate(tokens)}
  pairs = [tuple(merge.split()) for merge in merges]
  return transformers.CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


def torch_modules(in_channels=8, linear=False):
  small_unet = diffusers.UNet2DConditionModel(
    sample_size=8,
    in_channels=in_channels,
    block_out_channels=(32, 32, 64),
    layers_per_block=2,
    down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
    cross_attention_dim=32,
    attention_head_dim=4,
    use_linear_projection=linear,
  )
  small_vae = diffusers.AutoencoderKL(
    block_out_channels=(32, 64),
    layers_per_block=1,
    sample_size=16,
    down_block_types=('DownEncoderBlock2D',) * 2,
    up_block_types=('UpDecoderBlock2D',) * 2,
  )
  act = 'gelu' if linear else 'quick_gelu'
  text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, hidden_act=act))
  return {
    'unet': randomized(small_unet),
    'vae': randomized(small_vae),
    'text_encoder': randomized(text),
  }


def pipeline_of(modules):
  scheduler = diffusers.DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear'
  )
  return diffusers.StableDiffusionInstructPix2PixPipeline(
    **modules,
    tokenizer=small_tokenizer(),
    scheduler=scheduler,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )


def torch_tensors(module, prefix=''):
  return {prefix + name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope='module')
def modules():
  return torch_modules()


@pytest.fixture(scope='module')
def wanted(modules):
  """The tensors in our form: transformers 5 leaves out `text_model.`."""
  return {
    part: torch_tensors(module, 'text_model.' if part == 'text_encoder' else '')
    for part, module in modules.items()
  }


@pytest.fixture(scope='module')
def folder(modules, tmp_path_factory):
  path = tmp_path_factory.mktemp('diffusers') / 'small'
  pipeline_of(modules).save_pretrained(path)
  return path


@pytest.fixture(scope='module')
def checkpoint(folder):
  return weights.read(folder)


@pytest.fixture
def copied(folder, tmp_path):
  """A folder that a test may damage."""
  return shutil.copytree(folder, tmp_path / 'copied')


@pytest.fixture(scope='module')
def written(checkpoint, tmp_path_factory):
  path = tmp_path_factory.mktemp('written') / 'folder'
  weights.write(checkpoint, path)
  return path


@pytest.fixture(scope='module')
def ldm(checkpoint, tmp_path_factory):
  path = tmp_path_factory.mktemp('ldm') / 'model.safetensors'
  weights.write(checkpoint, path, to='ldm')
  return path


def abstract(part, config):
  if part == 'unet':
    make = lambda keys: unet.UNet(configs.UNetConfig.from_json(config), rngs=keys)
  elif part == 'vae':
    make = lambda keys: vae.VAE(configs.VAEConfig.from_json(config), rngs=keys)
  else:
    make = lambda keys: clip.TextEncoder(configs.TextConfig.from_json(config), rngs=keys)
  return layers.abstract(make)[1]


@pytest.fixture(scope='module')
def trees(checkpoint):
  return {part: abstract(part, checkpoint.configs[part]) for part in COMPONENTS}


def assert_equal(tensors, wanted):
  assert tensors.keys() == wanted.keys()
  for name in wanted:
    array = tensors[name]
    assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
    assert array.tobytes() == wanted[name].tobytes(), name


def files_of(path):
  return {
    str(file.relative_to(path)): file.read_bytes() for file in path.rglob('*') if file.is_file()
  }


def changed(tensors, **changes):
  result = {name: tensors[name] for name in tensors} | changes
  return {name: array for name, array in result.items() if array is not None}


def with_unet(checkpoint, config=None, **changes):
  """The checkpoint with changes of the UNet's config and tensors."""
  return dataclasses.replace(
    checkpoint,
    configs=checkpoint.configs | {'unet': checkpoint.configs['unet'] | (config or {})},
    tensors=checkpoint.tensors | {'unet': changed(checkpoint.tensors['unet'], **changes)},
  )


def with_first_kernel(checkpoint, kernel):
  return with_unet(checkpoint, {'in_channels': kernel.shape[1]}, **{CONV_IN: kernel})


# Reading folders.


@pytest.mark.parametrize('part', COMPONENTS)
def test_a_folder_becomes_our_tree_and_back_exactly(checkpoint, wanted, trees, part):
  assert_equal(checkpoint.tensors[part], wanted[part])
  params = weights.to_params(checkpoint.tensors[part], trees[part], part)
  tensors = weights.to_tensors(params)
  assert_equal(tensors, wanted[part])
  assert all(array.flags.c_contiguous for array in tensors.values())


def test_convolutions_are_hwio_and_linear_layers_in_out(checkpoint, wanted, trees):
  params = weights.to_params(checkpoint.tensors['unet'], trees['unet'], 'unet')
  conv = wanted['unet']['down_blocks.1.resnets.0.conv1.weight']
  linear = wanted['unet']['time_embedding.linear_1.weight']
  assert params['down_blocks'][1]['resnets'][0]['conv1']['kernel'][2, 1, 5, 7] == conv[7, 5, 2, 1]
  assert params['time_embedding']['linear_1']['kernel'][3, 9] == linear[9, 3]


def test_configs_are_the_files(checkpoint, modules, folder):
  assert checkpoint.configs['unet'] == json.loads((folder / 'unet/config.json').read_text())
  assert checkpoint.configs['unet']['in_channels'] == 8
  assert checkpoint.configs['scheduler']['_class_name'] == 'DDIMScheduler'
  assert checkpoint.source == str(folder)


def test_the_one_tokenizer_file_of_transformers_5_is_split(checkpoint, folder):
  assert not (folder / 'tokenizer' / 'vocab.json').exists()
  vocabulary = json.loads(checkpoint.tokenizer['vocab.json'])
  assert len(vocabulary) == VOCABULARY and vocabulary['<|endoftext|>'] == 519
  assert checkpoint.tokenizer['merges.txt'].decode().splitlines()[:2] == ['#version: 0.2', 'i n']


def test_parameters_take_the_type_of_the_tree(checkpoint, trees):
  import jax
  import jax.numpy as jnp

  tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), trees['vae'])
  params = weights.to_params(checkpoint.tensors['vae'], tree, 'vae')
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_a_variant_is_read_on_request(copied, modules, wanted):
  for part in COMPONENTS:
    half = torch_modules()[part].half()
    half.save_pretrained(copied / part, variant='fp16')
  half_conv = wanted['unet'][CONV_IN].astype(np.float16)
  assert weights.read(copied).tensors['unet'][CONV_IN].dtype == np.float32
  half_checkpoint = weights.read(copied, variant='fp16')
  parts = half_checkpoint.tensors.values()
  assert {tensors[name].dtype for tensors in parts for name in tensors} == {np.dtype(np.float16)}
  assert np.array_equal(half_checkpoint.tensors['unet'][CONV_IN], half_conv)
  for plain in copied.rglob('*model.safetensors'):
    plain.unlink()
  assert np.array_equal(weights.read(copied).tensors['unet'][CONV_IN], half_conv)


def test_only_the_unet_must_have_the_variant(copied):
  with pytest.raises(InputError, match=r'unet: has no weights; expected .*\.non_ema\.safetensors'):
    weights.read(copied, variant='non_ema')
  stem = copied / 'unet' / 'diffusion_pytorch_model'
  shutil.copy(f'{stem}.safetensors', f'{stem}.non_ema.safetensors')
  assert weights.read(copied, variant='non_ema').tensors['vae']


@pytest.mark.parametrize('variant', [None, 'fp16'])
def test_shards_are_read(copied, modules, wanted, variant):
  for part, size in (('unet', '400KB'), ('text_encoder', '30KB')):
    for file in (copied / part).glob('*.safetensors'):
      file.unlink()
    modules[part].save_pretrained(copied / part, max_shard_size=size, variant=variant)
    assert len(list((copied / part).glob('*.safetensors'))) > 1
    assert_equal(weights.read(copied).tensors[part], wanted[part])


def test_bin_files_are_read(copied, modules, wanted):
  for part, file in (
    ('unet', 'diffusion_pytorch_model.bin'),
    ('text_encoder', 'pytorch_model.bin'),
  ):
    for safetensors in (copied / part).glob('*.safetensors'):
      safetensors.unlink()
    torch.save(modules[part].state_dict(), copied / part / file)
    assert_equal(weights.read(copied).tensors[part], wanted[part])


def test_old_names_of_the_text_encoder_are_read(copied, wanted):
  old = wanted['text_encoder'] | {'text_model.embeddings.position_ids': np.arange(77)[None]}
  save_file(old, copied / 'text_encoder' / 'model.safetensors')
  assert_equal(weights.read(copied).tensors['text_encoder'], wanted['text_encoder'])


@pytest.mark.parametrize('as_convolution', [False, True])
def test_old_names_of_vae_attention_are_read(copied, wanted, as_convolution):
  old = {}
  for name, array in wanted['vae'].items():
    for now, before in (
      ('to_q', 'query'),
      ('to_k', 'key'),
      ('to_v', 'value'),
      ('to_out.0', 'proj_attn'),
    ):
      name = name.replace(f'.{now}.', f'.{before}.')
    is_projection = 'attentions' in name and array.ndim == 2
    old[name] = array[:, :, None, None] if as_convolution and is_projection else array
  save_file(old, copied / 'vae' / 'diffusion_pytorch_model.safetensors')
  assert_equal(weights.read(copied).tensors['vae'], wanted['vae'])


def test_prediction_type_can_be_given(folder, ldm):
  for path in (folder, ldm):
    assert weights.read(path).configs['scheduler']['prediction_type'] == 'epsilon'
    checkpoint = weights.read(path, prediction_type='v_prediction')
    assert checkpoint.configs['scheduler']['prediction_type'] == 'v_prediction'
  with pytest.raises(InputError, match="prediction_type 'v' is unknown"):
    weights.read(folder, prediction_type='v')


# What to_params refuses.


def test_missing_tensors_are_named_and_counted(wanted, trees):
  gone = [name for name in wanted['unet'] if name.startswith('mid_block.attentions.0.norm.')]
  tensors = changed(wanted['unet'], **dict.fromkeys(gone))
  with pytest.raises(
    InputError, match=r'^here: unet lacks 2 tensors: mid_block\.attentions\.0\.no'
  ):
    weights.to_params(tensors, trees['unet'], 'unet', source='here')
  with pytest.raises(InputError, match=r'lacks \d+ tensors: .*, \.\.\.\.$'):
    weights.to_params({}, trees['unet'], 'unet')


def with_value(array, value):
  array = array.copy()
  array[3, 2, 1, 0] = value
  return array


@pytest.mark.parametrize(
  ('part', 'name', 'change', 'message'),
  [
    ('vae', 'encoder.adapter.weight', lambda _: np.zeros(3, np.float32),
     r'vae has unknown 1 tensor: encoder\.adapter\.weight'),
    ('unet', CONV_IN, lambda x: x[:, :4],
     r'conv_in\.weight is \(32, 4, 3, 3\) and should be \(32, 8, 3, 3\)'),
    ('unet', CONV_IN, lambda x: with_value(x, np.nan),
     r'tensor conv_in\.weight holds NaN or infinity'),
    ('unet', CONV_IN, lambda x: with_value(x, np.inf),
     r'tensor conv_in\.weight holds NaN or infinity'),
    ('unet', CONV_IN, lambda x: x.astype(np.int8), r'conv_in\.weight holds int8'),
  ],
  ids=['unknown', 'another shape', 'nan', 'inf', 'int8'],
)  # fmt: skip
def test_a_wrong_tensor_is_named(wanted, trees, part, name, change, message):
  tensors = changed(wanted[part], **{name: change(wanted[part].get(name))})
  with pytest.raises(InputError, match=message):
    weights.to_params(tensors, trees[part], part)


# CLIP's two towers.


@pytest.fixture(scope='module')
def clip_model():
  vision = {
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'image_size': 16,
    'patch_size': 8,
  }
  config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=24)
  return randomized(transformers.CLIPModel(config))


def clip_abstract(model, tower):
  config = getattr(model.config, f'{tower}_config').to_dict() | {'projection_dim': 24}
  if tower == 'text':
    text = configs.TextConfig.from_json(config)
    return layers.abstract(lambda keys: clip.TextEncoder(text, has_projection=True, rngs=keys))[1]
  vision = configs.VisionConfig.from_json(config)
  return layers.abstract(lambda keys: clip.VisionEncoder(vision, rngs=keys))[1]


@pytest.mark.parametrize('tower, projection', [('text', 'text'), ('vision', 'visual')])
def test_one_tower_of_clip_is_taken_on_request(clip_model, tower, projection):
  tensors, tree = torch_tensors(clip_model), clip_abstract(clip_model, tower)
  with pytest.raises(InputError, match='clip has unknown'):
    weights.to_params(tensors, tree, 'clip')
  params = weights.to_params(tensors, tree, 'clip', tower=tower)
  prefixes = (f'{tower}_model.', f'{projection}_projection.')
  assert_equal(
    weights.to_tensors(params),
    {name: array for name, array in tensors.items() if name.startswith(prefixes)},
  )


def test_bare_parameters_keep_their_name_and_scalars_their_rank():
  params = {
    'logit_scale': np.array(2.6, np.float32),
    'vision_model': {'embeddings': {'class_embedding': np.ones(3, np.float32)}},
  }
  tensors = weights.to_tensors(params)
  assert set(tensors) == {'logit_scale', 'vision_model.embeddings.class_embedding'}
  back = weights.to_params(tensors, params, 'clip')
  assert back['logit_scale'].shape == () and back['logit_scale'] == np.float32(2.6)


# Writing folders.


def test_a_written_folder_loads_in_diffusers(written, wanted):
  loaded = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(written)
  assert type(loaded.scheduler).__name__ == 'EulerAncestralDiscreteScheduler'
  assert loaded.scheduler.config.beta_end == 0.012
  assert loaded.safety_checker is None and not loaded.config.requires_safety_checker
  for part in ('unet', 'vae'):
    assert_equal(torch_tensors(getattr(loaded, part)), wanted[part])
  assert_equal(torch_tensors(loaded.text_encoder, 'text_model.'), wanted['text_encoder'])
  assert (
    loaded.tokenizer('in the', padding='max_length').input_ids
    == small_tokenizer()('in the', padding='max_length').input_ids
  )


def test_a_written_text_encoder_keeps_the_old_prefix(written):
  tensors = load_file(written / 'text_encoder' / 'model.safetensors')
  assert all(name.startswith('text_model.') for name in tensors)


@pytest.mark.parametrize(
  'channels, pipeline',
  [
    (4, 'StableDiffusionPipeline'),
    (8, 'StableDiffusionInstructPix2PixPipeline'),
    (9, 'StableDiffusionInpaintPipeline'),
  ],
)
def test_the_pipeline_follows_from_the_input_channels(tmp_path, checkpoint, channels, pipeline):
  kernel = np.zeros((32, channels, 3, 3), np.float32)
  weights.write(with_first_kernel(checkpoint, kernel), tmp_path / 'x')
  index = json.loads((tmp_path / 'x' / 'model_index.json').read_text())
  assert index['_class_name'] == pipeline
  assert f'import {pipeline}' in (tmp_path / 'x' / 'README.md').read_text()
  assert weights.read(tmp_path / 'x').configs['unet']['in_channels'] == channels


def test_a_written_folder_reads_back_to_the_same_folder(tmp_path, written):
  weights.write(weights.read(written), tmp_path / 'again')
  assert files_of(tmp_path / 'again') == files_of(written)


def test_half_precision_is_written_under_its_name(tmp_path, checkpoint, wanted):
  weights.write(checkpoint, tmp_path / 'x', dtype='float16', variant='fp16')
  assert (tmp_path / 'x' / 'unet' / 'diffusion_pytorch_model.fp16.safetensors').is_file()
  assert (tmp_path / 'x' / 'text_encoder' / 'model.fp16.safetensors').is_file()
  loaded = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
    tmp_path / 'x', variant='fp16', torch_dtype=torch.float16
  )
  tensors = torch_tensors(loaded.unet)
  assert_equal(tensors, {name: array.astype(np.float16) for name, array in wanted['unet'].items()})
  with pytest.raises(InputError, match='variant fp16 with dtype float16'):
    weights.write(checkpoint, tmp_path / 'y', variant='fp16')


def test_the_model_card_says_how_to_load(written):
  card = (written / 'README.md').read_text()
  assert card.startswith('---\n') and '\npipeline_tag: image-to-image\n' in card
  for word in (
    'float32',
    'from_pretrained',
    'image_guidance_scale=1.5',
    'A1111',
    'ComfyUI',
    'Licence',
  ):
    assert word in card


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path, checkpoint, written):
  target = tmp_path / 'x'
  target.mkdir()
  weights.write(checkpoint, target)  # empty: fine
  with pytest.raises(InputError, match=r'x: already exists'):
    weights.write(checkpoint, target)
  (target / 'stale').write_text('')
  weights.write(checkpoint, target, overwrite=True)
  assert files_of(target) == files_of(written)


def test_only_a_checkpoint_is_ever_overwritten(tmp_path, checkpoint):
  (tmp_path / 'home').mkdir()
  (tmp_path / 'home' / 'thesis.txt').write_text('years')
  with pytest.raises(InputError, match='home: is not a diffusers folder'):
    weights.write(checkpoint, tmp_path / 'home', overwrite=True)
  assert (tmp_path / 'home' / 'thesis.txt').read_text() == 'years'


def breaking(checkpoint):
  """The checkpoint with a last tensor that raises while it is written."""
  text = checkpoint.tensors['text_encoder']
  asked = []

  def fails():
    asked.append(1)
    if len(asked) > 1:
      raise KeyboardInterrupt
    return text['text_model.final_layer_norm.bias']

  makers = {name: lambda name=name: text[name] for name in text}
  tensors = Tensors(makers | {'text_model.final_layer_norm.bias': fails})
  return dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {'text_encoder': tensors})


@pytest.mark.parametrize('to, name', [('diffusers', 'x'), ('ldm', 'x.safetensors')])
def test_nothing_is_left_of_a_write_that_fails(tmp_path, checkpoint, to, name):
  with pytest.raises(KeyboardInterrupt):
    weights.write(breaking(checkpoint), tmp_path / name, to=to)
  assert not list(tmp_path.iterdir())
  weights.write(checkpoint, tmp_path / name, to=to)
  before = (tmp_path / name).stat().st_mtime_ns
  with pytest.raises(KeyboardInterrupt):
    weights.write(breaking(checkpoint), tmp_path / name, to=to, overwrite=True)
  assert [path.name for path in tmp_path.iterdir()] == [name]
  assert (tmp_path / name).stat().st_mtime_ns == before


# LDM files.


def test_folder_to_ldm_to_folder_is_byte_identical(tmp_path, written, ldm):
  weights.write(weights.read(ldm), tmp_path / 'x')
  assert files_of(tmp_path / 'x') == files_of(written)


def test_ldm_to_ldm_is_byte_identical(tmp_path, ldm):
  weights.write(weights.read(ldm), tmp_path / 'x.safetensors', to='ldm')
  assert (tmp_path / 'x.safetensors').read_bytes() == ldm.read_bytes()


def test_an_ldm_file_restores_configs_and_tokenizer(checkpoint, ldm, wanted):
  result = weights.read(ldm)
  assert result.configs == checkpoint.configs
  assert result.tokenizer == checkpoint.tokenizer
  for part in COMPONENTS:
    assert_equal(result.tensors[part], wanted[part])


def test_diffusers_reads_our_ldm_names_as_we_do(ldm, checkpoint, wanted):
  tensors = {name: torch.tensor(array) for name, array in load_file(ldm).items()}
  their_unet = single_file_utils.convert_ldm_unet_checkpoint(
    dict(tensors), config=dict(checkpoint.configs['unet'])
  )
  their_vae = single_file_utils.convert_ldm_vae_checkpoint(
    dict(tensors), config=dict(checkpoint.configs['vae'])
  )
  assert_equal({name: array.numpy() for name, array in their_unet.items()}, wanted['unet'])
  assert_equal({name: array.numpy() for name, array in their_vae.items()}, wanted['vae'])
  their_text = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
  assert_equal({name: array.numpy() for name, array in their_text.items()}, wanted['text_encoder'])


def test_the_upsampler_comes_after_attention(ldm):
  tensors = load_file(ldm)
  names = {name.removeprefix(ldm_file.UNET) for name in tensors if name.endswith('conv.weight')}
  assert {name for name in names if name.startswith('output_blocks')} == {
    'output_blocks.2.1.conv.weight',
    'output_blocks.5.2.conv.weight',
  }


def test_diffusers_loads_our_ldm_file(ldm, checkpoint, wanted, tmp_path):
  diffusers_folder.write_configs(checkpoint, tmp_path / 'configs')
  assert not list(tmp_path.rglob('*.safetensors'))
  loaded = diffusers.StableDiffusionInstructPix2PixPipeline.from_single_file(
    ldm, config=str(tmp_path / 'configs'), local_files_only=True
  )
  assert_equal(torch_tensors(loaded.unet), wanted['unet'])
  assert_equal(torch_tensors(loaded.vae), wanted['vae'])
  assert_equal(torch_tensors(loaded.text_encoder, 'text_model.'), wanted['text_encoder'])


def altered(ldm, path, change, metadata=None):
  """Writes the LDM file with tensors changed by `change`, without our metadata."""
  save_file(change(load_file(ldm)), path, metadata)
  return path


def test_the_moving_average_is_taken_unless_refused(tmp_path, ldm, wanted):
  def with_average(tensors):
    live = {name: array for name, array in tensors.items() if name.startswith('model.')}
    return (
      tensors
      | {ldm_names.ema_name(name): array + 0.01 for name, array in live.items()}
      | {'model_ema.decay': np.float32([0.9999]), 'model_ema.num_updates': np.array([22000])}
    )

  path = tmp_path / 'ema.safetensors'
  save_file(with_average(load_file(ldm)), path, weights.read_tensors(ldm)[1])
  averaged = {name: array + 0.01 for name, array in wanted['unet'].items()}
  assert_equal(weights.read(path).tensors['unet'], averaged)
  assert_equal(weights.read(path, ema=False).tensors['unet'], wanted['unet'])


def test_the_average_of_the_first_convolution_has_the_original_name():
  name = ldm_names.ema_name('model.diffusion_model.input_blocks.0.0.weight')
  assert name == 'model_ema.diffusion_modelinput_blocks00weight'


def test_half_a_moving_average_is_an_error(tmp_path, ldm, wanted):
  name = 'model.diffusion_model.out.2.bias'
  path = altered(
    ldm,
    tmp_path / 'half.safetensors',
    lambda tensors: tensors | {ldm_names.ema_name(name): tensors[name]},
    weights.read_tensors(ldm)[1],
  )
  with pytest.raises(InputError, match=r'half\.safetensors: holds only part of a moving average'):
    weights.read(path)
  assert_equal(weights.read(path, ema=False).tensors['unet'], wanted['unet'])


def test_a_ckpt_with_training_leftovers_is_read(tmp_path, ldm, wanted):
  state = {name: torch.tensor(array) for name, array in load_file(ldm).items()}
  state = {
    name.replace('transformer.text_model.', 'transformer.'): tensor
    for name, tensor in state.items()
  }
  state |= {
    'betas': torch.ones(1000),
    'first_stage_model.loss.logvar': torch.zeros(()),
    'cond_stage_model.transformer.embeddings.position_ids': torch.arange(77)[None],
    'scale_factor': torch.tensor(0.2),
  }
  torch.save({'state_dict': state, 'global_step': 22000}, tmp_path / 'x.ckpt')
  with pytest.raises(InputError, match='not a multiple of 64'):  # a small model without metadata
    weights.read(tmp_path / 'x.ckpt')
  wide = {
    name: array.repeat(2, -1) if name.endswith('position_embedding.weight') else array
    for name, array in wanted['text_encoder'].items()
  }
  wide['text_model.embeddings.token_embedding.weight'] = np.ones((VOCABULARY, 64), np.float32)
  for name in ('position', 'token'):
    key = f'embeddings.{name}_embedding.weight'
    state['cond_stage_model.transformer.' + key] = torch.tensor(wide['text_model.' + key])
  torch.save({'state_dict': state, 'global_step': 22000}, tmp_path / 'x.ckpt')
  result = weights.read(tmp_path / 'x.ckpt')
  assert_equal(result.tensors['unet'], wanted['unet'])
  assert_equal(result.tensors['vae'], wanted['vae'])
  assert_equal(result.tensors['text_encoder'], wide)
  assert result.configs['vae']['scaling_factor'] == 0.2
  assert result.configs['unet']['attention_head_dim'] == 8
  assert result.tokenizer == weights.clip_tokenizer()


OTHER_FILES = {
  'SDXL': (['conditioner.embedders.0.transformer.x', 'model.diffusion_model.x'], 'an SDXL check'),
  'SD 3': (['model.diffusion_model.joint_blocks.0.x'], 'an SD 3 checkpoint'),
  'Flux': (['double_blocks.0.img_attn.x'], 'a Flux checkpoint'),
  'ControlNet': (['control_model.x'], 'a ControlNet'),
  'LoRA': (['lora_unet_down_blocks_0.lora_down.weight'], 'this is a LoRA'),
  'diffusers UNet': (['conv_in.weight', 'conv_in.bias'], 'one component in diffusers'),
  'nothing': (['x'], r'lacks a UNet .* and a VAE .* and a text encoder'),
}


@pytest.mark.parametrize('kind', OTHER_FILES)
def test_other_kinds_of_files_are_named(tmp_path, kind):
  tensors, message = OTHER_FILES[kind]
  path = tmp_path / 'other.safetensors'
  save_file({name: np.zeros(1, np.float32) for name in tensors}, path)
  with pytest.raises(InputError, match=rf'other\.safetensors: .*{message}'):
    weights.read(path)


@pytest.mark.parametrize(
  'prefix, message',
  [
    ('first_stage_model.', r'lacks a VAE \(first_stage_model'),
    ('cond_stage_model.', r'lacks a text encoder \(cond_stage_model'),
    ('model.diffusion_model.', r'lacks a UNet \(model'),
  ],
)
def test_a_file_without_a_component_says_which(tmp_path, ldm, prefix, message):
  path = altered(
    ldm,
    tmp_path / 'x.safetensors',
    lambda tensors: {name: array for name, array in tensors.items() if not name.startswith(prefix)},
  )
  with pytest.raises(InputError, match=message):
    weights.read(path)


@pytest.mark.parametrize(
  'name',
  [
    'model.diffusion_model.input_blocks.1.7.weight',
    'model.diffusion_model.adapter.weight',
    'first_stage_model.encoder.down.0.attn.0.q.weight',
  ],
)
def test_a_tensor_without_a_place_is_named(tmp_path, ldm, name):
  path = altered(
    ldm, tmp_path / 'x.safetensors', lambda tensors: tensors | {name: np.zeros(1, np.float32)}
  )
  with pytest.raises(InputError, match=rf'x\.safetensors: {name.split("model.")[-1]} has no place'):
    weights.read(path)


def test_a_missing_part_of_the_unet_is_named(tmp_path, ldm):
  path = altered(
    ldm,
    tmp_path / 'x.safetensors',
    lambda tensors: {
      name: array for name, array in tensors.items() if 'middle_block.1.' not in name
    },
  )
  with pytest.raises(InputError, match=r'x\.safetensors: lacks tensor .mid_block'):
    weights.read(path)


@pytest.mark.parametrize('metadata', ['{', '[]', '{}', '{"configs": {}, "tokenizer": {}}'])
def test_damaged_metadata_of_ours_is_an_error(tmp_path, ldm, metadata):
  path = altered(ldm, tmp_path / 'x.safetensors', dict, {'ip2p_jax': metadata})
  with pytest.raises(InputError, match=r'its metadata .* is damaged'):
    weights.read(path)


def test_a_name_that_ldm_does_not_know_is_not_written(tmp_path, checkpoint):
  unknown = with_unet(checkpoint, **{'adapter.weight': np.zeros(1, np.float32)})
  for to, name in (('ldm', 'x.safetensors'), ('diffusers', 'x')):
    with pytest.raises(InputError, match=r'adapter\.weight has no place in the unet'):
      weights.write(unknown, tmp_path / name, to=to)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'to': 'onnx'}, "to 'onnx' is unknown"),
    ({'to': 'ldm'}, 'must end in .safetensors'),
    ({'dtype': 'int8'}, "dtype 'int8' is unknown"),
  ],
)
def test_write_refuses_what_it_cannot_do(tmp_path, checkpoint, arguments, message):
  with pytest.raises(InputError, match=message):
    weights.write(checkpoint, tmp_path / 'x', **arguments)
  assert not list(tmp_path.iterdir())


def test_an_ldm_file_is_overwritten_on_request_only(ldm, checkpoint, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_text('mine')
  with pytest.raises(InputError, match=r'x\.safetensors: already exists'):
    weights.write(checkpoint, path, to='ldm')
  weights.write(checkpoint, path, to='ldm', overwrite=True)
  assert path.read_bytes() == ldm.read_bytes()


# SD 2.x.


@pytest.fixture(scope='module')
def second(tmp_path_factory):
  path = tmp_path_factory.mktemp('second') / 'small'
  pipeline_of(torch_modules(linear=True)).save_pretrained(path)
  return weights.read(path)


def test_sd2_names_are_open_clips(tmp_path, second):
  weights.write(second, tmp_path / 'x.safetensors', to='ldm')
  tensors = load_file(tmp_path / 'x.safetensors')
  text = {name for name in tensors if name.startswith('cond_stage_model.model.')}
  assert not any(name.startswith('cond_stage_model.transformer.') for name in tensors)
  assert 'cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight' in text
  assert 'cond_stage_model.model.text_projection' not in text
  result = weights.read(tmp_path / 'x.safetensors')
  for part in COMPONENTS:
    assert_equal(
      result.tensors[part], {name: second.tensors[part][name] for name in second.tensors[part]}
    )
  assert result.configs == second.configs


def open_clip_tower(rng, layers, width):
  """A whole text tower as OpenCLIP names it."""

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  tensors = {
    'positional_embedding': normal(77, width),
    'token_embedding.weight': normal(99, width),
    'ln_final.weight': normal(width),
    'ln_final.bias': normal(width),
    'text_projection': normal(width, width),
    'logit_scale': np.array(4.6, np.float32),
  }
  for i in range(layers):
    layer = f'transformer.resblocks.{i}.'
    for name, shape in {
      'ln_1': (width,),
      'ln_2': (width,),
      'attn.out_proj': (width, width),
      'mlp.c_fc': (2 * width, width),
      'mlp.c_proj': (width, 2 * width),
    }.items():
      tensors |= {f'{layer}{name}.weight': normal(*shape), f'{layer}{name}.bias': normal(shape[0])}
    tensors |= {
      f'{layer}attn.in_proj_weight': normal(3 * width, width),
      f'{layer}attn.in_proj_bias': normal(3 * width),
    }
  return tensors


def test_open_clip_agrees_with_diffusers_except_the_last_layer(rng):
  tower = open_clip_tower(rng, layers=3, width=16)
  ours = ldm_names.from_open_clip(tower)
  prefixed = {
    f'cond_stage_model.model.{name}': torch.tensor(array) for name, array in tower.items()
  }
  theirs = single_file_utils.convert_open_clip_checkpoint(None, prefixed)
  theirs = {
    name: array.numpy()
    for name, array in theirs.items()
    if '.layers.2.' not in name and 'projection' not in name
  }
  assert_equal(ours, theirs)


def test_queries_keys_and_values_are_cut_in_that_order(rng):
  tower = open_clip_tower(rng, layers=2, width=16)
  ours = ldm_names.from_open_clip(tower)
  fused = tower['transformer.resblocks.0.attn.in_proj_weight']
  head = 'text_model.encoder.layers.0.self_attn'
  for i, part in enumerate('qkv'):
    assert np.array_equal(ours[f'{head}.{part}_proj.weight'], fused[16 * i : 16 * (i + 1)])


def test_an_open_clip_round_trip_loses_only_unused_tensors(rng):
  tower = open_clip_tower(rng, layers=3, width=16)
  back = ldm_names.to_open_clip(ldm_names.from_open_clip(tower))
  assert_equal(
    back,
    {
      name: array
      for name, array in tower.items()
      if 'resblocks.2.' not in name and name not in ('text_projection', 'logit_scale')
    },
  )


@pytest.mark.parametrize('layers, is_whole, num_layers', [(3, True, 2), (3, False, 3)])
def test_only_a_whole_open_clip_tower_drops_its_last_layer(rng, layers, is_whole, num_layers):
  tower = open_clip_tower(rng, layers, width=8)
  if not is_whole:
    del tower['text_projection']
  ours = ldm_names.from_open_clip(tower)
  assert {int(name.split('.')[3]) for name in ours if '.layers.' in name} == set(range(num_layers))


@pytest.mark.parametrize('layers, is_whole', [(24, True), (24, False), (23, True), (23, False)])
def test_sd2_has_23_layers_in_any_file(layers, is_whole):
  tower = {'positional_embedding': np.zeros((1, 1024), np.float32)}
  tower |= {f'transformer.resblocks.{i}.ln_1.bias': np.zeros(1) for i in range(layers)}
  if is_whole:
    tower['text_projection'] = np.zeros(1)
  assert len(ldm_names.from_open_clip(tower)) == 1 + 23


# Widening the first convolution.


def test_new_input_channels_are_zero_and_all_else_is_kept(checkpoint):
  base = with_first_kernel(checkpoint, checkpoint.tensors['unet'][CONV_IN][:, :4])
  wide = weights.with_input_channels(base, 8)
  kernel = wide.tensors['unet'][CONV_IN]
  assert kernel.shape == (32, 8, 3, 3) and not kernel[:, 4:].any()
  assert np.array_equal(kernel[:, :4], base.tensors['unet'][CONV_IN])
  rest = [name for name in base.tensors['unet'] if name != CONV_IN]
  assert 'conv_in.bias' in rest
  assert_equal(
    {name: wide.tensors['unet'][name] for name in rest},
    {name: base.tensors['unet'][name] for name in rest},
  )
  assert wide.configs['unet']['in_channels'] == 8 and base.configs['unet']['in_channels'] == 4


def test_a_unet_that_takes_the_channels_is_unchanged(checkpoint):
  assert weights.with_input_channels(checkpoint, 8) is checkpoint


@pytest.mark.parametrize('channels', [4, 9])
def test_other_input_channels_are_refused(checkpoint, channels):
  with pytest.raises(InputError, match=f'takes 8 channels, which cannot be made {channels}'):
    weights.with_input_channels(checkpoint, channels)


# What a folder may lack.


@pytest.mark.parametrize(
  'file',
  [
    'unet/config.json',
    'vae/config.json',
    'text_encoder/config.json',
    'scheduler/scheduler_config.json',
  ],
)
def test_a_missing_or_broken_config_is_named(copied, file):
  (copied / file).write_text('{"a": ')
  with pytest.raises(InputError, match=f'{file}: not valid JSON'):
    weights.read(copied)
  (copied / file).write_text('[]')
  with pytest.raises(InputError, match=f'{file}: holds a JSON list'):
    weights.read(copied)
  (copied / file).unlink()
  with pytest.raises(InputError, match=f'{file}: no such file'):
    weights.read(copied)


@pytest.mark.parametrize(
  'file, expected',
  [
    ('unet/diffusion_pytorch_model', 'diffusion_pytorch_model.safetensors'),
    ('vae/diffusion_pytorch_model', 'diffusion_pytorch_model.safetensors'),
    ('text_encoder/model', 'model.safetensors'),
  ],
)
def test_missing_weights_are_named(copied, file, expected):
  (copied / f'{file}.safetensors').unlink()
  with pytest.raises(
    InputError, match=f'{file.split("/")[0]}: has no weights; expected {expected}'
  ):
    weights.read(copied)


def test_a_missing_tokenizer_is_named(copied):
  (copied / 'tokenizer' / 'tokenizer.json').unlink()
  with pytest.raises(InputError, match=r'tokenizer/vocab\.json: no such file'):
    weights.read(copied)
  shutil.rmtree(copied / 'tokenizer')
  with pytest.raises(InputError, match='tokenizer: no such folder'):
    weights.read(copied)


@pytest.mark.parametrize(
  'change',
  [
    {'text_encoder_2': ['transformers', 'CLIPTextModelWithProjection']},
    {'unet': None, 'transformer': ['diffusers', 'FluxTransformer2DModel']},
    {'vae': ['diffusers', 'VQModel']},
  ],
)
def test_other_pipelines_are_named(copied, change):
  index = json.loads((copied / 'model_index.json').read_text())
  index |= change | {'_class_name': 'StableDiffusionXLPipeline'}
  (copied / 'model_index.json').write_text(json.dumps(index))
  with pytest.raises(InputError, match=r'model_index\.json: this is a StableDiffusionXLPipeline'):
    weights.read(copied)


def test_a_folder_needs_no_model_index_but_fitting_components(copied, wanted):
  (copied / 'model_index.json').unlink()
  assert_equal(weights.read(copied).tensors['vae'], wanted['vae'])
  config = json.loads((copied / 'vae' / 'config.json').read_text()) | {'_class_name': 'VQModel'}
  (copied / 'vae' / 'config.json').write_text(json.dumps(config))
  with pytest.raises(InputError, match=r'vae/config\.json: is a VQModel'):
    weights.read(copied)


def test_a_path_that_is_not_there_is_named():
  with pytest.raises(InputError, match='timbrooks/instruct-pix2pix: no such file or folder'):
    weights.read('timbrooks/instruct-pix2pix')


def test_a_single_file_has_no_variant(ldm):
  with pytest.raises(InputError, match="leave out variant 'fp16'"):
    weights.read(ldm, variant='fp16')


# CLIP's tokenizer.


@pytest.mark.parametrize('pad_token, pad_id', [(None, 49407), ('!', 0)])
def test_the_bundled_tokenizer_is_clips(tmp_path, pad_token, pad_id):
  files = weights.clip_tokenizer(pad_token)
  # The sizes of the files of openai/clip-vit-large-patch14.
  assert len(files['vocab.json']) == 961_143 and len(files['merges.txt']) == 524_619
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
  assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
  ids = tokenizer('a photo of a Cat', padding='max_length').input_ids
  assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad_id] * 70


def test_clips_own_tokenizer_is_not_stored_again(tmp_path, checkpoint):
  files = weights.clip_tokenizer() | {'special_tokens_map.json': b'{}'}
  vocabulary = json.dumps(json.loads(files['vocab.json']), indent=2).encode()  # as SD 1.5's hub
  with_files = dataclasses.replace(checkpoint, tokenizer=files | {'vocab.json': vocabulary})
  weights.write(with_files, tmp_path / 'x.safetensors', to='ldm')
  _, metadata = weights.read_tensors(tmp_path / 'x.safetensors')
  assert len(metadata[ldm_file.METADATA]) < 20_000
  assert weights.read(tmp_path / 'x.safetensors').tokenizer == files


def test_the_schedule_is_kept_for_any_sampler(checkpoint):
  v_prediction = checkpoint.configs['scheduler'] | {'prediction_type': 'v_prediction'}
  with_scheduler = dataclasses.replace(
    checkpoint, configs=checkpoint.configs | {'scheduler': v_prediction}
  )
  written = diffusers_folder._written_configs(with_scheduler)['scheduler']
  assert written['prediction_type'] == 'v_prediction' and written['beta_start'] == 0.00085
  assert 'clip_sample' not in written and 'timestep_spacing' not in written  # DDIM's own
