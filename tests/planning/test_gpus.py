"""Plans for NVIDIA GPUs: names, memory, kernels of a program; and the GPU compiler itself."""

import collections
import sys
import types

import pytest
import tiny_models
from jax._src.cudnn import fused_attention_stablehlo

from ip2p_jax.cli import main
from ip2p_jax.config import DataConfig, TrainConfig
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.planning import compiler, gpus, program_text, sampling, training
from ip2p_jax.planning.devices import GIB, chip_of, describe, peak_of
from ip2p_jax.training import flops

PROGRAM = """\
HloModule jit_step

%scaled (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %inside = f32[4]{0} multiply(%p.1, %p.1)
}

%body (arg: (s32[], f32[4])) -> (s32[], f32[4]) {
  %arg = (s32[], f32[4]{0}) parameter(0)
  %part = f32[4]{0} get-tuple-element(%arg), index=1
  %x = f32[4]{0} fusion(%part), kind=kLoop, calls=%scaled
  %found = (bf16[8]{0}, s8[99]{0}) custom-call(%x, %part), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %again = (s32[], f32[4]{0}) tuple(%count, %x)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %y = bf16[8]{0} custom-call(%p), custom_call_target="__cublas$lt$matmul"
  %loop = (s32[], f32[4]{0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %z = f32[4]{0} copy(%p)
}
"""


def settings(**changes):
  defaults = {'resolution': 68, 'batch_size': 16, 'data': DataConfig(path='x')}
  return TrainConfig(checkpoint='x', **defaults | changes)


def test_bytes_count_kernels_as_often_as_they_run():
  in_loop = (16 + 16) + (16 + 16 + 16)  # the fusion, and the call, of two arrays to one
  assert program_text.bytes_moved(PROGRAM) == 5 * in_loop + (16 + 16) + (16 + 16)


def test_calls_of_libraries_are_counted_by_name():
  assert program_text.kernels_of(PROGRAM) == {'__cudnn$fmhaSoftmax': 1, '__cublas$lt$matmul': 1}


@pytest.mark.parametrize(
  ('name', 'count', 'gib', 'tera'),
  [
    ('a100-40', 1, 39.4, 312), ('a100-80', 1, 79.3, 312), ('a6000', 1, 47.5, 154.8),
    ('h100', 1, 79.1, 989.4), ('h200', 1, 141.0, 989.4), ('b200', 1, 178.4, 2250),
    ('h100x8', 8, 79.1, 989.4), ('a100-40x16', 16, 39.4, 312),
  ],
)  # fmt: skip
def test_gpus_are_known_by_name_and_number(name, count, gib, tera):
  assert gpus.is_gpu(name) and gpus.parse(name)[1] == count
  chip = chip_of(name)
  assert chip.memory / GIB == pytest.approx(gib, abs=0.05)
  assert peak_of(name) == tera * 1e12 == flops.peak_of_kind(chip.kind)


@pytest.mark.parametrize('name', ['h100x0', 'h100x17', 'h100-8', 'h100x', 'h1000', 'a100-40:2x2'])
def test_more_gpus_than_one_host_has_are_refused(name):
  with pytest.raises(InputError, match=r'use a100-40.*or several on one host, such as h100x8'):
    describe(name)


@pytest.mark.parametrize('name', ['gpu', 'a100', 'rtx'])
def test_an_unknown_name_lists_the_gpus(name):
  with pytest.raises(InputError, match='or GPUs of one host: one of a100-40, a100-80, a6000, h100'):
    describe(name)


def test_a_missing_gpu_compiler_is_named(monkeypatch):
  monkeypatch.setattr(gpus.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=r"GPU compiler is missing: pip install 'jax\[cuda13\]'"):
    describe('h100')


def test_a_compiler_of_another_version_is_named(monkeypatch):
  monkeypatch.setattr(gpus.importlib.util, 'find_spec', lambda name: True)
  monkeypatch.setattr(
    gpus.topologies, 'get_topology_desc', lambda **_: (_ for _ in ()).throw(ValueError('no such'))
  )
  with pytest.raises(InputError, match=r'does not start \(no such\); install jax and'):
    describe('h100')


def test_quick_is_refused_for_gpus(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['ip2p', 'plan', '--quick', '--topology=h100x8'])
  with pytest.raises(SystemExit, match='2'):
    main.main()
  assert '--quick: of no use with h100x8' in capsys.readouterr().err


@pytest.mark.parametrize('major', [8, 9])
def test_cudnn_checks_are_patched_only_while_lowering(major):
  before = fused_attention_stablehlo.check_compute_capability
  with gpus.lowering_for(types.SimpleNamespace(platform='gpu', compute_capability=f'{major}.0')):
    check = fused_attention_stablehlo.check_compute_capability
    assert check('8.0') and check('9.0') == (major == 9) and not check('10.0')
  assert fused_attention_stablehlo.check_compute_capability is before


