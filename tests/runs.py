"""Helpers for training runs: train.py in other processes, kills, metrics, one visible device."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def command(config, workdir, **settings):
  """The command line of a run by configs/`config`."""
  flags = [f'--config.{key}={value}' for key, value in settings.items()]
  file = ROOT / 'configs' / config
  return [sys.executable, ROOT / 'train.py', f'--config={file}', f'--workdir={workdir}', *flags]


def environment(folder, devices=1):
  """Of a process; keeps compiled programs in `folder` for the next start."""
  return os.environ | {
    'XDG_CACHE_HOME': str(folder / 'cache'),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }


def stopped_by_sigterm(argv, env, stop=None):
  """Output of a run that gets SIGTERM at step 3, saves and ends."""
  stop = stop or (lambda process: process.send_signal(signal.SIGTERM))
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  with subprocess.Popen(argv, env=env, start_new_session=True, **pipes) as process:
    for line in process.stdout:
      if line.startswith('step 3/'):
        stop(process)
        break
    output, errors = process.communicate(timeout=300)
  assert process.returncode == 143 and 'Traceback' not in errors, errors
  return output


def kill_often(argv, env, times, after: Callable[[], None] = lambda: None):
  """Starts a run several times, and kills it after some steps and milliseconds."""
  moments = random.Random(0)
  for _ in range(times):
    stop_at = 4 + moments.randrange(8)
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE) as process:
      for count, _ in enumerate(line for line in process.stdout if line.startswith(b'step ')):
        if count == stop_at:
          time.sleep(moments.random() * 0.1)
          process.kill()
          break
    assert process.returncode == -signal.SIGKILL, 'ended before it could be killed'
    after()


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
