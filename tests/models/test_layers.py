"""Layers with gradients written by hand: the same numbers as automatic gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

from ip2p_jax.models.layers import halves, product
from ip2p_jax.models.unet import gated

torch = peers.module('torch')


@pytest.mark.parametrize('rows', [(5,), (2, 5), (2, 3, 5)], ids=str)
def test_gradients_of_a_product_are_those_of_pytorch(rows, rng):
  arrays = [rng.standard_normal(shape, np.float32) for shape in ((*rows, 4), (4, 6), (6,))]
  weight = rng.standard_normal((*rows, 6), np.float32)
  loss = lambda *inputs: (product(*inputs) * weight).sum()
  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
  theirs = [torch.from_numpy(array).requires_grad_() for array in arrays]
  ((theirs[0] @ theirs[1] + theirs[2]) * torch.from_numpy(weight)).sum().backward()
  for ours, tensor in zip(gradients, theirs, strict=True):
    np.testing.assert_allclose(ours, tensor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rows', [(5,), (2, 5)], ids=str)
def test_halves_and_their_gradients_equal_the_split_product(rows, rng):
  arrays = [rng.standard_normal(shape, np.float32) for shape in ((*rows, 4), (4, 6), (6,))]
  weights = [rng.standard_normal((*rows, 3), np.float32) for _ in range(2)]
  split = lambda *inputs: jnp.split(product(*inputs), 2, -1)
  pairs = (jax.vjp(function, *arrays) for function in (halves, split))
  (ours, back), (theirs, their_back) = pairs
  results, expected = (*ours, *back(tuple(weights))), (*theirs, *their_back(weights))
  for a, b in zip(results, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gate_and_its_gradients_are_those_of_pytorch(rng):
  value, gate, weight = 3 * rng.standard_normal((3, 7, 16), np.float32)
  theirs = [torch.from_numpy(array).requires_grad_() for array in (value, gate)]
  expected = theirs[0] * torch.nn.functional.gelu(theirs[1])
  (expected * torch.from_numpy(weight)).sum().backward()
  out, back = jax.vjp(gated, value, gate)
  np.testing.assert_allclose(out, expected.detach(), rtol=1e-5, atol=1e-5)
  for ours, tensor in zip(back(weight), theirs, strict=True):
    np.testing.assert_allclose(ours, tensor.grad, rtol=1e-5, atol=1e-5)


def test_the_gate_is_rounded_once_in_half_precision(rng):
  value, gate = (jnp.bfloat16(3 * rng.standard_normal(4096, np.float32)) for _ in range(2))
  exact = gated(value.astype(jnp.float32), gate.astype(jnp.float32))
  np.testing.assert_array_equal(gated(value, gate), exact.astype(jnp.bfloat16))
