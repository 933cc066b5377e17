"""PyTorch's random integers without PyTorch, bit for bit."""

import numpy as np
import peers
import pytest

from ip2p_jax.evaluation.torch_random import Generator

torch = peers.module('torch')

KNOWN = (  # of torch 2.13: manual_seed(0), randperm(10), then 8 times randint(0, 4, ())
  [4, 1, 7, 5, 3, 9, 0, 8, 6, 2],
  [3, 1, 2, 0, 3, 2, 0, 0],
)


@pytest.mark.parametrize('seed', [0, 1, 2**31, 2**32 - 1, 2**32 + 7])
def test_permutations_and_integers_are_torchs(seed):
  for count in (*range(20), 25, 500, 623, 624, 625, 15_651, 100_003):
    torch.manual_seed(seed)
    generator = Generator(seed)
    np.testing.assert_array_equal(generator.permutation(count), torch.randperm(count).numpy())
    for below in (1, 2, 3, 4, 1, 100, 2**20, 2**28 - 1):
      assert generator.integer(below) == torch.randint(0, below, ()).item()


def test_known_draws_need_no_torch():
  generator = Generator(0)
  assert generator.permutation(10).tolist() == KNOWN[0]
  assert [generator.integer(4) for _ in range(8)] == KNOWN[1]


def test_a_range_of_one_value_still_draws():
  first, second = Generator(3), Generator(3)
  assert first.integer(1) == 0
  second.integer(100)
  assert first.integer(2**20) == second.integer(2**20)


@pytest.mark.parametrize('below', [0, -1, 2**28])
def test_other_ranges_are_refused(below):
  with pytest.raises(ValueError, match='cannot draw'):
    Generator(0).integer(below)
