"""The compiled step: reused memory, types, exchanges between devices; and the report."""

import collections
import dataclasses
import importlib
import re
import signal
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.experimental import topologies

from ip2p_jax import sharding
from ip2p_jax.cli import main
from ip2p_jax.config import DataConfig, MeshConfig, TrainConfig
from ip2p_jax.config_text import load_config
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.planning import compiler, program_text, sampling, table, training
from ip2p_jax.planning.devices import GIB, describe
from ip2p_jax.training.step import is_donated

PROGRAM = """\
HloModule jit_step

%until (arg: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %less = pred[]{:T(512)} compare(%arg, %limit), direction=LT
}

%inner (arg: f32[4]) -> f32[4] {
  %x = f32[4]{0} fusion(%arg), backend_config={"estimated_cycles":"100"}
}

%body (arg: f32[4]) -> f32[4] {
  %part = f32[8]{0} all-gather(%arg), dimensions={0}, metadata={op_name="gather"}
  %x = f32[4]{0} fusion(%part), backend_config={"estimated_cycles":"10"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %again = f32[4]{0} while(%p), condition=%until, body=%inner
  %loop = f32[4]{0} while(%p), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %sum = (bf16[10,2]{1,0}, bf16[4]{0}) all-reduce(%a, %b), metadata={op_name="gradients"}
  %y = f32[4]{0} fusion(%loop), backend_config={"estimated_cycles":"7"}
}
"""


@pytest.fixture(scope='module')
def networks():
  return networks_of(tiny_models.checkpoint())


def settings(**changes):
  return TrainConfig(
    checkpoint='x', resolution=32, batch_size=16, data=DataConfig(path='x'), **changes
  )


def lower(networks):
  config = settings(mesh=MeshConfig(zero1=False))
  return training.lower_step(config, networks, sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope='module')
def lowered(networks):
  return lower(networks)


@pytest.mark.long
def test_the_new_state_reuses_the_memory_of_the_old(networks, monkeypatch):
  monkeypatch.setattr('ip2p_jax.training.step.is_donated', lambda mesh: True)  # as on all but CPUs
  step, state, shardings, _ = lower(networks)
  memory = step.compile().memory_analysis()
  held = sharding.bytes_per_device(state, shardings)
  assert memory.alias_size_in_bytes == held


@pytest.mark.parametrize(('platform', 'donates'), [('tpu', True), ('gpu', True), ('cpu', False)])
def test_the_state_is_donated_except_on_a_cpu(platform, donates):
  device = types.SimpleNamespace(platform=platform)
  mesh = types.SimpleNamespace(devices=np.array([device]))
  assert is_donated(mesh) == donates


def test_products_except_gradients_of_scores_are_in_bfloat16(lowered):
  """Scores are float32 for the softmax, and so are its gradients."""
  plan = re.findall(
    r'stablehlo\.(convolution|dot_general).*: \(tensor<([^>]*)>, tensor<([^>]*)>\)',
    lowered[0].as_text(),
  )
  assert len(plan) > 100
  wide = [one for one in plan if one[1].endswith('xf32')]
  is_of_scores = lambda sides: sides.count('x') == 4 and sides.startswith('16x4x')  # batch, heads
  assert [one for one in wide if one[0] == 'convolution' or not is_of_scores(one[1])] == []


def test_collectives_and_cycles_are_read_with_their_loops():
  gather, reduce = program_text.collectives_of(PROGRAM)
  assert gather == ('all-gather', 32, 5, 'gather')
  assert reduce == ('all-reduce', 48, 1, 'gradients')
  assert program_text.cycles_of(PROGRAM) == 5 * 10 + 3 * 100 + 7


@pytest.mark.parametrize(
  ('started', 'size'),
  [
    ('(f32[2]{0:T(128)}, f32[8]{0}) all-gather-start(', 32),
    ('((f32[2], bf16[1,3]), (f32[8]{0}, bf16[4,3]{1,0})) all-gather-start(', 32 + 24),
    ('(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(', 32),
    ('(f32[8], bf16[3]) all-reduce-start(', 32 + 6),
  ],
)
def test_a_started_collective_counts_its_results(started, size):
  program = f'ENTRY %main (p: f32[4]) -> f32[4] {{\n  %x = {started}%p), channel_id=1\n}}\n'
  assert [one.bytes for one in program_text.collectives_of(program)] == [size]


