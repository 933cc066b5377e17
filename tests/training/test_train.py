"""Whole runs: their files, how they end, and how they resume."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny_models
import tiny_pairs
import tiny_training as tiny
from PIL import Image
from runs import assert_same, metrics, one_device

from ip2p_jax import config, parameters
from ip2p_jax.config import DataConfig, LogConfig, LoraConfig, MeshConfig, OptimizerConfig
from ip2p_jax.editing import export
from ip2p_jax.errors import InputError
from ip2p_jax.pipeline.checkpoints import saved_steps
from ip2p_jax.pipeline.workdir import read, read_adapters, read_config
from ip2p_jax.training import train
from ip2p_jax.training.resume import claimed
from ip2p_jax.weights import averages, lora_file

pytestmark = pytest.mark.usefixtures('kept_programs', 'visible')

ROOT = Path(__file__).parents[2]
ROWS = 10


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A tiny editor, `checkpoint`, and a data set of ten pairs, `data`."""
  folder = tmp_path_factory.mktemp('training')
  tiny_models.write(folder / 'checkpoint', tiny.ONE_LEVEL)
  tiny_pairs.write_metadata(folder / 'data', ROWS)
  return folder


def a_config(folder, optim=None, log=None, data=None, **settings) -> config.TrainConfig:
  log = {'every': 2, 'checkpoint_every': 2, 'validate_every': 0, 'previews': 0} | (log or {})
  data = {'path': str(folder / 'data'), 'workers': 0} | (data or {})
  defaults = {'checkpoint': str(folder / 'checkpoint'), 'resolution': 32, 'batch_size': 4,
              'steps': 4, 'dtype': 'float32', 'mesh': MeshConfig()}  # fmt: skip
  return config.TrainConfig(
    **defaults | settings,
    optimizer=OptimizerConfig(**optim or {}),
    log=LogConfig(**log),
    data=DataConfig(**data),
  )


def weights_of(workdir, step=None, ema=False):
  tensors = read(workdir, ema=ema, step=step).tensors['unet']
  return {name: np.array(tensors[name]) for name in tensors}


@pytest.fixture(scope='module')
def uninterrupted(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  with one_device():
    assert train.train(a_config(folder), str(workdir)) == 0
  return workdir


@pytest.mark.long
def test_a_run_leaves_checkpoints_metrics_and_its_config(uninterrupted):
  assert saved_steps(uninterrupted) == [2, 4]
  lines = metrics(uninterrupted)
  assert list(lines) == [2, 4]
  assert {'loss', 'grad_norm', 'learning_rate', 'examples_per_second'} <= lines[4].keys()
  saved = read_config(uninterrupted)
  assert saved['batch_size'] == 4 and OptimizerConfig(**saved['optimizer']).b2 == 0.999
  assert not list(uninterrupted.rglob('*.tmp'))


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(folder, uninterrupted, tmp_path):
  train.train(a_config(folder, steps=2), str(tmp_path))
  train.train(a_config(folder, steps=4), str(tmp_path))
  for ema in (False, True):
    assert_same(weights_of(tmp_path, ema=ema), weights_of(uninterrupted, ema=ema))
  assert metrics(tmp_path)[4]['loss'] == metrics(uninterrupted)[4]['loss']


def test_a_finished_run_says_so_and_does_nothing(folder, uninterrupted, capsys):
  before = metrics(uninterrupted)
  assert train.train(a_config(folder), str(uninterrupted)) == 0
  assert 'already at step 4 of 4' in capsys.readouterr().out
  assert metrics(uninterrupted) == before


@pytest.mark.long
def test_a_run_resumes_without_its_start_on_other_devices(folder, uninterrupted, tmp_path, visible):
  train.train(a_config(folder, steps=2), str(tmp_path))
  visible(4)
  elsewhere = a_config(folder, checkpoint='/no/longer/there', mesh=MeshConfig(fsdp=2))
  train.train(elsewhere, str(tmp_path))
  begun = str(folder / 'checkpoint')
  assert read_config(tmp_path)['checkpoint'] == begun, 'it was begun with that one'
  ours, theirs = (weights_of(workdir) for workdir in (tmp_path, uninterrupted))
  for name in ours:
    np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, err_msg=name)


