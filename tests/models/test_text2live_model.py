"""The generator of Text2LIVE is the published one, restated in torch."""

import jax
import numpy as np
import peers
import pytest
import torch_models as reference
from flax import nnx

from ip2p_jax.models.layers import abstract
from ip2p_jax.models.text2live import LayerGenerator, least_side

torch = peers.module('torch')

LEVELS, WIDTH, SKIP = 2, 6, 4


def theirs(levels, width, skip):
  """Bar-Tal et al. 2022, appendix: Deep Image Prior's network with BatchNorm in training mode."""
  layers = torch.nn

  class Level(layers.Module):
    def __init__(self, in_width, levels, is_finest=False):
      super().__init__()
      conv3 = lambda i, o, stride=1: layers.Conv2d(i, o, 3, stride, 1, padding_mode='reflect')
      self.skip, self.skip_norm = layers.Conv2d(in_width, skip, 1), layers.BatchNorm2d(skip)
      self.down, self.down_norm = conv3(in_width, width, 2), layers.BatchNorm2d(width)
      self.deep, self.deep_norm = conv3(width, width), layers.BatchNorm2d(width)
      if levels > 1:
        self.below = Level(width, levels - 1)
      self.join_norm = layers.BatchNorm2d(skip + width)
      self.up, self.up_norm = conv3(skip + width, width), layers.BatchNorm2d(width)
      self.mix = layers.Conv2d(width, width, 1)
      if not is_finest:
        self.mix_norm = layers.BatchNorm2d(width)

    def forward(self, x):
      active = layers.LeakyReLU(0.2)
      skipped = active(self.skip_norm(self.skip(x)))
      deep = active(self.down_norm(self.down(x)))
      deep = active(self.deep_norm(self.deep(deep)))
      if hasattr(self, 'below'):
        deep = self.below(deep)
      deep = layers.functional.interpolate(
        deep, scale_factor=2, mode='bilinear', align_corners=False
      )
      height, width = skipped.shape[2:]
      top, left = (deep.shape[2] - height) // 2, (deep.shape[3] - width) // 2
      deep = deep[:, :, top : top + height, left : left + width]
      y = self.join_norm(torch.cat([skipped, deep], 1))
      y = self.mix(active(self.up_norm(self.up(y))))
      return active(self.mix_norm(y) if hasattr(self, 'mix_norm') else y)

  class Generator(layers.Module):
    def __init__(self):
      super().__init__()
      self.outermost = Level(3, levels, is_finest=True)
      self.head = layers.Conv2d(width, 4, 1)

    def forward(self, x):
      out = self.head(self.outermost(x))
      matrix = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
      matrix = matrix / torch.tensor([1.6, 1.0, 1.0])
      matrix = matrix / matrix.norm(dim=0).max()
      colours = torch.einsum('bchw,cd->bdhw', out[:, :3], matrix.T)
      return torch.sigmoid(torch.cat([colours, out[:, 3:]], 1))

  return Generator()


@pytest.mark.parametrize('shape', [(16, 16), (13, 18)])
def test_the_layer_is_that_of_torch(shape, rng):
  model = reference.randomize(theirs(LEVELS, WIDTH, SKIP)).train()
  make = lambda keys: LayerGenerator(LEVELS, WIDTH, SKIP, rngs=keys)
  state = {name: tensor for name, tensor in reference.tensors(model).items() if 'num_' not in name}
  state = {name: tensor for name, tensor in state.items() if 'running' not in name}
  model.state_dict = lambda: {name: torch.from_numpy(tensor) for name, tensor in state.items()}
  graphdef, params = reference.convert(model, make, 'unet')
  image = rng.random((1, *shape, 3), np.float32)
  layer = jax.jit(lambda params, image: nnx.merge(graphdef, params)(image))(params, image)
  expected = reference.nhwc(model(reference.nchw(image)))
  np.testing.assert_allclose(layer, expected, atol=1e-4)


def test_images_of_a_batch_do_not_share_statistics(rng):
  """At the smallest size, with two pixels a side at the coarsest level."""
  make = lambda keys: LayerGenerator(LEVELS, WIDTH, SKIP, rngs=keys)
  graphdef, shapes = abstract(make)
  params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
  draw = jax.jit(lambda images: nnx.merge(graphdef, params)(images))
  images = rng.random((2, least_side(LEVELS), least_side(LEVELS), 3), np.float32)
  other = np.stack([images[0], 1 - images[1]])
  np.testing.assert_array_equal(draw(images)[0], draw(other)[0])
  assert np.isfinite(draw(images)).all()
