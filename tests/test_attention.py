"""Attention: the same numbers as PyTorch, whichever way they are computed."""

import jax
import numpy as np
import pytest
import torch
from torch_models import relative_error

from ip2p_jax.attention import attend


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
  for mine, other in zip(ours, theirs, strict=True):
    assert relative_error(mine, other.grad.transpose(1, 2)) <= 1e-5


def test_a_large_attention_never_holds_all_its_scores_on_a_cpu(rng):
  shape = jax.ShapeDtypeStruct((1, 4096, 8, 40), np.float32)
  memory = jax.jit(attend).lower(shape, shape, shape).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4096 * 4096 * 4  # one head's scores; all are eight times that
