"""Full-size Stable Diffusion as names and shapes: no weights are stored, files are sparse."""

import json
import math

import numpy as np
import peers
import pytest

from ip2p_jax import weights
from ip2p_jax.models import clip, configs, layers, unet, vae
from ip2p_jax.weights import ldm_file, ldm_names, names
from ip2p_jax.weights.tensors import COMPONENTS

torch = peers.module('torch')
transformers = peers.module('transformers')
AutoencoderKL = peers.module('diffusers').AutoencoderKL
UNet2DConditionModel = peers.module('diffusers').UNet2DConditionModel
single_file_utils = peers.module('diffusers.loaders.single_file_utils')

pytestmark = pytest.mark.slow

CROSS, PLAIN = 'CrossAttn{}Block2D', '{}Block2D'
UNET = {
  'sample_size': 64,
  'block_out_channels': (320, 640, 1280, 1280),
  'down_block_types': tuple(kind.format('Down') for kind in (CROSS, CROSS, CROSS, PLAIN)),
  'up_block_types': tuple(kind.format('Up') for kind in (PLAIN, CROSS, CROSS, CROSS)),
}
VAE = {
  'block_out_channels': (128, 256, 512, 512),
  'layers_per_block': 2,
  'sample_size': 512,
  'down_block_types': ('DownEncoderBlock2D',) * 4,
  'up_block_types': ('UpDecoderBlock2D',) * 4,
}
FAMILIES = {
  'SD 1.5, 8 channels': (
    UNET | {'in_channels': 8, 'cross_attention_dim': 768},
    {
      'hidden_size': 768,
      'intermediate_size': 3072,
      'num_hidden_layers': 12,
      'num_attention_heads': 12,
    },
    (686, 248, 196),
  ),
  'SD 2.1': (
    UNET
    | {
      'cross_attention_dim': 1024,
      'attention_head_dim': (5, 10, 20, 20),
      'use_linear_projection': True,
    },
    {
      'hidden_size': 1024,
      'intermediate_size': 4096,
      'num_hidden_layers': 23,
      'num_attention_heads': 16,
      'hidden_act': 'gelu',
    },
    (686, 248, 372),
  ),
}


@pytest.fixture(scope='module', params=list(FAMILIES))
def family(request):
  """The torch modules, without memory, and the number of tensors of each."""
  unet_config, text_config, counts = FAMILIES[request.param]
  with torch.device('meta'):
    modules = {
      'unet': UNet2DConditionModel(**unet_config),
      'vae': AutoencoderKL(**VAE),
      'text_encoder': transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=49408, **text_config)
      ),
    }
  return modules, dict(zip(COMPONENTS, counts, strict=True))


def shapes_of(modules, part):
  prefix = 'text_model.' if part == 'text_encoder' else ''
  tensors = modules[part].state_dict().items()
  return {prefix + name: tuple(tensor.shape) for name, tensor in tensors}


def without_memory(shapes):
  return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def in_ldm(modules):
  """The whole checkpoint under LDM names, without memory."""
  is_open_clip = modules['text_encoder'].config.hidden_act == 'gelu'
  result = {}
  for part in COMPONENTS:
    tensors = without_memory(shapes_of(modules, part))
    prefix = {'unet': ldm_file.UNET, 'vae': ldm_file.VAE, 'text_encoder': ldm_file.CLIP}[part]
    if is_open_clip and part == 'text_encoder':
      tensors, prefix = ldm_names.to_open_clip(tensors), ldm_file.OPEN_CLIP
    else:
      tensors = ldm_names.to_ldm(tensors, part)
    result |= {prefix + name: tensors[name] for name in tensors}
  return result


def sparse_safetensors(path, shapes):
  """A safetensors file whose data is a hole: it takes no disk."""
  header, end = {}, 0
  for name, shape in shapes.items():
    begin, end = end, end + 4 * math.prod(shape)
    header[name] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [begin, end]}
  text = json.dumps(header).encode()
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.truncate(8 + len(text) + end)
  return path


def test_our_trees_have_diffusers_names_and_shapes(family):
  modules, counts = family
  sources = {part: modules[part].config for part in ('unet', 'vae')}
  unet_config = configs.UNetConfig.from_json(dict(sources['unet']))
  vae_config = configs.VAEConfig.from_json(dict(sources['vae']))
  text_config = configs.TextConfig.from_json(modules['text_encoder'].config.to_dict())
  make = {
    'unet': lambda keys: unet.UNet(unet_config, rngs=keys),
    'vae': lambda keys: vae.VAE(vae_config, rngs=keys),
    'text_encoder': lambda keys: clip.TextEncoder(text_config, rngs=keys),
  }
  for part in COMPONENTS:
    _, tree = layers.abstract(make[part])
    shapes = {
      names.tensor_name(path): names._torch_shape(path[-1], leaf.shape)
      for path, leaf in names._leaves(tree)
    }
    assert shapes == shapes_of(modules, part)
    assert len(shapes) == counts[part]


def test_diffusers_reads_every_ldm_name_as_we_write_it(family):
  modules, counts = family
  tensors = {
    name: torch.empty(array.shape, device='meta') for name, array in in_ldm(modules).items()
  }
  theirs = {
    'unet': single_file_utils.convert_ldm_unet_checkpoint(
      dict(tensors), config=dict(modules['unet'].config)
    ),
    'vae': single_file_utils.convert_ldm_vae_checkpoint(
      dict(tensors), config=dict(modules['vae'].config)
    ),
  }
  if modules['text_encoder'].config.hidden_act == 'gelu':
    theirs['text_encoder'] = single_file_utils.convert_open_clip_checkpoint(
      modules['text_encoder'], dict(tensors)
    )
  else:
    theirs['text_encoder'] = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
  for part in COMPONENTS:
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs[part].items()}
    assert shapes == shapes_of(modules, part)
    assert len(shapes) == counts[part]