def test_a_report_names_the_source_of_collectives():
  rows = table.collective_rows(program_text.collectives_of(PROGRAM))
  assert rows[1] == ('all-reduce', '0.0 MB a device, 100% of gradients')


@pytest.mark.long
def test_devices_exchange_only_gradients_and_weights(networks):
  mesh = sharding.make_mesh(devices=jax.devices()[:4])
  config = settings(mesh=MeshConfig(zero1=True))
  step, state, *_ = training.lower_step(config, networks, mesh)
  plan = program_text.collectives_of(step.compile().as_text())
  weights = sum(x.size * 4 for x in jax.tree.leaves(state['params']))
  bytes_by = collections.Counter()
  for one in plan:
    bytes_by[one.kind] += one.bytes * one.times
  # Of every weight its gradient, and the few numbers of a report; activations would be kilobytes.
  assert weights <= bytes_by.pop('all-reduce') <= weights + 1024
  assert bytes_by.pop('all-gather') <= weights
  assert not bytes_by


def report(**changes):
  numbers = {
    'topology': 'v5e-16', 'devices': 16, 'device_batch': 64, 'parameters': 10**9,
    'state_bytes': 13 * GIB, 'frozen_bytes': GIB, 'analytic_flops': 35e12,
  }  # fmt: skip
  compiled = {
    'fits': True,
    'argument_bytes': 14 * GIB,
    'temporary_bytes': GIB,
  }
  compiled = compiler.Compiled(**compiled | {'bytes_accessed': 4e11} | changes)
  return training.training_report(training.TrainingPlan(**numbers, compiled=compiled), settings())


def test_a_report_has_a_verdict_and_the_best_time():
  text = report()
  assert text.startswith('v5e-16: fits') and '15.00 GiB, 94%' in text
  assert '488 ms' in text  # 4e11 bytes at 819 GB/s


def test_a_report_has_the_scheduled_time_if_jax_can_read_it():
  assert '1,000 ms, by the compiler' in report(cycles=1.5e9)
  assert 'unknown: libtpu is newer than this jax can read' in report(cycles=0.0)


def test_a_refused_program_is_one_sentence():
  class Lowered:
    def compile(self, options=None):
      raise RuntimeError('INTERNAL: Mosaic failed to compile\nand so on')

  with pytest.raises(
    InputError, match=r'refuses this program: INTERNAL: Mosaic failed to compile$'
  ):
    compiler.compiled_for_tpu(Lowered())


def test_a_report_gives_advice_if_a_step_does_not_fit():
  text = report(fits=False, problem='needs 20.0GiB of 15.7GiB')
  assert 'DOES NOT FIT: needs 20.0GiB' in text
  assert 'accumulation=2' in text and 'mesh.fsdp=4' in text and 'remat=full' in text
  assert '--quick' not in text
  assert 'less than that of --quick' in report(fits=False, problem='needs more', is_quick=True)


def test_a_quick_report_has_no_time():
  text = report(is_quick=True, cycles=0.0, bytes_accessed=0.0)
  assert text.count('unknown with --quick') == 2 and 'by FLOPs or bytes' not in text
  assert '15.00 GiB, 94%' in text


def test_a_missing_tpu_compiler_is_named(monkeypatch):
  def not_installed(*_, **__):
    raise RuntimeError('JAX TPU support not installed; cannot generate TPU topology.')

  monkeypatch.setattr(topologies, 'get_topology_desc', not_installed)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match="compiler is missing: pip install 'jax"):
    describe('v5e-8')


def test_an_interrupt_stops_the_compiler():
  class Lowered:
    def compile(self, options=None):
      main = threading.main_thread().ident
      threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGINT]).start()
      done.wait(30)

  done, began = threading.Event(), time.monotonic()
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
  with pytest.raises(KeyboardInterrupt):
    compiler.compiled_for_tpu(Lowered())
  signal.signal(signal.SIGINT, before)
  assert time.monotonic() - began < 10  # without waiting for the compiler
  done.set()


