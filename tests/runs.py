"""Helpers for training runs: their metrics, and one visible device."""

import contextlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


def metrics(workdir):
  lines = [json.loads(line) for line in (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  return {line.pop('step'): line for line in lines}


@contextlib.contextmanager
def one_device():
  every = jax.devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *_: every[:1])
    yield
