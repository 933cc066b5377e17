"""A run's checkpoints: complete after a kill at any time, and readable on any devices."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from ip2p_jax import parameters, sharding, storage, weights
from ip2p_jax.config import LoraConfig
from ip2p_jax.editing.editor import Editor
from ip2p_jax.editing.export import convert_checkpoint
from ip2p_jax.errors import InputError
from ip2p_jax.models import lora
from ip2p_jax.pipeline.checkpoints import Checkpoints, _part_of, read_part, saved_steps
from ip2p_jax.pipeline.networks import networks_of
from ip2p_jax.pipeline.workdir import (
  differences,
  is_workdir,
  load,
  load_base,
  read,
  read_adapters,
  read_config,
  save_base,
  write_config,
)

ADAMW = optax.chain(optax.identity(), optax.adamw(1e-3))


def state_of(params, step=1):
  ema = {name: value + 1 for name, value in params.items()}
  return {
    'step': jnp.int32(step),
    'params': params,
    'ema': ema,
    'opt_state': ADAMW.init(params),
    'skipped': jnp.int32(7),
    'bad_step': jnp.int32(-1),
  }


def small_params(rng, **shapes):
  shapes = shapes or {'conv_in.kernel': (3, 3, 8, 64), 'mid_block.0.norm.scale': (64,)}
  return {name: jnp.asarray(rng.standard_normal(s, np.float32)) for name, s in shapes.items()}


def placed(state, devices, fsdp):
  mesh = sharding.make_mesh(fsdp, jax.devices()[:devices])
  return jax.device_put(state, sharding.of_state(mesh, state, zero1=True))


def target_of(state):
  as_target = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  return jax.tree.map(as_target, state)


def saved(workdir, state, step=1, extras=None):
  run = Checkpoints(workdir)
  run.save(step, state, extras or {})
  run.close()


def restored(workdir, target):
  run = Checkpoints(workdir)
  result = run.restore(target)
  run.close()
  return result


def assert_same(tree, wanted):
  assert jax.tree.structure(tree) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# Checkpoints


def test_a_saved_state_is_restored_exactly(tmp_path, rng):
  state = state_of(small_params(rng))
  saved(tmp_path, state, 3, {'seconds': 1.5, 'note': 'ä'})
  result, extras = restored(tmp_path, target_of(state))
  assert_same(result, state)
  assert extras == {'seconds': 1.5, 'note': 'ä'}


def test_a_workdir_without_checkpoints_has_nothing_to_restore(tmp_path, rng):
  assert restored(tmp_path / 'new', target_of(state_of(small_params(rng)))) is None


def test_a_saved_state_may_be_donated_at_once(tmp_path, rng):
  state = state_of(small_params(rng, **{'a.kernel': (1000, 1000)}))
  wanted = jax.tree.map(np.array, state)
  scramble = jax.jit(lambda s: jax.tree.map(lambda x: -3 * x - 1, s), donate_argnums=0)
  run = Checkpoints(tmp_path)
  run.save(1, state, {})
  for _ in range(5):
    state = scramble(state)
  run.close()
  assert_same(restored(tmp_path, target_of(state))[0], wanted)


def test_the_newest_stay_and_saving_twice_is_no_error(tmp_path, rng):
  run = Checkpoints(tmp_path, keep=2)
  state = state_of(small_params(rng))
  for step in (1, 2, 2, 3):
    run.save(step, state, {'step': step})
  run.wait()
  run.save(3, state, {'step': 'again'})
  assert run.latest_step() == 3
  run.close()
  assert saved_steps(tmp_path) == [2, 3]
  assert restored(tmp_path, target_of(state))[1] == {'step': 3}


def test_a_good_checkpoint_stays_among_newer_ones(tmp_path, rng):
  run = Checkpoints(tmp_path, keep=2)
  state = state_of(small_params(rng))
  for step, good in ((1, None), (2, 1), (3, 1), (4, 1), (5, 1)):
    run.save(step, state, {}, good)
  assert run.steps() == [1, 4, 5]
  run.save(6, state, {}, good=5)
  run.close()
  assert saved_steps(tmp_path) == [5, 6]


@pytest.mark.parametrize(
  'meshes', [[(8, 1), (1, 1), (4, 1)], [(8, 1), (8, 4), (8, 2)], [(4, 4), (8, 8), (2, 1)]], ids=str
)
def test_a_run_goes_on_with_other_devices(tmp_path, rng, meshes):
  wanted = state_of(small_params(rng))
  state = placed(wanted, *meshes[0])
  for step, mesh in enumerate(meshes[1:]):
    saved(tmp_path, state, step + 1)
    target = target_of(placed(wanted, *mesh))
    state, _ = restored(tmp_path, target)
    assert_same(state, wanted)
    wanted_shardings, shardings = (
      jax.tree.map(lambda x: x.sharding, tree) for tree in (target, state)
    )
    assert shardings == wanted_shardings


def test_half_written_files_are_ignored_and_deleted(tmp_path, rng):
  state = state_of(small_params(rng))
  saved(tmp_path, state, 1)
  full, part = tmp_path / 'checkpoints/1', tmp_path / 'checkpoints/9.orbax-checkpoint-tmp'
  subprocess.run(['cp', '-r', full, part], check=True)
  (part / 'state' / 'manifest.ocdbt').unlink()
  assert saved_steps(tmp_path) == [1]
  run = Checkpoints(tmp_path)
  assert run.latest_step() == 1
  run.save(2, state, {})
  run.close()
  assert {path.name for path in (tmp_path / 'checkpoints').iterdir()} == {'1', '2'}


def test_a_damaged_checkpoint_is_named(tmp_path, rng):
  state = state_of(small_params(rng))
  saved(tmp_path, state, 5)
  for file in (tmp_path / 'checkpoints/5/state').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-20])
  with pytest.raises(InputError, match=r'checkpoints/5: damaged .* remove this folder'):
    restored(tmp_path, target_of(state))


ADAPTERS = {'a.to_q.lora_down': (6, 2), 'a.to_q.lora_up': (2, 6)}


@pytest.mark.parametrize(
  'was, now, setting',
  [
    (ADAPTERS, {'a.to_q.lora_down': (6, 3), 'a.to_q.lora_up': (3, 6)}, 'lora.rank'),
    (ADAPTERS, {'a.to_q.kernel': (6, 6)}, 'lora.rank'),
    (ADAPTERS, ADAPTERS | {'a.to_k.lora_down': (6, 2), 'a.to_k.lora_up': (2, 6)}, 'lora.targets'),
    ({'a.kernel': (2, 3)}, {'a.kernel': (2, 3), 'b.kernel': (2, 3)}, 'optimizer.rates'),
    ({'a.kernel': (2, 3)}, {'a.kernel': (4, 3)}, 'checkpoint'),
  ],
)
def test_a_state_that_does_not_fit_names_the_setting(tmp_path, rng, was, now, setting):
  saved(tmp_path, state_of(small_params(rng, **was)))
  with pytest.raises(InputError, match=f'checkpoints/1: .* set {setting} as it was') as caught:
    restored(tmp_path, target_of(state_of(small_params(rng, **now))))
  assert 'params/' in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_check_fits_works_before_and_during_a_save(tmp_path, rng):
  state = state_of(small_params(rng, **{'a.kernel': (500, 500)}))
  run = Checkpoints(tmp_path)
  run.check_fits(target_of(state))  # nothing there, so anything fits
  run.save(1, state, {})
  run.check_fits(target_of(state))
  with pytest.raises(InputError, match='set checkpoint as it was'):
    run.check_fits(target_of(state_of(small_params(rng, **{'a.kernel': (500, 4)}))))
  run.close()


def test_another_optimizer_is_named(tmp_path, rng):
  params = small_params(rng)
  saved(tmp_path, state_of(params))
  state = state_of(params) | {'opt_state': optax.sgd(0.1, momentum=0.9).init(params)}
  with pytest.raises(InputError, match='set optimizer as it was'):
    restored(tmp_path, target_of(state))


FULL_DISK = """
import resource, sys
import numpy as np
from ip2p_jax.pipeline.checkpoints import Checkpoints