def original_unet_modules():
  """The blocks of SD 1.5's UNet as in its constructor, with their modules."""
  modules, last = {'input_blocks.0.0'}, 3
  index = 1
  for level in range(4):
    for _ in range(2):
      modules |= {f'input_blocks.{index}.{place}' for place in range(1 if level == last else 2)}
      index += 1
    if level != last:
      modules.add(f'input_blocks.{index}.0')
      index += 1
  modules |= {f'middle_block.{place}' for place in range(3)}
  index = 0
  for level in reversed(range(4)):
    for layer in range(3):
      # A residual block, attention except at the smallest size, and the upsampler of a level.
      held = 1 + (level != last) + (level > 0 and layer == 2)
      modules |= {f'output_blocks.{index}.{place}' for place in range(held)}
      index += 1
  return modules


def test_ldm_names_are_the_original_ones(family):
  """diffusers' reader accepts two places of the upsampler, the original only one."""
  modules, _ = family
  tensors = ldm_names.to_ldm(without_memory(shapes_of(modules, 'unet')), 'unet')
  blocks = {
    '.'.join(name.split('.')[: 2 if name[0] == 'm' else 3])
    for name in tensors
    if name.startswith(('input_blocks', 'middle_block', 'output_blocks'))
  }
  assert blocks == original_unet_modules()
  assert {name for name in tensors if name.endswith('conv.weight')} == {
    'output_blocks.2.1.conv.weight',
    'output_blocks.5.2.conv.weight',
    'output_blocks.8.2.conv.weight',
  }


def test_a_full_size_file_gets_the_right_names_and_configs(family, tmp_path):
  modules, counts = family
  shapes = {name: array.shape for name, array in in_ldm(modules).items()}
  path = sparse_safetensors(tmp_path / 'full.safetensors', shapes)
  checkpoint = weights.read(path, prediction_type='v_prediction')
  for part in COMPONENTS:
    tensors = checkpoint.tensors[part]
    assert {name: tensors[name].shape for name in tensors} == shapes_of(modules, part)
    assert len(tensors) == counts[part]
  assert checkpoint.configs['scheduler']['prediction_type'] == 'v_prediction'
  theirs = configs.UNetConfig.from_json(dict(modules['unet'].config))
  assert configs.UNetConfig.from_json(checkpoint.configs['unet']) == theirs
  theirs = configs.VAEConfig.from_json(dict(modules['vae'].config))
  assert configs.VAEConfig.from_json(checkpoint.configs['vae']) == theirs
  is_first = modules['text_encoder'].config.hidden_act == 'quick_gelu'
  assert checkpoint.tokenizer == weights.clip_tokenizer(None if is_first else '!')
  for part in ('unet', 'vae'):
    as_json = json.loads(modules[part].to_json_string())
    ours = {key: value for key, value in checkpoint.configs[part].items() if key[0] != '_'}
    assert ours == {key: as_json[key] for key in ours}
    # A missing key means diffusers' default, which these models have.
    rebuilt = {'unet': UNet2DConditionModel, 'vae': AutoencoderKL}[part]
    with torch.device('meta'):
      assert json.loads(rebuilt(**ours).to_json_string()) == as_json
  text = modules['text_encoder'].config.to_dict()
  keys = (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'hidden_act',
    'num_attention_heads',
    'max_position_embeddings',
    'layer_norm_eps',
    'model_type',
  )
  assert {key: checkpoint.configs['text_encoder'][key] for key in keys} == {
    key: text[key] for key in keys
  }


def test_configs_are_those_of_the_original_yaml(tmp_path):
  """v1-inference.yaml and v2-inference.yaml, as diffusers reads them."""
  common = {
    'model_channels': 320,
    'channel_mult': [1, 2, 4, 4],
    'attention_resolutions': [4, 2, 1],
    'num_res_blocks': 2,
    'transformer_depth': 1,
    'out_channels': 4,
  }
  first = common | {'in_channels': 8, 'num_heads': 8, 'context_dim': 768}
  second = common | {
    'in_channels': 4,
    'num_head_channels': 64,
    'context_dim': 1024,
    'use_linear_in_transformer': True,
  }
  autoencoder = {
    'ch': 128,
    'ch_mult': [1, 2, 4, 4],
    'num_res_blocks': 2,
    'z_channels': 4,
    'in_channels': 3,
    'out_ch': 3,
    'resolution': 256,
  }
  for (unet_config, _, _), original in zip(FAMILIES.values(), (first, second), strict=True):
    with torch.device('meta'):
      module = UNet2DConditionModel(**unet_config)
    shapes = shapes_of({'unet': module}, 'unet')
    ours = ldm_file._unet_config(without_memory(shapes))
    yaml = {
      'model': {
        'params': {
          'unet_config': {'params': original},
          'first_stage_config': {'params': {'ddconfig': autoencoder}},
        }
      }
    }
    theirs = single_file_utils.create_unet_diffusers_config_from_ldm(yaml, {}, image_size=512)
    shared = theirs.keys() & ours.keys()
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    assert len(shared) >= 10
