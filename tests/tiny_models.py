"""Small models with random normal weights, as checkpoints and as files, without PyTorch."""

import json
import math
import zlib
from pathlib import Path

import jax
import numpy as np

from ip2p_jax import weights
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.layers import abstract
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.weights import Checkpoint, clip_tokenizer, names
from ip2p_jax.weights.tensors import COMPONENTS

TINY_UNET = {
  'in_channels': 8,
  'block_out_channels': [32, 64],
  'layers_per_block': 1,
  'down_block_types': ['CrossAttnDownBlock2D', 'DownBlock2D'],
  'up_block_types': ['UpBlock2D', 'CrossAttnUpBlock2D'],
  'cross_attention_dim': 24,
  'attention_head_dim': 4,
  'norm_num_groups': 8,
  'sample_size': 16,
}
ONE_LEVEL = TINY_UNET | {
  'block_out_channels': [32],
  'down_block_types': ['CrossAttnDownBlock2D'],
  'up_block_types': ['CrossAttnUpBlock2D'],
}
TINY_VAE = {
  'block_out_channels': [16, 32, 32],
  'down_block_types': ['DownEncoderBlock2D'] * 3,
  'up_block_types': ['UpDecoderBlock2D'] * 3,
  'layers_per_block': 1,
  'norm_num_groups': 8,
  'latent_channels': 4,
}
TINY_TEXT = {
  'vocab_size': 600,
  'hidden_size': 24,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'projection_dim': 20,
  'bos_token_id': 598,
  'eos_token_id': 599,
}
TINY_VISION = {
  'hidden_size': 24,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'image_size': 32,
  'patch_size': 8,
  'projection_dim': 20,
}


def random_tensors(shapes) -> dict[str, np.ndarray]:
  """Normal weights everywhere, norms and biases too, scaled so that activations stay near one.

  `shapes` is a tree of arrays or of their shapes. A tensor depends on its name and shape only.
  """
  zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
  tensors = names.to_tensors(zeros)
  return {name: _random(name, tensor.shape) for name, tensor in tensors.items()}


def _random(name, shape):
  tensor = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
  if len(shape) > 1:
    return tensor / np.float32(math.sqrt(math.prod(shape[1:])))
  is_scale = 'norm' in name and name.endswith('weight')
  return np.float32(0.1) * tensor + np.float32(is_scale)


def checkpoint(unet_config=TINY_UNET, schedule=Schedule(), vae_config=TINY_VAE) -> Checkpoint:
  configs = {
    'unet': unet_config,
    'vae': vae_config,
    'text_encoder': {'model_type': 'clip_text_model', **TINY_TEXT},
    'scheduler': schedule.to_json(),
  }
  shapes = networks_of(Checkpoint(configs, {}, {}, 'tiny')).shapes
  tensors = {name: random_tensors(shapes[name]) for name in COMPONENTS}
  return Checkpoint(configs, tensors, tokenizer_files(), 'tiny')


def write(folder: Path, unet_config=TINY_UNET, **scheduler) -> Path:
  """A small InstructPix2Pix folder of diffusers; `scheduler` are keys of its scheduler config."""
  result = checkpoint(unet_config)
  result.configs['scheduler'] |= scheduler
  weights.write(result, folder)
  return folder


def tokenizer_files() -> dict[str, bytes]:
  """A CLIP tokenizer of 600 tokens: all bytes and the first merges of the real one."""
  full = clip_tokenizer()
  merges = full['merges.txt'].decode().splitlines()[:87]
  tokens = sorted(json.loads(full['vocab.json']).items(), key=lambda item: item[1])[:598]
  vocab = dict(tokens) | {'<|startoftext|>': 598, '<|endoftext|>': 599}
  return full | {
    'vocab.json': json.dumps(vocab).encode(),
    'merges.txt': '\n'.join([*merges, '']).encode(),
  }


def write_clip(folder: Path, image_size: int = 64) -> Path:
  """Writes a CLIP in transformers' format."""
  text, vision = TINY_TEXT, TINY_VISION | {'image_size': image_size}
  tensors = {'logit_scale': np.float32(2.6592)}
  for make in (
    lambda keys: TextEncoder(TextConfig.from_json(text), has_projection=True, rngs=keys),
    lambda keys: VisionEncoder(VisionConfig.from_json(vision), rngs=keys),
  ):
    tensors |= random_tensors(abstract(make)[1])
  folder.mkdir(parents=True, exist_ok=True)
  weights.write_safetensors(folder / 'model.safetensors', tensors)
  config = {
    'architectures': ['CLIPModel'],
    'model_type': 'clip',
    'projection_dim': 20,
    'text_config': text,
    'vision_config': vision,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  for name, content in tokenizer_files().items():
    (folder / name).write_bytes(content)
  return folder
