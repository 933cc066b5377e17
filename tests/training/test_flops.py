"""Counting operations: performance figures of the full-size networks, PyTorch's counter, control
flow."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch_models as reference
from jax.experimental import pallas as pl

from ip2p_jax.models.attention import attend
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.training import flops
from ip2p_jax.weights import Checkpoint

torch = peers.module('torch')
SDPBackend = peers.module('torch.nn.attention').SDPBackend
sdpa_kernel = peers.module('torch.nn.attention').sdpa_kernel
FlopCounterMode = peers.module('torch.utils.flop_counter').FlopCounterMode

SCHEDULER = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear'}
X = jax.ShapeDtypeStruct((8, 16), np.float32)
W = jax.ShapeDtypeStruct((16, 16), np.float32)
XW = 2 * 8 * 16 * 16


def networks(unet, vae, text):
  configs = {'unet': unet, 'vae': vae, 'text_encoder': text, 'scheduler': SCHEDULER}
  return networks_of(Checkpoint(configs, {}, {}, 'test'))


@pytest.fixture(scope='module')
def full():
  return networks(reference.SD15_UNET, reference.SD_VAE, reference.CLIP_L_TEXT)


@pytest.fixture(scope='module')
def tiny():
  return networks(reference.TINY_UNET, reference.TINY_VAE, reference.TINY_TEXT)


def count_in_torch(f, *args):
  # Its counter does not know the attention kernel of CPUs.
  plain = sdpa_kernel(SDPBackend.MATH)
  with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
    f(*args)
  return counter.get_total_flops()


def test_full_size_networks_have_their_known_cost(full):
  giga = lambda operations: operations / 1e9
  assert giga(flops.unet_flops(full, (32, 32))) == pytest.approx(180.13, rel=5e-4)
  assert giga(flops.unet_flops(full, (64, 64))) == pytest.approx(803.37, rel=5e-4)
  assert giga(flops.encode_flops(full, 256)) == pytest.approx(272.72, rel=5e-4)
  assert giga(flops.text_flops(full)) == pytest.approx(13.30, rel=5e-4)


def test_networks_cost_what_pytorch_counts(tiny):
  # 32x48 latents are 1536 tokens, which a CPU would work through in padded blocks.
  latents, context = torch.zeros(1, 8, 32, 48), torch.zeros(1, 77, 24)
  unet = reference.unet(reference.TINY_UNET)
  assert flops.unet_flops(tiny, (32, 48)) == count_in_torch(unet, latents, 5, context)
  vae = reference.vae(reference.TINY_VAE)
  assert flops.encode_flops(tiny, 64) == count_in_torch(vae.encode, torch.zeros(1, 3, 64, 64))
  text_encoder = reference.text_encoder(reference.TINY_TEXT)
  ids = torch.zeros(1, 77, dtype=torch.long)
  assert flops.text_flops(tiny) == count_in_torch(text_encoder, ids)


def test_training_counts_the_unet_three_times(full):
  unet, text = flops.unet_flops(full, (32, 32)), flops.text_flops(full)
  encode = flops.encode_flops(full, 256)
  assert flops.training_flops(full, 256, latents=True) == 3 * unet + text
  assert flops.training_flops(full, 256, latents=False) == 3 * unet + text + 2 * encode
  adapters = flops.training_flops(full, 256, latents=True, trained_fraction=0)
  assert adapters == 2 * unet + text


def test_text_to_image_encodes_one_image(tiny):
  base = networks(
    {**reference.TINY_UNET, 'in_channels': 4}, reference.TINY_VAE, reference.TINY_TEXT
  )
  pixels = flops.training_flops(base, 64, latents=False)
  assert pixels - flops.training_flops(base, 64, latents=True) == flops.encode_flops(base, 64)


def test_a_gradient_costs_three_times_its_function():
  strided = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (2, 2), ((0, 1), (0, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  x = jax.ShapeDtypeStruct((2, 16, 16, 6), np.float32)
  w = jax.ShapeDtypeStruct((3, 3, 6, 10), np.float32)
  forward = flops.count(strided, x, w)
  assert forward == 2 * (2 * 8 * 8 * 10) * (3 * 3 * 6)
  gradient = jax.grad(lambda x, w: (strided(x, w) ** 2).sum(), (0, 1))
  assert flops.count(gradient, x, w) == 3 * forward


def test_groups_of_a_convolution_see_their_own_channels_only():
  conv = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=3
  )
  x = jax.ShapeDtypeStruct((1, 4, 4, 6), np.float32)
  w = jax.ShapeDtypeStruct((3, 3, 2, 12), np.float32)
  with torch.device('meta'):
    theirs = count_in_torch(torch.nn.Conv2d(6, 12, 3, padding=1, groups=3), torch.zeros(1, 6, 4, 4))
  assert flops.count(conv, x, w) == theirs


def test_batched_products_count_once_per_entry():
  product = lambda a, b: jnp.einsum('bnhc,bmhc->bhnm', a, b)
  a, b = (jax.ShapeDtypeStruct((2, n, 3, 5), np.float32) for n in (7, 11))
  assert flops.count(product, a, b) == 2 * 2 * 3 * 7 * 11 * 5


def test_operations_in_calls_count():
  @jax.custom_vjp
  def custom(x, w):
    return x @ w

  custom.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))
  assert flops.count(jax.jit(lambda x, w: jax.jit(custom)(x, w) @ w), X, W) == 2 * XW
  twice = jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)
  assert flops.count(lambda x, w: twice(x, w).sum(), X, W) == 2 * XW


def test_remat_counts_repeated_operations():
  f = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w).sum()
  plain, again = (flops.count(jax.grad(g, (0, 1)), X, W) for g in (f, jax.checkpoint(f)))
  assert plain == 6 * XW
  assert again == 8 * XW


def test_a_scan_counts_as_often_as_it_runs():
  f = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]
  assert flops.count(f, X, W) == 5 * XW


def test_a_cond_counts_as_its_largest_branch():
  f = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)
  assert flops.count(f, X, W) == 2 * XW


def test_products_in_a_while_loop_are_refused():
  loop = lambda body: (
    lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: body(x, w), x)
  )
  assert flops.count(loop(lambda x, w: x - 1), X, W) == 0
  with pytest.raises(ValueError, match='while loop'):
    flops.count(loop(jnp.matmul), X, W)


def test_kernels_are_refused():
  def kernel(x, out):
    out[...] = x[...] @ x[...]

  with pytest.raises(ValueError, match='pallas_call'):
    flops.count(lambda w: pl.pallas_call(kernel, out_shape=W)(w), W)


@pytest.mark.parametrize('tokens', [64, 1100])
def test_attention_in_blocks_counts_as_attention(tokens):
  q = jax.ShapeDtypeStruct((1, tokens, 2, 8), np.float32)
  forward = 2 * 2 * (2 * tokens * tokens * 8)
  assert flops.count(attend, q, q, q) == forward
  loss = lambda q, k, v: (attend(q, k, v) ** 2).sum()
  assert flops.count(jax.grad(loss, (0, 1, 2)), q, q, q) == 3 * forward


@pytest.mark.parametrize(
  ('kind', 'tera'),
  [
    ('TPU v3', 61.5),
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v5p', 459),
    ('TPU v6e', 918),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA H100 80GB HBM3', 989.4),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989.4),
    ('NVIDIA L4', 121),
    ('Tesla T4', 65),
    ('NVIDIA GeForce RTX 4090', 165.2),
  ],
)
def test_peaks_of_known_devices(kind, tera):
  assert flops.peak(types.SimpleNamespace(device_kind=kind)) == tera * 1e12


@pytest.mark.parametrize(
  'kind', ['cpu', 'NVIDIA L40S', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'TPU v9',
           'NVIDIA A100-SXM4-40GB MIG 1g.5gb'],
)  # fmt: skip
def test_an_unknown_device_has_no_peak(kind):
  assert flops.peak(types.SimpleNamespace(device_kind=kind)) is None
