"""Compiled programs are kept on disk, and written again where they are damaged."""

import os
import subprocess
import sys

# Compiles a program that is kept.
COMPILES = """
import jax
from ip2p_jax.cli.console import cache_compilations
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
cache_compilations()
jax.jit(lambda x: x @ x + 1, inline=False)(jax.numpy.ones((8, 8))).block_until_ready()
"""


def test_a_kept_program_that_was_cut_short_is_written_anew(tmp_path):
  def said():
    done = subprocess.run(
      [sys.executable, '-c', COMPILES], capture_output=True, text=True, check=True,
      env=os.environ | {'XDG_CACHE_HOME': str(tmp_path)},
    )  # fmt: skip
    return done.stderr

  said()
  kept = {file: file.read_bytes() for file in (tmp_path / 'ip2p-jax').iterdir()}
  assert kept
  for file, content in kept.items():
    file.write_bytes(content[: len(content) // 2])
  assert 'Error reading persistent compilation cache' in said()
  assert {file.name for file in (tmp_path / 'ip2p-jax').iterdir()} == {file.name for file in kept}
  assert said() == ''
