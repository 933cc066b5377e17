"""Compiled programs are stored on disk, and damaged ones written again; errors are one line."""

import errno
import os
import subprocess
import sys

import pytest

from ip2p_jax.cli import console

# Compiles a program and stores it.
COMPILES = """
import jax
from ip2p_jax.cli.console import cache_compilations
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
cache_compilations()
jax.jit(lambda x: x @ x + 1, inline=False)(jax.numpy.ones((8, 8))).block_until_ready()
"""


def test_a_damaged_stored_program_is_written_again(tmp_path):
  def stderr():
    result = subprocess.run(
      [sys.executable, '-c', COMPILES], capture_output=True, text=True, check=True,
      env=os.environ | {'XDG_CACHE_HOME': str(tmp_path)},
    )  # fmt: skip
    return result.stderr

  stderr()
  stored = {file: file.read_bytes() for file in (tmp_path / 'ip2p-jax').iterdir()}
  assert stored
  for file, content in stored.items():
    file.write_bytes(content[: len(content) // 2])
  assert 'Error reading persistent compilation cache' in stderr()
  assert {file.name for file in (tmp_path / 'ip2p-jax').iterdir()} == {file.name for file in stored}
  assert stderr() == ''


def test_a_full_disk_is_one_line_that_says_what_to_do(capsys, monkeypatch):
  def full():
    raise OSError(errno.ENOSPC, 'No space left on device', 'out/a.png')

  monkeypatch.setattr(sys, 'argv', ['ip2p'])
  with pytest.raises(SystemExit, match='2'):
    console.run(full, 'ip2p')
  advice = 'make room, then run the same command again'
  assert capsys.readouterr().err == f'ip2p: error: out/a.png: No space left on device; {advice}.\n'
