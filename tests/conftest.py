import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# A new cache, without programs of other runs and workers.
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='ip2p-tests-')
# Eight devices; less optimisation, since tests compile far longer than they run.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  ]
)

# Tests of the miniature import its recipes by name.
sys.path.insert(0, str(Path(__file__).parent.parent / 'examples' / 'miniature'))

import fake_server
import jax
import numpy as np
import pytest

atexit.register(shutil.rmtree, os.environ['XDG_CACHE_HOME'], ignore_errors=True)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def ip2p(monkeypatch, capsys):
  """`ip2p(*words)` runs the command: (status, output)."""
  from ip2p_jax.cli import console, main

  monkeypatch.setattr(console, 'cache_compilations', lambda: None)

  def run(*words):
    monkeypatch.setattr(sys, 'argv', ['ip2p', *map(str, words)])
    with pytest.raises(SystemExit) as stop:
      main.main()
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out + printed.err

  return run


@pytest.fixture(scope='module')
def kept_programs(tmp_path_factory):
  """A cache of compiled programs for a test file: many of its runs compile the same programs."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache')))
  yield
  jax.config.update('jax_compilation_cache_dir', None)


@pytest.fixture
def visible(monkeypatch):
  """`visible(n)` sets how many of the eight devices a run sees; 1 at first."""
  every = jax.devices()

  def use(count):
    monkeypatch.setattr(jax, 'devices', lambda *_: every[:count])

  use(1)
  return use


@pytest.fixture
def fake(monkeypatch):
  """A fake server of captions; the client retries without waiting."""
  monkeypatch.setattr('ip2p_jax.captions.client.WAITS', (0.01, 0.02))
  with fake_server.running() as server:
    yield server
