"""Attention: every kernel gives PyTorch's numbers."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import print_saved_residuals
from torch_models import relative_error

from ip2p_jax import sharding
from ip2p_jax.config import TrainConfig
from ip2p_jax.config_check import check_values
from ip2p_jax.errors import InputError
from ip2p_jax.models.attention import attend, cudnn, dispatch, kernel_for, splash
from ip2p_jax.models.layers import REMATS
from ip2p_jax.planning import gpus

torch = peers.module('torch')


@pytest.mark.parametrize(
  ('tokens', 'keys', 'is_causal'),
  [(64, 77, False), (77, 77, True), (1024, 1024, False), (1100, 1000, False), (14000, 77, False)],
)
def test_attention_agrees_with_pytorch(tokens, keys, is_causal, rng):
  shapes = [(2, tokens, 2, 8), (2, keys, 2, 8), (2, keys, 2, 8)]
  q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
  ours = jax.jit(lambda q, k, v: attend(q, k, v, is_causal=is_causal))(q, k, v)
  heads_first = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
  theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=is_causal)
  assert relative_error(ours, theirs.transpose(1, 2)) <= 1e-6


def test_attention_can_be_differentiated_in_blocks(rng):
  q, k, v = (rng.standard_normal((1, 1030, 1, 8), np.float32) for _ in range(3))
  loss = lambda *qkv: (attend(*qkv) ** 2).sum()
  ours = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
  theirs = [torch.from_numpy(x).transpose(1, 2).requires_grad_() for x in (q, k, v)]
  (torch.nn.functional.scaled_dot_product_attention(*theirs) ** 2).sum().backward()
  for gradient, tensor in zip(ours, theirs, strict=True):
    assert relative_error(gradient, tensor.grad.transpose(1, 2)) <= 1e-5


def test_a_cpu_never_holds_all_scores_of_large_attention(rng):
  shape = jax.ShapeDtypeStruct((1, 4096, 8, 40), np.float32)
  memory = jax.jit(attend).lower(shape, shape, shape).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4096 * 4096 * 4  # scores of one of eight heads


# Kernels, by platform.


@pytest.mark.parametrize(
  ('device', 'queries', 'keys', 'width', 'dtype', 'kernel'),
  [
    (('tpu', 5.0), 1024, 1024, 40, 'bfloat16', 'splash'),
    (('tpu', 5.0), 4096, 4096, 80, 'float32', 'splash'),
    (('tpu', 5.0), 256, 256, 80, 'bfloat16', 'xla'),  # too short to be faster
    (('tpu', 5.0), 1024, 77, 40, 'bfloat16', 'xla'),  # no whole block of keys
    (('tpu', 5.0), 1000, 1000, 40, 'bfloat16', 'xla'),
    (('tpu', 4.0), 1024, 1024, 40, 'bfloat16', 'splash'),
    (('tpu', 3.0), 1024, 1024, 40, 'bfloat16', 'xla'),  # its matrix unit cannot run the kernel
    (('gpu', 9.0), 1024, 77, 40, 'bfloat16', 'cudnn'),
    (('gpu', 9.0), 256, 256, 160, 'float16', 'cudnn'),
    (('gpu', 8.0), 256, 256, 128, 'bfloat16', 'cudnn'),
    (('gpu', 8.0), 1024, 77, 80, 'bfloat16', 'cudnn'),
    (('gpu', 8.6), 289, 289, 64, 'bfloat16', 'cudnn'),  # 17 x 17, odd
    (('gpu', 8.0), 256, 256, 160, 'bfloat16', 'xla'),  # too wide before Hopper
    (('gpu', 10.0), 256, 256, 160, 'bfloat16', 'xla'),  # no gradients after Hopper
    (('gpu', 10.0), 1024, 77, 80, 'bfloat16', 'cudnn'),
    (('gpu', 12.0), 256, 256, 160, 'float16', 'xla'),
    (('gpu', 9.0), 1024, 77, 40, 'float32', 'xla'),
    (('gpu', 9.0), 40, 77, 64, 'bfloat16', 'xla'),
    (('gpu', 9.0), 1024, 1024, 36, 'bfloat16', 'xla'),
    (('gpu', 9.0), 1024, 1024, 40, 'float32', 'xla'),
    (('gpu', 9.0), 64, 64, 160, 'bfloat16', 'xla'),
    (('gpu', 7.5), 1024, 1024, 40, 'float16', 'xla'),
    (('cpu', 0.0), 4096, 4096, 40, 'bfloat16', 'xla'),
  ],
)
def test_the_table_picks_a_kernel_that_can_run(device, queries, keys, width, dtype, kernel):
  assert kernel_for(*device, queries, keys, width, dtype) == kernel


def test_a_requested_kernel_runs_at_any_length_if_it_can():
  assert kernel_for('gpu', 9.0, 64, 77, 40, 'bfloat16', 'cudnn') == 'cudnn'
  assert kernel_for('tpu', 5.0, 256, 256, 40, 'bfloat16', 'splash') == 'splash'
  assert kernel_for('tpu', 5.0, 256, 77, 40, 'bfloat16', 'splash') == 'xla'


def test_a_kernel_that_the_devices_lack_is_refused():
  with pytest.raises(InputError, match="'splash', which cpu does not have; use 'auto'"):
    dispatch('splash')
  with pytest.raises(InputError, match='use one of auto, xla, splash, cudnn'):
    dispatch('flash')
  assert dispatch('auto') is dispatch('xla') is attend


@pytest.mark.parametrize('capability', ['7.5', '8.0', '9.0', '10.0'])
def test_every_kernel_picked_for_a_gpu_has_gradients(capability, monkeypatch):
  """By jax's checks while it traces, without a GPU: odd tokens, wide heads, every dtype."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91200)
  device = types.SimpleNamespace(
    platform='gpu', device_kind=capability, compute_capability=capability
  )
  mesh = types.SimpleNamespace(devices=np.array([device]), size=1)
  choices = ('auto', 'cudnn') if capability != '7.5' else ('auto',)
  for choice, queries, keys, width, dtype in itertools.product(
    choices, (64, 289, 1024), (40, 77, None), (36, 40, 64, 160), ('bfloat16', 'float32')
  ):
    attention = dispatch(choice, mesh)
    shapes = [
      jax.ShapeDtypeStruct((2, tokens, 2, width), dtype)
      for tokens in (queries, keys or queries, keys or queries)
    ]
    loss = lambda *qkv, attention=attention: attention(*qkv).astype(jnp.float32).sum()
    with gpus.lowering_for(device):
      assert jax.eval_shape(attention, *shapes) == shapes[0]
      assert list(jax.eval_shape(jax.grad(loss, (0, 1, 2)), *shapes)) == shapes