def test_the_average_is_exported(uninterrupted):
  average, live = weights_of(uninterrupted, ema=True), weights_of(uninterrupted)
  assert any((average[name] != live[name]).any() for name in live)
  assert averages.doubt(live, average) == ''  # what a real run makes is never taken for a merge


@pytest.mark.long
def test_changed_settings_are_reported(folder, uninterrupted, capsys, tmp_path):
  train.train(a_config(folder, steps=2), str(tmp_path))
  capsys.readouterr()
  train.train(a_config(folder, steps=3, optim={'learning_rate': 1e-5}), str(tmp_path))
  output = capsys.readouterr().out
  assert 'optimizer.learning_rate: 0.0001 -> 1e-05' in output
  # The first step of a start is also a log, and one line.
  assert output.count('step 3/3') == 1 and re.search(r'step 3/3 .* ready after', output)


@pytest.mark.long
def test_validation_and_previews_look_at_the_validation_split(folder, tmp_path):
  tiny_pairs.write_metadata(tmp_path / 'data' / 'train', 4)
  tiny_pairs.write_metadata(tmp_path / 'data' / 'validation', 3)
  log = {'every': 10, 'validate_every': 1, 'previews': 2, 'preview_steps': 2}
  config = a_config(folder, log=log, data={'path': str(tmp_path / 'data')}, steps=2)
  train.train(config, str(tmp_path / 'run'))
  for step in (1, 2):
    assert 0 < metrics(tmp_path / 'run')[step]['validation_loss'] < 10
  (file,) = (tmp_path / 'run' / 'previews').iterdir()
  with Image.open(file) as image:  # two rows of input, target and edit
    assert image.width > 3 * 32 and image.height > 2 * 32


@pytest.mark.long
def test_a_non_finite_loss_stops_the_run_and_saves_the_batch(folder, tmp_path):
  wild = a_config(folder, optim={'learning_rate': 1e30}, steps=10, log={'every': 10})
  with pytest.raises(InputError, match='step 2: the loss or a gradient is not finite') as stop:
    train.train(wild, str(tmp_path))
  (file,) = (tmp_path / 'failures').iterdir()
  assert str(file) in str(stop.value)
  with np.load(file) as result:
    assert len(result['losses']) == 4 and not np.isfinite(result['losses']).all()
    assert result['input_image'].shape == (4, 32, 32, 3) and result['timesteps'].shape == (4,)
  assert saved_steps(tmp_path) == [1]
  # Started again, it takes that very step first.
  with pytest.raises(InputError, match='step 2: the loss'):
    train.train(wild, str(tmp_path))


@pytest.mark.long
def test_broken_examples_are_named_skipped_and_limited(folder, tmp_path, capsys):
  tiny_pairs.write_metadata(tmp_path / 'data', 6)
  files = sorted((tmp_path / 'data' / 'pictures').iterdir())
  files[3].write_bytes(files[3].read_bytes()[:300])
  data = {'path': str(tmp_path / 'data'), 'max_corrupt': 1}
  # One broken row may be met once in every pass of the data.
  train.train(a_config(folder, data=data, steps=6, batch_size=3), str(tmp_path / 'run'))
  assert metrics(tmp_path / 'run')[2]['skipped'] == 1
  assert metrics(tmp_path / 'run')[6]['skipped'] == 3
  assert 'metadata.jsonl: line 2' in capsys.readouterr().err

  # Batches of nothing but broken examples, one in every pass, are in no mean.
  for file in files[:10]:
    file.write_bytes(b'no image')
  data = {'path': str(tmp_path / 'data'), 'max_corrupt': 100}
  log = {'every': 1, 'checkpoint_every': 1, 'keep': 9}
  train.train(a_config(folder, data=data, log=log, steps=4, batch_size=3), str(tmp_path / 'few'))
  lines = list(metrics(tmp_path / 'few').values())
  assert [('loss' in line, 'grad_norm' in line) for line in lines].count((False, False)) == 2
  assert all(line['loss'] > 0.1 for line in lines if 'loss' in line)
  assert lines[3]['skipped'] == 10
  empty = next(i for i, line in enumerate(lines) if 'loss' not in line and i)
  assert_same(*(weights_of(tmp_path / 'few', step) for step in (empty, empty + 1)))
  data = {'path': str(tmp_path / 'data'), 'max_corrupt': 1}

  with pytest.raises(InputError, match='broken examples, more than'):
    train.train(a_config(folder, data=data, steps=20, batch_size=3), str(tmp_path / 'run'))
  assert saved_steps(tmp_path / 'run')[-1] > 6, 'the work so far should be saved'


