"""Programs compiled in a user's Python: XLA's alarms are left out, all other output stays."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_models
from alarms import ERROR, FOLDING, SLOW

from ip2p_jax import Editor, xla_alarms
from ip2p_jax.planning import compiler
from ip2p_jax.xla_alarms import left_out, quietly, without_alarms

WAIT = xla_alarms.SOONEST + 0.3


def alarmed(*extra):
  """A slow compiler, which writes the alarm among other lines."""
  time.sleep(WAIT)
  for text in (b'before\n', SLOW, ERROR, *extra, SLOW, b'after\n'):
    os.write(2, text)
  return 'compiled'


SHOWN = 'before\n' + ERROR.decode() + 'after\n'


def test_output_during_compilation_stays_except_alarms(capfd):
  was = os.fstat(2)
  print('first', file=sys.stderr)
  assert quietly(alarmed) == 'compiled'
  assert os.path.samestat(os.fstat(2), was)
  print('last', file=sys.stderr)
  assert capfd.readouterr().err == f'first\n{SHOWN}last\n'


def test_a_fast_program_starts_no_filter(monkeypatch):
  monkeypatch.setattr(xla_alarms, 'diverted', None)
  for _ in range(3):
    quietly(time.sleep, 0)
  time.sleep(WAIT)


def test_lines_of_other_threads_stay_in_order(capfd):
  """Several threads compile at overlapping times, while two write."""
  is_over, counts = threading.Event(), [0, 0]

  def write(i):
    while not is_over.is_set():
      os.write(2, f'{i} {counts[i]}\n'.encode())
      counts[i] += 1
      time.sleep(0.001)

  writers = [threading.Thread(target=write, args=(i,)) for i in range(2)]
  compilers = [threading.Thread(target=quietly, args=(alarmed,)) for _ in range(2)]
  for thread in writers + compilers:
    thread.start()
    time.sleep(0.2)
  for thread in compilers:
    thread.join()
  quietly(alarmed)
  is_over.set()
  for thread in writers:
    thread.join()
  lines = capfd.readouterr().err.splitlines()
  for i, count in enumerate(counts):
    assert [line for line in lines if line.startswith(f'{i} ')] == [
      f'{i} {n}' for n in range(count)
    ]
  assert len(lines) == sum(counts) + 3 * 3


def test_later_output_waits_for_a_slow_filter(capfd):
  with left_out():
    time.sleep(WAIT)
    process = xla_alarms._diversion.process
    process.send_signal(signal.SIGSTOP)
    os.write(2, b'before\n')
    threading.Timer(0.3, process.send_signal, [signal.SIGCONT]).start()
    later = threading.Timer(0.1, os.write, [2, b'meanwhile\n'])
    later.start()
  os.write(2, b'after\n')
  later.join()
  assert capfd.readouterr().err == 'before\nmeanwhile\nafter\n'


def test_all_output_is_shown_before_the_filter_ends(capfd):
  many = [b'line %d\n' % i for i in range(20_000)]  # more than a pipe holds
  quietly(alarmed, *many)
  assert capfd.readouterr().err == SHOWN.replace('after', b''.join(many).decode() + 'after')


RAISES = """
import os, sys, time
from ip2p_jax.xla_alarms import quietly
def compiles():
  time.sleep({wait})
  os.write(2, b'E1128 10:00:00.000000 7 xla.cc:1] the last words\\n')
  {end}
quietly(compiles)
"""


@pytest.mark.parametrize(
  ('end', 'status'), [("raise ValueError('refused')", 1), ('os.abort()', -6), ('os._exit(3)', 3)]
)
def test_the_last_output_of_a_process_is_shown(end, status):
  code = RAISES.format(wait=WAIT, end=end)
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == status
  lines = done.stderr.splitlines()
  assert lines[0].endswith('xla.cc:1] the last words')
  if status == 1:
    assert lines[1].startswith('Traceback') and lines[-1] == 'ValueError: refused'


def test_the_beginning_of_a_line_is_shown_before_its_end():
  """A progress bar has no end of line."""
  source, sink = os.pipe()
  lines = xla_alarms._lines(source, -1)
  os.write(sink, b'done\n 5%|')
  assert next(lines) == b'done\n' and next(lines) == b' 5%|'
  os.write(sink, b'###\n')
  os.close(sink)
  assert list(lines) == [b'###\n']
  os.close(source)


def test_a_redirection_of_stderr_by_other_code_stays(capfd, tmp_path):
  stderr = os.dup(2)
  with (tmp_path / 'log').open('w') as file, left_out():
    time.sleep(WAIT)
    os.write(2, b'ours\n')
    os.dup2(file.fileno(), 2)
  os.write(2, b'theirs\n')
  os.dup2(stderr, 2)
  os.close(stderr)
  assert capfd.readouterr().err == 'ours\n' and (tmp_path / 'log').read_text() == 'theirs\n'


@pytest.mark.parametrize('alone', [True, False])
def test_a_killed_or_missing_filter_stops_nothing(capfd, monkeypatch, alone):
  if alone:
    monkeypatch.setattr(sys, 'executable', '')
  with left_out():
    time.sleep(WAIT)
    if alone:
      os.write(2, b'shown\n')
    else:
      xla_alarms._diversion.process.kill()
      xla_alarms._diversion.process.wait()
  print('last', file=sys.stderr)
  assert capfd.readouterr().err == ('shown\nlast\n' if alone else 'last\n')


class Once:
  """The same attention, with alarms while it is traced."""

  def __init__(self, attention):
    self.attention, self.is_said = attention, False

  def __call__(self, *inputs):
    if not self.is_said:
      self.is_said = True
      alarmed()
    return self.attention(*inputs)


@pytest.mark.long
@pytest.mark.parametrize('progress', [None, lambda done, total: None])
def test_edits_from_python_leave_alarms_out(capfd, progress):
  loaded = Editor.from_checkpoint(tiny_models.checkpoint(tiny_models.ONE_LEVEL))
  networks = loaded.networks._replace(attention=Once(loaded.networks.attention))
  editor = Editor(networks, loaded.params, loaded.tokenizer)
  editor.edit(np.zeros((32, 32, 3), np.uint8), 'make it winter', steps=2, progress=progress)
  assert networks.attention.is_said
  assert capfd.readouterr().err == SHOWN


def test_compiling_for_an_absent_device_leaves_alarms_out(capfd):
  @dataclasses.dataclass
  class Lowered:
    def compile(self, options):
      return options, alarmed()

  assert compiler._compile(Lowered(), {'a': 1}) == ({'a': 1}, 'compiled')
  assert capfd.readouterr().err == SHOWN


@pytest.mark.parametrize('alarm', [SLOW, FOLDING])
@pytest.mark.parametrize('rest', [ERROR, b'a warning\nof two lines\n', b''])
def test_alarms_are_left_out_and_nothing_else(alarm, rest):
  lines = (rest + alarm + rest).splitlines(keepends=True)
  assert b''.join(without_alarms(lines)) == rest + rest


def test_an_error_amid_an_alarm_is_kept():
  lines = [*SLOW.splitlines(keepends=True)[:2], ERROR, b'more of it\n']
  assert b''.join(without_alarms(lines)) == ERROR + b'more of it\n'