def test_cudnn_is_refused_for_a_float32_run():
  settings = lambda dtype: TrainConfig(attention='cudnn', dtype=dtype)
  check_values(settings('bfloat16'))
  with pytest.raises(InputError, match="'cudnn', which does not compute in dtype='float32'"):
    check_values(settings('float32'))


@pytest.mark.parametrize(
  ('platform', 'kind', 'kernel', 'is_there'),
  [('tpu', 'TPU v3', 'splash', False), ('tpu', 'TPU v4', 'splash', True),
   ('tpu', 'TPU v5 lite', 'splash', True), ('tpu', 'TPU v6 lite', 'splash', True),
   ('tpu', 'TPU7x', 'splash', True), ('rocm', 'AMD Instinct', 'cudnn', False)],
)  # fmt: skip
def test_a_device_has_a_kernel_by_its_generation(monkeypatch, platform, kind, kernel, is_there):
  device = types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability='gfx942')
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  assert dispatch('auto') is not attend
  if is_there:
    dispatch(kernel)
  else:
    with pytest.raises(InputError, match=f"'{kernel}', which {kind} does not have"):
      dispatch(kernel)


def qkv(rng, shape, dtype):
  return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(3)]


def both_ways(rng, dtype, shape=(2, 256, 2, 40), mesh=None):
  """Outputs and gradients, of the TPU's kernel and of XLA in float32."""
  q, k, v = qkv(rng, shape, dtype)
  kernel = lambda *args: splash(*args, mesh=mesh, interpret=True)
  loss = lambda f: lambda *args: (f(*args).astype(jnp.float32) ** 2).sum()
  run = lambda f, *args: (jax.jit(f)(*args), *jax.jit(jax.grad(loss(f), (0, 1, 2)))(*args))
  exact = run(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
  return run(kernel, q, k, v), exact


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 2e-2)])
def test_the_tpu_kernel_gives_the_same_numbers(dtype, tolerance, rng):
  for ours, exact in zip(*both_ways(rng, dtype), strict=True):
    assert ours.dtype == dtype
    assert relative_error(ours.astype(jnp.float32), exact) <= tolerance


