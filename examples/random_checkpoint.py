"""Writes an InstructPix2Pix checkpoint with random weights, as a diffusers folder.

  python examples/random_checkpoint.py out/random
  python examples/random_checkpoint.py out/sd15 --like sd15       (4.3 GB, as large as the real one)

It has every part of a real one (UNet, VAE, CLIP text tower, tokenizer, schedule) and so shows that
loading, editing and exporting work; but it has learned nothing, and its edits are noise.
"""

import argparse
from pathlib import Path

import numpy as np

from ip2p_jax import weights
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.weights import names
from ip2p_jax.weights.tensors import COMPONENTS

SMALL_UNET = UNetConfig(
  in_channels=8,
  block_out_channels=(32, 64, 64),
  layers_per_block=1,
  cross_attention_dim=64,
  attention_head_dim=4,
  down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
  up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
)
SMALL_VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
SMALL_TEXT = TextConfig(
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=4,
  projection_dim=64,
)
SIZES = {
  'small': (SMALL_UNET, SMALL_VAE, SMALL_TEXT),
  'sd15': (UNetConfig(in_channels=8), VAEConfig(), TextConfig()),
}


def random_checkpoint(size: str = 'small', seed: int = 0) -> weights.Checkpoint:
  """Normal weights, scaled so that activations neither grow nor fade."""
  parts = [*SIZES[size], Schedule()]
  names_of_parts = (*COMPONENTS, 'scheduler')
  configs = {name: part.to_json() for name, part in zip(names_of_parts, parts, strict=True)}
  checkpoint = weights.Checkpoint(configs, {}, weights.clip_tokenizer(), 'random checkpoint')
  rng = np.random.default_rng(seed)
  shapes = networks_of(checkpoint).shapes
  tensors = {part: names.to_tensors(_random(shapes[part], rng)) for part in COMPONENTS}
  return weights.Checkpoint(configs, tensors, checkpoint.tokenizer, checkpoint.source)


def _random(tree, rng, name=''):
  if isinstance(tree, dict):
    return {key: _random(value, rng, key) for key, value in tree.items()}
  if name == 'bias':
    return np.zeros(tree.shape, np.float32)
  if name == 'scale':
    return np.ones(tree.shape, np.float32)
  fan_in = np.prod(tree.shape[:-1]) if name == 'kernel' else tree.shape[-1]
  return rng.standard_normal(tree.shape, np.float32) * np.float32(fan_in**-0.5)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path)
  parser.add_argument('--like', choices=SIZES, default='small')
  arguments = parser.parse_args()
  weights.write(random_checkpoint(arguments.like), arguments.folder, overwrite=True)
  print(f'wrote {arguments.folder}: random weights, so expect noise, not edits')
