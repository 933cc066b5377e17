"""PyTorch for tests; if it is not installed, each test that uses it is skipped.

torch = peers.module('torch')
DDPMScheduler = peers.module('diffusers').DDPMScheduler
"""

import importlib.util
import os

import pytest

HAS_TORCH = importlib.util.find_spec('torch') is not None

needs_torch = pytest.mark.skipif(not HAS_TORCH, reason='needs torch')


def module(name: str):
  """The module, or a `Missing` that skips the test that uses it."""
  return importlib.import_module(name) if HAS_TORCH else Missing(name)


class Missing:
  """A name of a package that is not installed. To use it in a test skips the test."""

  def __init__(self, name: str):
    self.__name__ = name

  def __getattr__(self, name: str) -> 'Missing':
    if name.startswith('__'):
      raise AttributeError(name)
    return Missing(f'{self.__name__}.{name}')

  def __call__(self, *args, **kwargs):
    if 'PYTEST_CURRENT_TEST' in os.environ:
      pytest.skip(f'needs {self.__name__}')
    return self

  # For types such as `int | torch.Tensor` at the top of a file.
  def __or__(self, other):
    return self

  __ror__ = __or__
