"""DINO's transformer is that of its publication, restated in PyTorch."""

import jax
import numpy as np
import peers
import pytest
import torch_models as reference
import torch_scores
from flax import nnx

from ip2p_jax.errors import InputError
from ip2p_jax.models.dino import Dino, DinoConfig
from ip2p_jax.models.layers import abstract
from ip2p_jax.weights import to_params

torch = peers.module('torch')


def built(tensors):
  """Our graphdef and parameters of a backbone's tensors."""
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  config = DinoConfig.from_shapes(shapes, 'the file')
  model, params = abstract(lambda keys: Dino(config, rngs=keys))
  return model, to_params(tensors, params, 'dino')


@peers.needs_torch
@pytest.mark.parametrize('size', [(224, 224), (240, 224), (96, 160), (150, 150)], ids=str)
def test_class_token_and_keys_are_those_of_pytorch(size, rng):
  tensors = torch_scores.dino_tensors(rng)
  model, params = built(tensors)
  images = rng.standard_normal((2, *size, 3), np.float32)
  seen = jax.jit(lambda params, images: nnx.merge(model, params)(images))(params, images)
  for ours, theirs in zip(seen, torch_scores.dino(tensors, reference.nchw(images)), strict=True):
    assert ours.shape == theirs.shape
    assert reference.relative_error(ours, theirs) < 1e-5


@pytest.mark.long
@peers.needs_torch
def test_the_base_with_small_patches_is_that_of_pytorch(rng):
  tensors = torch_scores.dino_tensors(rng, width=768, patch=8, depth=12, grid=28)
  model, params = built(tensors)
  images = rng.standard_normal((1, 64, 80, 3), np.float32)
  seen = jax.jit(lambda params, images: nnx.merge(model, params)(images))(params, images)
  for ours, theirs in zip(seen, torch_scores.dino(tensors, reference.nchw(images)), strict=True):
    assert reference.relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize(
  ('width', 'patch', 'grid'), [(384, 16, 14), (768, 8, 28)], ids=['S/16', 'B/8']
)
def test_sizes_are_read_from_the_file(width, patch, grid):
  shapes = {
    'pos_embed': (1, grid**2 + 1, width),
    'patch_embed.proj.weight': (width, 3, patch, patch),
    **{f'blocks.{i}.mlp.fc1.weight': (4 * width, width) for i in range(12)},
  }
  config = DinoConfig.from_shapes(shapes, 'the file')
  assert config == DinoConfig(patch, width, 12, 4 * width, grid)


def test_another_model_is_refused():
  with pytest.raises(InputError, match=r'vit\.pth: no DINO here'):
    DinoConfig.from_shapes({'features.0.weight': (64, 3, 3, 3)}, 'vit.pth')
  with pytest.raises(InputError, match='a square of patches'):
    DinoConfig.from_shapes(
      {
        'pos_embed': (1, 200, 384),
        'patch_embed.proj.weight': (384, 3, 16, 16),
        'blocks.0.mlp.fc1.weight': (1536, 384),
      },
      'vit.pth',
    )