rng = np.random.default_rng(0)
state = {f'{i}.kernel': rng.standard_normal((100, 50), np.float32) for i in range(200)}
run = Checkpoints(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
run.save(1, state, {})
try:
  run.wait()
except OSError as error:
  print(f'{error.filename}: {error.strerror}')
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert run.latest_step() is None
run.save(2, state, {})
run.close()
"""


def test_after_a_full_disk_the_run_may_save_again(tmp_path):
  """In a new process; Orbax's threads must print nothing."""
  command = [sys.executable, '-c', FULL_DISK, tmp_path]
  done = subprocess.run(command, capture_output=True, text=True)
  assert (done.stdout, done.stderr) == (f'{tmp_path}/checkpoints: File too large\n', '')
  assert saved_steps(tmp_path) == [2]


# Imports once and then forks, so that a run costs a fraction of a second.
LIVES = """
import os, signal, sys, time
import jax, numpy as np
from ip2p_jax.pipeline.checkpoints import Checkpoints, saved_steps

workdir, kills = sys.argv[1], int(sys.argv[2])

def state_at(step):  # many arrays, so that there is much to interrupt
  params = {f'{i}.kernel': np.full((64, 64 + i), step * 1000 + i, np.float32) for i in range(150)}
  params['large.kernel'] = np.full((1500, 1000), step, np.float32)
  return {'step': np.int32(step), 'params': params, 'ema': {k: v + 1 for k, v in params.items()}}

def resume(run, at_least):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_at(0))
  found = run.restore(target)
  step = 0 if found is None else found[1]['step']
  assert step >= at_least, (step, at_least)
  if found:
    jax.tree.map(np.testing.assert_array_equal, found[0], state_at(step))
  return step

def live(at_least, pipe):
  run = Checkpoints(workdir, keep=2)
  step = resume(run, at_least)
  os.write(pipe, b'x')
  while True:
    step += 1
    run.save(step, jax.device_put(state_at(step)), {'step': step})
    if step % 3 == 0:
      run.wait()
      with open(workdir + '/surely', 'w') as file:
        file.write(str(step))

def surely():
  text = os.path.exists(workdir + '/surely') and open(workdir + '/surely').read()
  return int(text or 0)

def child(function, *arguments):
  pid = os.fork()
  if pid == 0:
    try:
      function(*arguments)
    except BaseException:
      import traceback
      traceback.print_exc()
      os._exit(1)
    os._exit(0)
  return pid

rng, interrupted = np.random.default_rng(os.getpid()), 0
for _ in range(kills):
  ready, pipe = os.pipe()
  pid = child(live, surely(), pipe)
  os.close(pipe)
  assert os.read(ready, 1) == b'x', 'a life did not begin'
  time.sleep(rng.uniform(0.05, 0.9))
  os.kill(pid, signal.SIGKILL)
  assert os.waitpid(pid, 0)[1] == signal.SIGKILL
  interrupted += any('tmp' in name for name in os.listdir(workdir + '/checkpoints'))

def finish():
  run = Checkpoints(workdir, keep=2)
  step = resume(run, surely())
  run.save(step + 1, jax.device_put(state_at(step + 1)), {'step': step + 1})
  run.close()
  print('steps', saved_steps(workdir), 'of', step + 1, 'interrupted', interrupted)

assert os.waitpid(child(finish), 0)[1] == 0
assert not any('tmp' in name for name in os.listdir(workdir + '/checkpoints'))
"""


def survive(workdir, kills):
  """How many of the kills hit an unfinished checkpoint; the script asserts everything else."""
  workdir.mkdir()
  env = dict(os.environ, XLA_FLAGS='', PYTHONWARNINGS='ignore')
  command = [sys.executable, '-c', LIVES, str(workdir), str(kills)]
  done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return int(done.stdout.split()[-1])


def test_a_killed_run_resumes_from_a_complete_checkpoint(tmp_path):
  survive(tmp_path / 'run', kills=2)


@pytest.mark.slow
def test_many_kills_lose_no_finished_checkpoint(tmp_path):
  assert survive(tmp_path / 'run', kills=20) >= 3


PROCESS = """
import sys
import jax
from ip2p_jax.pipeline.checkpoints import Checkpoints
from ip2p_jax.pipeline.workdir import load_base, save_base, write_config
from ip2p_jax import sharding, weights
import numpy as np

address, process, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, 2, process)
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4

def place(host, fsdp):
  shardings = sharding.of_state(sharding.make_mesh(fsdp), host, zero1=True)
  put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
  return jax.tree.map(put, host, shardings)

params = {'a.kernel': np.arange(64 * 128, dtype=np.float32).reshape(64, 128)}
host = {'step': np.int32(5)[...], 'params': params, 'ema': {k: -v for k, v in params.items()}}
base = weights.Checkpoint(
  {'unet': {}}, {part: {} for part in ('unet', 'vae', 'text_encoder')}, {}, 'nowhere')
save_base(workdir, base, ['a.kernel'])
assert load_base(workdir).configs == {'unet': {}}
write_config(workdir, {'lora': {'rank': 0}})
run = Checkpoints(workdir)
run.save(5, place(host, 8), {'seen': 40})
run.wait()
for fsdp in (8, 2):
  target = place(host, fsdp)
  state, extras = run.restore(
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target))
  assert extras == {'seen': 40}
  for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
    assert found.sharding == wanted.sharding
    for a, b in zip(found.addressable_shards, wanted.addressable_shards, strict=True):
      np.testing.assert_array_equal(a.data, b.data)
run.close()
"""


def test_two_processes_save_and_restore_one_state(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  env = dict(os.environ, XLA_FLAGS='--xla_force_host_platform_device_count=4')
  processes = [
    subprocess.Popen([sys.executable, '-c', PROCESS, address, str(i), str(tmp_path)], env=env)
    for i in (0, 1)
  ]
  assert [process.wait(timeout=120) for process in processes] == [0, 0]
  one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {
    'step': jax.ShapeDtypeStruct((), np.int32, sharding=one_device),
    'params': {'a.kernel': jax.ShapeDtypeStruct((64, 128), np.float32, sharding=one_device)},
    'ema': {'a.kernel': jax.ShapeDtypeStruct((64, 128), np.float32, sharding=one_device)},
  }
  state, _ = restored(tmp_path, target)
  numbers = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
  np.testing.assert_array_equal(state['params']['a.kernel'], numbers)
  np.testing.assert_array_equal(state['ema']['a.kernel'], -numbers)


# The workdir, and the weights in it


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """The checkpoint that runs start from."""
  folder = tmp_path_factory.mktemp('pipeline')
  tiny_models.write(folder / 'saved')
  return weights.read(folder / 'saved')


@pytest.fixture(scope='module')
def unet(start):
  """The UNet of `start`, {dotted name: array}."""
  shapes = networks_of(start).shapes['unet']
  return parameters.flatten(weights.to_params(start.tensors['unet'], shapes, 'unet'))


def weights_of(params):
  """A state of weights alone; the average is the parameters plus one."""
  return {'params': params, 'ema': {name: value + 1 for name, value in params.items()}}


def run_of(workdir, start, params, config=None):
  """A workdir with one checkpoint."""
  write_config(workdir, {'lora': config or {'rank': 0, 'alpha': 4.0, 'targets': ''}})
  save_base(workdir, start, params if config is None else ())
  saved(workdir, weights_of(params), 10)


def test_a_run_is_read_as_a_whole_checkpoint(tmp_path, start, unet):
  params = {name: 2 * value for name, value in unet.items()}
  run_of(tmp_path, start, params)
  saved(tmp_path, placed(weights_of(params), 8, 4), 20)  # on other devices
  for ema, offset in ((True, 1), (False, 0)):
    checkpoint = read(tmp_path, ema)
    assert checkpoint.configs == start.configs and checkpoint.tokenizer == start.tokenizer
    assert checkpoint.tensors['unet'].keys() == start.tensors['unet'].keys()
    for name, tensor in checkpoint.tensors['unet'].items():
      np.testing.assert_array_equal(tensor, 2 * start.tensors['unet'][name] + offset)
    for part in ('vae', 'text_encoder'):
      assert_same(dict(checkpoint.tensors[part]), dict(start.tensors[part]))


def test_frozen_weights_come_from_the_base(tmp_path, start, unet):
  trained = {name: value * 0 for name, value in unet.items() if '.attn2.' in name}
  assert trained
  run_of(tmp_path, start, trained)
  base = load_base(tmp_path).tensors['unet']
  assert not any('attn2' in name for name in base)
  assert len(base) + len(trained) == len(unet)
  tensors = read(tmp_path).tensors['unet']
  for name in start.tensors['unet']:
    wanted = np.ones_like if '.attn2.' in name else np.asarray
    np.testing.assert_array_equal(tensors[name], wanted(start.tensors['unet'][name]))


def test_adapters_are_merged_and_can_be_read_alone(tmp_path, start, unet, rng):
  config = LoraConfig(rank=3, alpha=1.5)
  adapters = lora.adapters(unet, config, rng)
  adapters = {name: value + np.float32(0.1) for name, value in adapters.items()}
  run_of(tmp_path, start, adapters, {'rank': 3, 'alpha': 1.5, 'targets': config.targets})
  assert load_base(tmp_path).tensors['unet'].keys() == start.tensors['unet'].keys()
  adapters_read, config_read = read_adapters(tmp_path, ema=False)
  assert config_read == config
  assert_same(adapters_read, adapters)
  assert_same(read_adapters(tmp_path)[0], {k: v + 1 for k, v in adapters.items()})
  merged = parameters.unflatten(lora.merged(unet, adapters, config))
  merged_back = read(tmp_path, ema=False).tensors['unet']
  assert_same(dict(merged_back), weights.to_tensors(merged))
  changed = [
    name
    for name in merged_back
    if not np.array_equal(merged_back[name], start.tensors['unet'][name])
  ]
  assert len(changed) == len(adapters) // 2


def test_a_run_without_adapters_says_so(tmp_path, start, unet):
  run_of(tmp_path, start, unet)
  with pytest.raises(InputError, match='has no adapters'):
    read_adapters(tmp_path)


def test_an_older_step_is_read_and_a_missing_one_refused(tmp_path, start, unet):
  run_of(tmp_path, start, unet)
  saved(tmp_path, weights_of({name: value * 0 for name, value in unet.items()}), 20)
  name = 'conv_in.bias'
  newest, older = (read(tmp_path, ema=False, step=step) for step in (None, 10))
  np.testing.assert_array_equal(newest.tensors['unet'][name], np.zeros(32))
  np.testing.assert_array_equal(older.tensors['unet'][name], start.tensors['unet'][name])
  assert newest.source.endswith('(step 20)')
  with pytest.raises(InputError, match=r'no checkpoint of step 15; there are \[10, 20\]'):
    read(tmp_path, step=15)


def test_reading_continues_if_the_run_removes_a_checkpoint(tmp_path, rng, monkeypatch):
  part_of, state = _part_of, weights_of(small_params(rng))
  saved(tmp_path, state, 1)

  def removed(folder, part):
    if folder.name == '1':
      run = Checkpoints(tmp_path, keep=1)
      run.save(2, state, {})
      run.close()
    return part_of(folder, part)

  monkeypatch.setattr('ip2p_jax.pipeline.checkpoints._part_of', removed)
  assert read_part(tmp_path, 'ema')[0] == 2 and saved_steps(tmp_path) == [2]


def test_reading_does_not_disturb_an_unfinished_checkpoint(tmp_path, start, unet):
  run_of(tmp_path, start, unet)
  on_its_way = tmp_path / 'checkpoints/20.orbax-checkpoint-tmp'
  on_its_way.mkdir()
  assert read(tmp_path).source.endswith('(step 10)')
  assert on_its_way.exists()


def test_a_run_that_wrote_nothing_yet_has_no_weights(tmp_path, start):
  write_config(tmp_path, {})
  save_base(tmp_path, start, ())
  assert is_workdir(tmp_path)
  with pytest.raises(InputError, match='has no checkpoint yet'):
    load(tmp_path)


def test_load_also_reads_other_checkpoints(tmp_path, start):
  assert not is_workdir(tmp_path) and not is_workdir(start.source)
  assert load(start.source).source == start.source
  with pytest.raises(InputError, match='unet'):
    load(tmp_path)


@pytest.mark.parametrize('argument', ['variant', 'prediction_type'])
def test_a_run_has_one_variant_and_prediction_type(tmp_path, start, unet, argument):
  run_of(tmp_path, start, {'conv_in.bias': unet['conv_in.bias']})
  with pytest.raises(InputError, match='leave out variant'):
    load(tmp_path, **{argument: 'epsilon'})


@pytest.mark.parametrize('is_local', [True, False], ids=['local', 'bucket'])
def test_a_base_keeps_all_that_is_not_trained(tmp_path, start, unet, monkeypatch, is_local):
  monkeypatch.setattr(storage, 'is_local', lambda path: is_local or 'safetensors' not in str(path))
  trained = [name for name in unet if name.startswith('up_blocks')]
  save_base(tmp_path, start, trained)
  base = load_base(tmp_path)
  assert base.configs == start.configs and base.tokenizer == start.tokenizer
  fixed = {name: x for name, x in start.tensors['unet'].items() if 'up_blocks' not in name}
  assert 0 < len(fixed) < len(unet)
  assert_same(dict(base.tensors['unet']), fixed)
  assert_same(dict(base.tensors['vae']), dict(start.tensors['vae']))
  assert_same(dict(base.tensors['text_encoder']), dict(start.tensors['text_encoder']))


def test_a_base_is_float32(tmp_path, start):
  half = {name: tensor.astype(np.float16) for name, tensor in start.tensors['vae'].items()}
  checkpoint = weights.Checkpoint(
    start.configs, start.tensors | {'vae': half}, start.tokenizer, start.source
  )
  save_base(tmp_path, checkpoint, ())
  tensors = load_base(tmp_path).tensors['vae']
  assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
  name = 'quant_conv.bias'
  np.testing.assert_array_equal(tensors[name], half[name].astype(np.float32))


def test_an_incomplete_base_is_none_and_is_rewritten(tmp_path, start, monkeypatch):
  save_base(tmp_path, start, ())

  def stop(file, tensors):
    if file.stem == 'text_encoder':
      raise KeyboardInterrupt
    write(file, tensors)

  write = weights.write_safetensors
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(weights, 'write_safetensors', stop)
    save_base(tmp_path, start, ())
  assert load_base(tmp_path) is None
  save_base(tmp_path, start, ())
  assert_same(dict(load_base(tmp_path).tensors['vae']), dict(start.tensors['vae']))


def test_a_base_is_final_after_the_first_checkpoint(tmp_path, start, unet):
  def kept():
    return len(load_base(tmp_path).tensors['unet'])

  save_base(tmp_path, start, ())
  save_base(tmp_path, start, unet)  # the config was changed before the first training step
  assert kept() == 0
  saved(tmp_path, weights_of(unet))
  save_base(tmp_path, start, ())
  assert kept() == 0


def test_a_config_survives_and_differences_are_listed(tmp_path):
  assert read_config(tmp_path) is None
  old = {'steps': 10, 'optimizer': {'learning_rate': 1e-4, 'rates': (('', 1.0),)}, 'path': 'a'}
  write_config(tmp_path, old)
  config = read_config(tmp_path)
  assert differences(config, old) == []
  new = {'optimizer': {'learning_rate': 3e-5, 'rates': (('', 1.0),)}, 'path': 'b', 'seed': 1}
  assert differences(config, new) == [
    'steps: 10 -> absent',
    'optimizer.learning_rate: 0.0001 -> 3e-05',
    'path: "a" -> "b"',
    'seed: absent -> 1',
  ]
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{"steps": ')
  with pytest.raises(InputError, match=r'config\.json: not valid JSON'):
    read_config(tmp_path)


def test_a_bucket_without_its_library_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(InputError, match=r'gs://bucket/run: .*gcsfs'):
    is_workdir('gs://bucket/run')


def test_a_run_is_converted_and_edits(tmp_path, start, unet):
  run_of(tmp_path / 'run', start, {name: x + 0 for name, x in unet.items()})
  checkpoint, lines = read(tmp_path / 'run', ema=False), []
  convert_checkpoint(tmp_path / 'run', tmp_path / 'live', ema=False, verify=False, say=lines.append)
  assert lines[0].startswith(f'read {tmp_path / "run"} (step 10): ')
  assert_same(
    dict(weights.read(tmp_path / 'live').tensors['unet']), dict(checkpoint.tensors['unet'])
  )
  convert_checkpoint(tmp_path / 'run', tmp_path / 'ema.safetensors', verify=False, say=lines.append)
  tensors = weights.read(tmp_path / 'ema.safetensors').tensors['unet']
  np.testing.assert_array_equal(tensors['conv_in.bias'], unet['conv_in.bias'] + 1)
  editor = Editor.load(tmp_path / 'run', ema=False)
  assert_same(parameters.flatten(editor.params['unet']), unet)


def test_reading_a_run_on_one_device_says_nothing(tmp_path, start, unet):
  run_of(tmp_path / 'run', start, unet)
  code = (
    'import sys; from ip2p_jax.pipeline.workdir import read\n'
    'print(len(read(sys.argv[1]).tensors["unet"]))'
  )
  env, command = dict(os.environ, XLA_FLAGS=''), [sys.executable, '-c', code, tmp_path / 'run']
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  assert (done.stdout.strip(), done.stderr) == (str(len(unet)), '')