def test_passes_count_the_most_frequent_data_set():
  assert train._passes(50, [100], [2.0]) == 1
  assert train._passes(300, [100], [2.0]) == 3
  assert train._passes(1000, [10, 10_000], [9.0, 1.0]) == 90


@pytest.mark.long
def test_a_diverged_run_resumes_from_the_last_good_checkpoint(folder, tmp_path, capsys):
  workdir = str(tmp_path)
  at_rate = lambda rate, steps: a_config(
    folder, steps=steps, log={'every': 1, 'keep': 1}, optim={'learning_rate': rate}
  )
  train.train(at_rate(1e-4, 4), workdir)
  train.train(at_rate(1.0, 10), workdir)  # the loss grows to hundreds
  assert metrics(tmp_path)[10]['loss'] > 5 * metrics(tmp_path)[4]['loss']
  assert saved_steps(tmp_path) == [4, 10], 'the good one should stay though one is kept'
  with pytest.raises(InputError, match='The loss had grown from') as stop:
    train.train(at_rate(1e30, 20), workdir)
  assert 'after step 4 it was normal' in capsys.readouterr().out
  good, *spoilt = saved_steps(tmp_path)
  folder_name = tmp_path / 'checkpoints'
  remove = f'remove {", ".join(map(str, spoilt))} from {folder_name} to go on from step {good},'
  assert good == 4 and remove in str(stop.value)

  for step in spoilt:
    shutil.rmtree(folder_name / str(step))
  assert train.train(at_rate(1e-4, 8), workdir) == 0
  lines = metrics(tmp_path)
  assert list(lines) == list(range(1, 9))
  assert all(line['loss'] < 2 * lines[1]['loss'] for line in lines.values())
  assert saved_steps(tmp_path) == [6, 8], 'the newest, and the good one before it'


@pytest.mark.long
def test_lora_trains_adapters_and_exports_the_merged_editor(folder, tmp_path):
  adapting = dataclasses.replace(a_config(folder, steps=2), lora=LoraConfig(rank=2, alpha=3))
  train.train(adapting, str(tmp_path))
  adapters, result = read_adapters(tmp_path)
  assert result == LoraConfig(rank=2, alpha=3) and all('.lora_' in name for name in adapters)
  start = tiny.checkpoint().tensors['unet']
  trained = weights_of(tmp_path)
  moved = {name for name in start if (trained[name] != start[name]).any()}
  assert moved and all('attn' in name and 'to_' in name for name in moved)
  export.convert_checkpoint(tmp_path, tmp_path / 'out', 'lora', say=lambda text: None)
  shapes = parameters.flatten(tiny.networks().shapes['unet'])
  written, _ = lora_file.read(tmp_path / 'out', shapes)
  for name in adapters:
    np.testing.assert_allclose(written[name], adapters[name], rtol=1e-6)


