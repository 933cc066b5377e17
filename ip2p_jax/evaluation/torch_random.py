"""PyTorch's random integers on a CPU, without PyTorch.

Published examples are often chosen by `torch.manual_seed`, `torch.randperm` and `torch.randint`.
PyTorch's CPU generator is the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), seeded as
`numpy.random.RandomState` is, whose stream numpy has frozen. Both functions take one output of
32 bits for each integer, and its remainder.
"""

import numpy as np

LIMIT = 1 << 28  # from here on, `torch.randint` takes two outputs for each integer


class Generator:
  """The generator after `torch.manual_seed(seed)`. All draws continue one stream."""

  def __init__(self, seed: int):
    self._state = np.random.RandomState(seed & 0xFFFFFFFF)  # the higher bits do not count

  def permutation(self, count: int) -> np.ndarray:
    """`torch.randperm(count)`: int64 [count]. Swaps each place with a later one, or itself."""
    order = np.arange(count)
    for i, drawn in enumerate(self._outputs(count - 1)):
      j = i + drawn % (count - i)
      order[i], order[j] = order[j], order[i]
    return order

  def integer(self, below: int) -> int:
    """`torch.randint(0, below, ()).item()`, for 1 to `LIMIT` - 1 values. It draws even for one."""
    if not 0 < below < LIMIT:
      raise ValueError(f'cannot draw an integer below {below}')
    return self._outputs(1)[0] % below

  def _outputs(self, count):
    """The next outputs, as integers from 0 to 2**32 - 1."""
    # `bytes` would take an output even for no byte.
    return np.frombuffer(self._state.bytes(4 * count), '<u4').tolist() if count > 0 else []