@pytest.mark.parametrize(
  ('change', 'message'),
  [('remat=blah', 'remat is'), ('steps=0', 'steps is 0'), ('conditioning_dropout=3.0', 'dropout')],
)
def test_wrong_settings_are_refused_before_compiling(change, message):
  pytest.importorskip('libtpu')
  with pytest.raises(InputError, match=message):
    training.settled(load_config('configs/train_256.py', [change]), 'v5e-4')


def test_a_resolution_must_fit_the_vae(networks):
  pytest.importorskip('libtpu')
  with pytest.raises(InputError, match='resolution is 30; use a multiple of 4'):
    training.plan_training(dataclasses.replace(settings(), resolution=30), networks, 'v5e-4')


def test_the_device_batch_decides_the_accumulation():
  pytest.importorskip('libtpu')
  config = dataclasses.replace(settings(), batch_size=64)
  assert training.settled(config, 'v5e-4', 8).accumulation == 2
  assert training.settled(config, 'v5e-8', 8).accumulation == 1
  for topology, device_batch in (('v5e-8', 16), ('v5e-8', 3), ('v5e-8', 0)):
    with pytest.raises(InputError, match='use a divisor of 8'):
      training.settled(config, topology, device_batch)
  with pytest.raises(InputError, match='128 devices x 1 accumulation'):
    training.settled(config, 'v5e-128')
  with pytest.raises(InputError, match='set batch_size to a multiple of 128'):
    training.settled(config, 'v5e-128', 1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--batch-size=4'], 'say --set resolution=256'),
    (['--of=edits', '--set=accumulation=2'], '--set: of no use with --of edits'),
    (['--of=edits', '--config=x.py', '--device-batch=2'], '--device-batch and --config'),
    (['--device-batch=2', '--set=accumulation=2'], 'leave one of them out'),
    (['--set=checkpoint=mine'], 'give it by --ckpt'),
  ],
)
def test_options_that_do_not_go_together_are_refused(options, message, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['ip2p', 'plan', '--topology=v5e-8', *options])
  with pytest.raises(SystemExit, match='2'):
    main.main()
  assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--topology=v5e'], 'use a slice such as v5e-16'),
    (['--config=none.py'], 'none.py'),
    (['--set=stepz=1'], 'stepz'),
    (['--set=steps=0'], 'steps is 0'),
    (['--set=resolution=100'], 'resolution is 100'),
    (['--ckpt=none'], 'none'),
    (['--of=edits', '--ckpt=none'], 'none'),
    (['--of=edits', '--size=100'], '--size is 100'),
    ([], "compiler is missing: pip install 'jax"),
  ],
)
def test_a_mistake_is_named_before_a_missing_compiler(options, message, capsys, monkeypatch):
  def not_installed(*_, **__):
    raise RuntimeError('JAX TPU support not installed; cannot generate TPU topology.')

  find = importlib.util.find_spec
  monkeypatch.setattr(topologies, 'get_topology_desc', not_installed)
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name)
  )
  monkeypatch.setattr(sys, 'argv', ['ip2p', 'plan', '--topology=v5e-8', *options])
  with pytest.raises(SystemExit, match='2'):
    main.main()
  assert message in capsys.readouterr().err


@pytest.mark.parametrize('name', ['v5e', 'v9-8', 'v5e:4', 'gpu', 'v4:2x2', 'v5e:2x2x2'])
def test_an_unknown_topology_is_named(name):
  with pytest.raises(InputError, match='use a slice such as v5e-16'):
    describe(name)


@pytest.mark.parametrize(
  ('name', 'devices'),
  [('v5e-1', 1), ('v3-8', 8), ('v4-8', 4), ('v5e-16', 16), ('v5p-64', 32), ('v6e-8', 8)],
)
def test_a_slice_has_its_number_of_devices(name, devices):
  pytest.importorskip('libtpu')
  assert sharding.make_mesh(devices=describe(name)).size == devices