@pytest.mark.long
def test_settings_that_saved_weights_depend_on_are_fixed(folder, tmp_path):
  adapting = dataclasses.replace(a_config(folder, steps=1), lora=LoraConfig(rank=2))
  train.train(adapting, str(tmp_path))
  louder = dataclasses.replace(adapting, lora=LoraConfig(rank=2, alpha=40), steps=2)
  with pytest.raises(InputError, match=r'lora\.alpha was 4'):
    train.train(louder, str(tmp_path))
  with pytest.raises(InputError, match="task was 'edit'"):
    train.train(dataclasses.replace(adapting, task='text_to_image'), str(tmp_path))
  other = dataclasses.replace(adapting, prediction_type='v_prediction', steps=2)
  with pytest.raises(InputError, match="prediction_type was 'epsilon'"):
    train.train(other, str(tmp_path))
  late = dataclasses.replace(
    adapting, steps=20, log=dataclasses.replace(adapting.log, profile=(1, 1))
  )
  with pytest.raises(InputError, match=r'profile is .1, 1., but this run is already at step 1'):
    train.train(late, str(tmp_path))
  saved = read_config(tmp_path)
  assert saved['lora']['alpha'] == 4 and saved['prediction_type'] == 'epsilon'


def test_a_second_run_in_the_same_workdir_is_refused(folder, tmp_path):
  with claimed(str(tmp_path)), pytest.raises(InputError, match='another run is writing'):
    train.train(a_config(folder), str(tmp_path))


def test_a_folder_with_other_files_is_no_workdir(folder, tmp_path):
  (tmp_path / 'photo.jpg').touch()
  with pytest.raises(InputError, match=r'holds photo\.jpg'):
    train.train(a_config(folder), str(tmp_path))
  with pytest.raises(InputError, match='is a file'):
    train.train(a_config(folder), str(tmp_path / 'photo.jpg'))
  assert [file.name for file in tmp_path.iterdir()] == ['photo.jpg']


def test_a_checkpoint_has_its_settings(uninterrupted):
  (file,) = (uninterrupted / 'checkpoints' / '4' / 'extras').glob('metadata')
  extras = json.loads(file.read_text())
  assert extras['examples'] == 16 and extras['config']['batch_size'] == 4


def test_damaged_arrays_are_one_sentence(folder, uninterrupted, tmp_path):
  shutil.copytree(uninterrupted, tmp_path / 'run')
  for file in (tmp_path / 'run' / 'checkpoints' / '4' / 'state').rglob('d/*'):
    file.unlink()
  with pytest.raises(InputError, match='damaged or incomplete'):
    train.train(a_config(folder, steps=6), str(tmp_path / 'run'))


@pytest.mark.long
def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  wild = a_config(folder, optim={'learning_rate': 1e30})
  with pytest.raises(InputError, match='not finite'):
    train.train(wild, '~/run')
  assert {'checkpoints', 'failures'} <= {path.name for path in (tmp_path / 'run').iterdir()}