@pytest.mark.parametrize(
  ('queries', 'keys'),
  [(64, 77), (81, 81), (81, 78), (64, 64)],
  ids=['text', 'odd', 'odd queries', 'even'],
)
@pytest.mark.parametrize('devices', [1, 2])
def test_padding_of_odd_lengths_for_cudnn_has_no_effect(queries, keys, devices, rng, monkeypatch):
  """XLA computes instead of cuDNN, with the same lengths."""
  asked = []

  def plain(q, k, v, implementation, **lengths):
    asked.append((implementation, q.shape[1] % 2, k.shape[1] % 2, *map(len, lengths.values())))
    return jax_attention(q, k, v, implementation='xla', **lengths)

  jax_attention = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', plain)
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  q, k, v, out = (
    jnp.asarray(rng.standard_normal((4, count, 2, 8), np.float32))
    for count in (queries, keys, keys, queries)
  )
  run = lambda f: jax.jit(lambda *qkv: (lambda y, back: (y, *back(out)))(*jax.vjp(f, *qkv)))(
    q, k, v
  )
  for ours, exact in zip(run(lambda *qkv: cudnn(*qkv, mesh=mesh)), run(attend), strict=True):
    assert relative_error(ours, exact) <= 1e-5
  lengths = [4 // devices] * 2 if queries % 2 or keys % 2 else []  # of a device's own rows
  assert asked == [('cudnn', 0, 0, *lengths)]


def test_the_tpu_kernel_runs_inside_shard_map(rng):
  mesh = sharding.make_mesh(2)
  q, k, v = qkv(rng, (8, 128, 1, 16), 'float32')
  kernel = lambda *rows: splash(*rows, mesh=mesh, interpret=True)
  apart = sharding.each_its_rows(kernel, mesh, (sharding.ROWS,) * 3, sharding.ROWS)
  assert relative_error(jax.jit(apart)(q, k, v), attend(q, k, v)) <= 1e-5


@pytest.mark.parametrize('batch', [8, 3], ids=['shared', 'whole'])
def test_the_tpu_kernel_runs_over_a_mesh(batch, rng):
  mesh = sharding.make_mesh(2)
  for ours, exact in zip(*both_ways(rng, 'float32', (batch, 128, 1, 16), mesh), strict=True):
    assert relative_error(ours, exact) <= 1e-5


def test_remat_keeps_the_residuals_of_the_tpu_kernel(rng, capsys):
  q, k, v = qkv(rng, (1, 128, 1, 16), 'float32')
  layer = REMATS['convdot'](lambda q, k, v: splash(jnp.sin(q), k, v))
  print_saved_residuals(lambda *args: layer(*args).sum(), q, k, v)
  lines = capsys.readouterr().out.splitlines()
  residuals = [line.split()[0] for line in lines if 'output of' in line]
  assert residuals == ['f32[1,1,128,16]', 'f32[1,1,128]']  # the result, and the sums of its softmax