def test_a_config_is_read_with_changes(tmp_path):
  file = tmp_path / 'config.py'
  file.write_text(
    'from ip2p_jax.config import TrainConfig\n\n\ndef get_config():\n  return TrainConfig()\n'
  )
  changes = ['mesh.fsdp=4', 'optimizer.learning_rate=1', 'dtype=float32', 'mesh.zero1=False']
  config = load_config(file, changes)
  assert (config.mesh.fsdp, config.optimizer.learning_rate) == (4, 1.0)
  assert (config.dtype, config.mesh.zero1) == ('float32', False)
  for change, message in (
    ('steps=3.5', 'steps takes a int'), ('mesh.fsdp', 'mesh.fsdp: has no'), ('stepz=1', 'stepz'),
  ):  # fmt: skip
    with pytest.raises(InputError, match=message):
      load_config(file, [change])
  with pytest.raises(InputError, match='no such file'):
    load_config(tmp_path / 'none.py')
  file.write_text('this is no Python')
  with pytest.raises(InputError, match=r'config.py: cannot be run \(SyntaxError'):
    load_config(file)


@pytest.mark.slow
def test_the_tpu_compiler_compiles_the_step(networks):
  pytest.importorskip('libtpu')
  plan = training.plan_training(settings(), networks, 'v5e-4')
  compiled = plan.compiled
  assert compiled.fits and plan.devices == 4 and plan.device_batch == 4
  assert compiled.alias_bytes >= plan.state_bytes  # narrow parts are rounded up to tiles
  reduced = sum(one.bytes * one.times for one in compiled.collectives if one.kind == 'all-reduce')
  assert reduced == pytest.approx(2 * plan.parameters, rel=0.01)  # gradients, in bfloat16
  assert compiled.flops > 0 and compiled.cycles > 0 and compiled.collectives
  assert jnp.isfinite(compiled.bytes_accessed)
  quick = training.plan_training(settings(), networks, 'v5e-4', is_quick=True)
  assert quick.compiled.collectives and quick.compiled.seconds < compiled.seconds
  assert quick.compiled.argument_bytes == compiled.argument_bytes
  assert 'time as scheduled         unknown with --quick' in training.training_report(
    quick, settings()
  )


@pytest.mark.slow
@pytest.mark.parametrize(('made', 'unet', 'more'), [
  ('edits', tiny_models.TINY_UNET, 1.2),
  ('pairs', tiny_models.TINY_UNET | {'in_channels': 4}, 1.008),  # CLIP is a hundred times as large
])  # fmt: skip
def test_the_tpu_compiler_compiles_edits_and_pairs(made, unet, more):
  pytest.importorskip('libtpu')
  networks = networks_of(tiny_models.checkpoint(unet))
  # 32 x 32 latents: the finest level has 1024 tokens, which get the kernel.
  work = sampling.Work(made, 128, 4, 4)
  with jax.default_matmul_precision('default'):  # no kernel takes the tests' 'highest'
    plan = sampling.plan_sampling(networks, work, 'v5e-4')
    longer = sampling.plan_sampling(networks, work._replace(steps=8), 'v5e-4')
  assert plan.compiled.fits and plan.devices == 4 and not plan.compiled.collectives
  assert 0 < plan.compiled.temporary_bytes < GIB
  # Loops count as often as they go round.
  assert longer.compiled.cycles > 1.2 * plan.compiled.cycles
  assert longer.analytic_flops > more * plan.analytic_flops
  text = sampling.sampling_report(plan)
  assert text.startswith('v5e-4: fits') and f'{made} an hour' in text


@pytest.mark.parametrize(('made', 'unet'), [
  ('edits', tiny_models.TINY_UNET),
  pytest.param('pairs', tiny_models.TINY_UNET | {'in_channels': 4}, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_planned_program_has_the_kernel_on_several_devices(made, unet):
  """Lowered for a TPU's devices; jax refuses here what it would refuse there."""
  pytest.importorskip('libtpu')
  networks = networks_of(tiny_models.checkpoint(unet))
  mesh = sampling.host_mesh('v5e-4')
  lowered, _ = sampling.lower_call(networks, sampling.Work(made, 128, 4, 2), mesh)
  assert 'tpu_custom_call' in lowered.as_text()


def test_a_batch_that_a_host_cannot_share_is_refused():
  pytest.importorskip('libtpu')
  assert sampling.work_on('v5e-16', 'pairs', 64, None, 2).batch == 4 * 8
  assert sampling.host_mesh('v5e-8').size == 8
  with pytest.raises(InputError, match='--batch-size is 6; use a multiple of the 4 devices'):
    sampling.work_on('v5e-16', 'pairs', 64, 6, 2)