def report(gibibytes):
  """The report of a step that needs so much on an A100 of 39.4 GiB."""
  memory = types.SimpleNamespace(
    argument_size_in_bytes=13 * GIB, temp_size_in_bytes=(gibibytes - 14) * GIB,
    output_size_in_bytes=13 * GIB, alias_size_in_bytes=12 * GIB,
  )  # fmt: skip
  program = types.SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: PROGRAM)
  lowered = types.SimpleNamespace(compile=lambda options: program)
  compiled = compiler.compiled_for('a100-40', lowered)
  plan = training.TrainingPlan('a100-40', 1, 64, 10**9, 12 * GIB, GIB, 500e12, compiled)
  return training.training_report(plan, settings(batch_size=1024, accumulation=16))


def test_a_report_names_the_memory_share_for_jax():
  text = report(29)
  assert text.startswith('a100-40: fits\n') and '29.00 GiB, 74%; JAX takes 75% by default' in text
  assert '1603 ms, by FLOPs or bytes' in text  # 500 T at 312 T/s
  assert '1 __cublas$lt$matmul, 1 __cudnn$fmhaSoftmax' in text
  assert 'scheduled' not in text and ' compiled,' not in text
  assert 'set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, since JAX takes 75%' in report(32)
  assert 'Tight' in report(36) and 'Tight' not in report(32)


def test_a_report_compares_needed_and_available_memory():
  text = report(37)
  assert text.startswith('a100-40: DOES NOT FIT: needs 37.00 GiB of 39.42 GiB')
  assert 'accumulation=32' in text and 'temporary' in text


# The compiler itself.


@pytest.fixture(scope='module')
def networks():
  return networks_of(tiny_models.checkpoint())


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['a100-40', 'h100x2'])
def test_the_gpu_compiler_compiles_a_step_with_odd_tokens(topology, networks, monkeypatch):
  """17 x 17 tokens, 77 of text: gradients of cuDNN's attention need even numbers."""
  pytest.importorskip('jax_cuda13_plugin', reason="pip install 'jax[cuda13]'")
  texts = []
  read = compiler.kernels_of
  monkeypatch.setattr(compiler, 'kernels_of', lambda text: texts.append(text) or read(text))
  plan = training.plan_training(settings(), networks, topology)
  compiled, devices = plan.compiled, plan.devices
  assert compiled.fits and compiled.alias_bytes == plan.state_bytes
  kernels = compiled.kernels
  attentions = 6  # three blocks attend to themselves and to the text
  assert kernels['__cudnn$fmhaSoftmax'] == kernels['__cudnn$fmhaSoftmaxBackward'] == attentions
  assert f's32[{16 // devices}]' in texts[0] and 's32[16]{0}) custom-call' not in texts[0]
  moved = collections.Counter()
  for collective in compiled.collectives:
    moved[collective.kind] += collective.bytes * collective.times
  if devices > 1:  # gradients, in bfloat16: whole, or to each device its part
    gradients = moved.pop('all-reduce') + devices * moved.pop('reduce-scatter')
    assert gradients == pytest.approx(2 * plan.parameters, rel=0.02)
    assert moved.pop('all-gather') <= 4 * plan.parameters and not moved  # weights
  else:
    assert not compiled.collectives
  assert compiled.bytes_accessed > compiled.argument_bytes
  assert f'{topology}: fits' in training.training_report(plan, settings())


@pytest.mark.slow
@pytest.mark.parametrize(
  ('made', 'unet'),
  [('edits', tiny_models.TINY_UNET), ('pairs', tiny_models.TINY_UNET | {'in_channels': 4})],
)
def test_the_gpu_compiler_compiles_edits_and_pairs(made, unet):
  pytest.importorskip('jax_cuda13_plugin', reason="pip install 'jax[cuda13]'")
  networks = networks_of(tiny_models.checkpoint(unet))
  plan_of = lambda steps: sampling.plan_sampling(
    networks, sampling.Work(made, 64, 2, steps), 'a6000x2'
  )
  # 64 px are 16 x 16 latents, whose attention is cuDNN's.
  plan, longer = plan_of(4), plan_of(8)
  assert plan.compiled.fits and not plan.compiled.collectives
  assert plan.compiled.kernels['__cudnn$fmhaSoftmax'] and plan.compiled.bytes_accessed
  assert longer.compiled.bytes_accessed > 1.01 * plan.compiled.bytes_accessed
  text = sampling.sampling_report(plan)
  assert text.startswith('a6000x2: fits') and '2 of 47.54 GiB' in text and f'{made} an hour' in text
