"""LPIPS is that of its publication, restated in PyTorch."""

import jax
import numpy as np
import peers
import pytest
import torch_models as reference
import torch_scores
from flax import nnx

from ip2p_jax.errors import InputError
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.lpips import Lpips, classifier_of
from ip2p_jax.weights import to_params, to_tensors

torch = peers.module('torch')


def built(classifier, features, lins):
  """Our graphdef and parameters of torchvision's and LPIPS's tensors."""
  tensors = {name: x for name, x in features.items() if name.startswith('features.')}
  tensors |= {f'lins.{i}': weight.reshape(-1) for i, weight in enumerate(lins.values())}
  model, shapes = abstract(lambda keys: Lpips(classifier, rngs=keys))
  return model, to_params(tensors, shapes, 'lpips')


@pytest.mark.parametrize('classifier', ['squeeze', 'alex'])
def test_names_are_those_of_torchvision(classifier, rng):
  zeros = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape), abstract(lambda keys: Lpips(classifier, rngs=keys))[1]
  )
  ours = {name: x.shape for name, x in to_tensors(zeros).items() if not name.startswith('lins')}
  theirs = torch_scores.classifier_tensors(classifier, rng)
  assert ours == {name: x.shape for name, x in theirs.items() if not name.startswith('classifier')}


@peers.needs_torch
@pytest.mark.parametrize('classifier', ['squeeze', 'alex'])
@pytest.mark.parametrize('size', [(64, 64), (75, 98)], ids=str)
def test_distance_is_that_of_pytorch(classifier, size, rng):
  features = torch_scores.classifier_tensors(classifier, rng)
  lins = torch_scores.lin_tensors(classifier, rng)
  model, params = built(classifier, features, lins)
  images, others = rng.random((2, 3, *size, 3), np.float32)
  distance = jax.jit(lambda params, *images: nnx.merge(model, params)(*images))
  assert (distance(params, images, images) == 0).all()
  ours = distance(params, images, others)
  theirs = torch_scores.lpips(
    features, lins, reference.nchw(images * 2 - 1), reference.nchw(others * 2 - 1)
  )
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_the_classifier_is_known_by_its_names(rng):
  for classifier in ('squeeze', 'alex'):
    tensors = torch_scores.classifier_tensors(classifier, rng)
    assert classifier_of(tensors, 'the file') == classifier
  with pytest.raises(InputError, match=r'lins\.pth: lacks the features'):
    classifier_of(torch_scores.lin_tensors('alex', rng), 'lins.pth')