@pytest.mark.long
def test_the_profiler_records_its_window_once(folder, tmp_path):
  log = {'profile': (3, 10)}  # longer than the run
  for steps in (4, 8):
    train.train(a_config(folder, log=log, steps=steps), str(tmp_path))
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.long
def test_a_text_to_image_model_gets_zero_input_channels(folder, tmp_path):
  four = tiny.ONE_LEVEL | {'in_channels': 4}
  tiny_models.write(tmp_path / 'base', four)
  base = str(tmp_path / 'base')
  still = a_config(folder, optim={'learning_rate': 0.0}, steps=1, checkpoint=base)
  train.train(still, str(tmp_path / 'run'))
  start = tiny_models.checkpoint(four).tensors['unet']
  weights = weights_of(tmp_path / 'run')
  np.testing.assert_array_equal(weights['conv_in.weight'][:, :4], start['conv_in.weight'])
  np.testing.assert_array_equal(weights['conv_in.bias'], start['conv_in.bias'])
  assert not weights['conv_in.weight'][:, 4:].any()

  text = a_config(folder, task='text_to_image', steps=1, checkpoint=base)
  train.train(text, str(tmp_path / 'text'))
  assert weights_of(tmp_path / 'text')['conv_in.weight'].shape[1] == 4


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'batch_size': 5, 'accumulation': 2}, 'batch_size is 5'),
    ({'resolution': 30}, 'resolution is 30; this VAE takes multiples of 4'),
    ({'checkpoint': '/no/such'}, '/no/such: no such file or folder'),
    ({'data': {'path': '/no/such'}}, '/no/such: no such data set'),
    ({'data': {'path': ''}}, 'data.path is empty'),
    ({'mesh': MeshConfig(fsdp=3)}, 'mesh.fsdp is 3'),
    ({'task': 'text_to_image'}, 'is not a text-to-image model'),
    ({'remat': 'some'}, 'remat is .some.; use one of none, convdot, full'),
    ({'optim': {'rates': (('atn', 1.0), ('', 0.0))}}, 'optimizer.rates'),
    ({'steps': 0}, 'steps is 0; use 1 or more'),
    ({'seed': 2**70}, 'seed is 1180591620717411303424; use at most'),
    ({'min_snr_gamma': float('nan')}, 'min_snr_gamma is nan'),
    ({'optim': {'rates': (('', 1.0), ('attn', 0.0))}}, "rule 'attn' does nothing"),
    ({'optim': {'decays': (('', 1.0), ('attn', 0.0))}}, "decays: rule 'attn' does nothing"),
    ({'lora': LoraConfig(alpha=8.0)}, 'lora.alpha is 8.0, which does nothing'),
    ({'log': {'profile': (9, 1)}}, 'log.profile begins at step 9'),
    ({'attention': 'splash'}, "attention is 'splash'"),
  ],
)
def test_mistakes_are_one_sentence_and_leave_nothing_behind(folder, tmp_path, settings, message):
  with pytest.raises(InputError, match=message):
    train.train(a_config(folder, **settings), str(tmp_path / 'run'))
  assert not list((tmp_path / 'run').rglob('*.json*'))


def test_a_workdir_of_another_kind_of_run_is_refused(folder, uninterrupted):
  adapting = dataclasses.replace(a_config(folder, steps=6), lora=LoraConfig(rank=2))
  with pytest.raises(InputError, match=r'lora\.rank'):
    train.train(adapting, str(uninterrupted))


def command(folder, workdir, **settings):
  flags = {'checkpoint': folder / 'checkpoint', 'data.path': folder / 'data', 'resolution': 32,
           'batch_size': 4, 'log.previews': 0} | settings  # fmt: skip
  return runs.command('tiny.py', workdir, **flags)


@pytest.mark.long
def test_sigterm_writes_a_checkpoint_and_the_run_goes_on(folder, tmp_path):
  argv = command(folder, tmp_path, steps=100_000, **{'log.every': 1, 'log.checkpoint_every': 10**6})
  output = runs.stopped_by_sigterm(argv, runs.environment(folder))
  assert 'and saved; run the same command to go on' in output
  (step,) = saved_steps(tmp_path)
  assert step >= 3


@pytest.mark.long
def test_sigterm_to_the_process_group_still_saves(folder, tmp_path):
  endless = {'steps': 100_000, 'log.every': 1, 'log.checkpoint_every': 10**6, 'data.workers': 2}
  argv = command(folder, tmp_path, **endless)
  to_all = lambda process: os.killpg(process.pid, signal.SIGTERM)
  runs.stopped_by_sigterm(argv, runs.environment(folder), to_all)
  assert len(saved_steps(tmp_path)) == 1


@pytest.mark.parametrize('mistake, hint', [
  ('optimizer.learning_rat=1', 'did you mean --config.optimizer.learning_rate?'),
  ('optimizer.lr=1', 'did you mean --config.optimizer.learning_rate?'),
  ('stepz=3', 'did you mean --config.steps?'),
  ('steps=many', '--config.steps=many'),
])  # fmt: skip
def test_a_typo_on_the_command_line_names_the_nearest_setting(folder, tmp_path, mistake, hint):
  argv = [*command(folder, tmp_path), f'--config.{mistake}']
  done = subprocess.run(argv, env=runs.environment(folder), capture_output=True, text=True)
  assert done.returncode == 2
  assert hint in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(folder, tmp_path):
  settings = {'steps': 200, 'log.every': 1, 'log.checkpoint_every': 4, 'log.keep': 2}
  argv = lambda name: command(folder, tmp_path / name, **settings)
  devices = runs.environment(folder, devices=2)
  subprocess.run(argv('whole'), env=devices, check=True, capture_output=True)

  unfinished = []
  checkpoints = tmp_path / 'killed' / 'checkpoints'
  look = lambda: unfinished.extend(checkpoints.glob('*orbax-checkpoint-tmp*'))
  runs.kill_often(argv('killed'), devices, times=10, after=look)
  assert unfinished, 'no kill came while a checkpoint was being written'
  subprocess.run(argv('killed'), env=devices, check=True, capture_output=True)
  for ema in (False, True):
    assert_same(weights_of(tmp_path / 'killed', ema=ema), weights_of(tmp_path / 'whole', ema=ema))
  losses = lambda name: {step: line['loss'] for step, line in metrics(tmp_path / name).items()}
  assert losses('killed') == losses('whole')


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'fsdp'), [(2, 1), (2, 8), (4, 4)])
def test_several_processes_take_the_steps_of_one(folder, tmp_path, processes, fsdp):
  tiny_pairs.write_metadata(tmp_path / 'data' / 'train', ROWS)
  tiny_pairs.write_metadata(tmp_path / 'data' / 'validation', 3)
  settings = {'steps': 20, 'log.every': 1, 'batch_size': 8, 'data.path': tmp_path / 'data',
              'log.validate_every': 20, 'log.previews': 2, 'log.preview_steps': 2}  # fmt: skip
  one = command(folder, tmp_path / 'one', **settings)
  subprocess.run(one, env=runs.environment(folder), check=True, capture_output=True)
  two = command(folder, tmp_path / 'two', **settings, **{'mesh.fsdp': fsdp})
  outputs = run_together(two, folder, processes)
  assert f'in {processes} processes' in outputs[0]
  assert not any(outputs[1:]), 'all but the first should be quiet'
  losses = lambda name: [line['loss'] for line in metrics(tmp_path / name).values()]
  one, two = np.array(losses('one')), np.array(losses('two'))
  assert len(two) == 20 and two[0] == pytest.approx(one[0], rel=1e-6)
  np.testing.assert_allclose(two, one, rtol=1e-4)
  last = [metrics(tmp_path / name)[20]['validation_loss'] for name in ('one', 'two')]
  assert last[1] == pytest.approx(last[0], rel=1e-4)
  images = [Image.open(next((tmp_path / name / 'previews').iterdir())) for name in ('one', 'two')]
  difference = np.subtract(*(np.asarray(image, int) for image in images))
  assert abs(difference).mean() < 1


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_and_stops_both(folder, tmp_path):
  endless = {'steps': 100_000, 'log.every': 1, 'log.checkpoint_every': 10**6, 'batch_size': 8}
  processes = start_together(command(folder, tmp_path, **endless), folder)
  for line in processes[0].stdout:
    if line.startswith('step 3/'):
      processes[1].send_signal(signal.SIGTERM)
      break
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [143, 143], outputs
  assert 'and saved; run the same command to go on' in outputs[0][0]
  assert len(saved_steps(tmp_path)) == 1


def start_together(argv, folder, count=2):
  """Processes that share eight devices."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  cluster = [f'--coordinator=localhost:{port}', f'--num_processes={count}']
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  argvs = [[*argv, *cluster, f'--process_id={i}'] for i in range(count)]
  env = runs.environment(folder, devices=8 // count)
  return [subprocess.Popen(argv, env=env, **pipes) for argv in argvs]


def run_together(argv, folder, count):
  """The output of each of several processes."""
  processes = start_together(argv, folder, count)
  outputs = [process.communicate(timeout=300 * count) for process in processes]  # all compile
  assert [process.returncode for process in processes] == [0] * count, outputs
  # Gloo prints a greeting.
  without_gloo = lambda text: [line for line in text.splitlines() if not line.startswith('[Gloo]')]
  return ['\n'.join(without_gloo(out)) for out, _ in outputs]
