import contextlib
import io
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter, namedtuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from ip2p_jax.data import loader
from ip2p_jax.data.examples import Framing
from ip2p_jax.data.rows import LatentRow, Pair, Row
from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.weights import clip_tokenizer

SIDE = 8
HERE = os.path.dirname(__file__)


def tokenizer(texts):
  return np.array([[int(text), 0] for text in texts], np.int32)


def image_rows(count, first=0, seed=0) -> list[Row]:
  """Rows whose instruction is their number."""
  rng, rows = np.random.default_rng(seed), []
  for number in range(first, first + count):
    files = []
    for array in rng.integers(0, 256, (2, SIDE, SIDE, 3), np.uint8):
      file = io.BytesIO()
      Image.fromarray(array).save(file, 'PNG')
      files.append(file.getvalue())
    rows.append(Row(f'row {number}', (str(number),), (Pair(*files),)))
  return rows


def latent_rows(count, side=4) -> list[LatentRow]:
  mean = np.ones((1, 2, side, side, 4), np.float16)
  return [
    LatentRow(f'row {i}', np.array([[i, 0]], np.int32), mean, mean, mean) for i in range(count)
  ]


def settings(**data) -> Framing:
  return Framing(SIDE, **data)


OPTIONS = {'seed': 7, 'batch_size': 10, 'framing': settings(), 'tokenizer': tokenizer}


def taken(sources, weights=(1,), count=3, **changes) -> list[loader.Batch]:
  """The first batches."""
  options = OPTIONS | {'start_step': 0, 'workers': 0} | changes
  options.setdefault('rows', np.arange(options['batch_size']))
  with contextlib.closing(loader.batches(sources, weights, **options)) as batches:
    return list(itertools.islice(batches, count))


def assert_same(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])
      assert batch[key].dtype.kind == other[key].dtype.kind


# Order


@pytest.mark.parametrize('few', [0, 100])  # Grain's shuffle, and the one for small sources
def test_every_epoch_has_every_row_in_a_new_order(monkeypatch, few):
  monkeypatch.setattr(loader, 'FEW', few)
  order = loader.order([23], [1], seed=0)
  epochs = [[order[epoch * 23 + i] for i in range(23)] for epoch in range(20)]
  assert all(sorted(epoch) == [(0, i) for i in range(23)] for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 20


@pytest.mark.parametrize('few', [0, 100])
def test_seeds_order_differently_even_one_epoch_apart(monkeypatch, few):
  monkeypatch.setattr(loader, 'FEW', few)
  epochs = set()
  for seed in range(3):
    order = loader.order([50], [1], seed)
    epochs |= {tuple(order[k * 50 + i] for i in range(50)) for k in range(5)}
  assert len(epochs) == 15


def test_the_first_rows_of_epochs_are_spread_over_all():
  order = loader.order([40], [1], seed=0)
  first = Counter(order[epoch * 40][1] // 10 for epoch in range(400))
  assert all(60 < first[quarter] < 140 for quarter in range(4))  # 4.6 standard deviations


def test_a_mixture_keeps_proportions_and_epochs():
  order = loader.order([7, 11, 5], [3, 1, 0.5], seed=0)
  places = [order[p] for p in range(9000)]
  for start in (0, 450, 8100):  # even at all times
    counts = Counter(source for source, _ in places[start : start + 900])
    assert [counts[source] for source in range(3)] == pytest.approx([600, 200, 100], abs=1)
  for source, length in enumerate([7, 11, 5]):
    rows = [row for s, row in places if s == source]
    epochs = [rows[i : i + length] for i in range(0, len(rows) - length, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)


# Batches


def test_an_example_depends_only_on_its_place():
  rows = image_rows(13)
  images = np.concatenate([batch['input_image'] for batch in taken([rows], count=6)])
  larger = np.concatenate([b['input_image'] for b in taken([rows], count=3, batch_size=20)])
  np.testing.assert_array_equal(images, larger)
  assert len({example.tobytes() for example in images}) > 20  # 13, and mirrored


def test_batches_have_every_row_of_an_epoch_once():
  tokens = np.concatenate([b['token_ids'][:, 0] for b in taken([image_rows(30)], count=6)])
  assert sorted(tokens[:30]) == sorted(tokens[30:]) == list(range(30))


def test_two_hosts_feed_the_rows_of_one():
  rows, split = image_rows(13), ([0, 2, 3, 7, 9], [1, 4, 5, 6, 8])
  batches = taken([rows])
  for part in split:
    expected = [{key: value[part] for key, value in batch.items()} for batch in batches]
    assert_same(taken([rows], rows=np.array(part)), expected)
    assert taken([rows], rows=np.array(part))[0]['index'].tolist() == part


def test_a_batch_of_many_parts_is_in_order(monkeypatch):
  expected = taken([image_rows(13)])
  monkeypatch.setattr(loader, 'PART', 3)
  assert_same(taken([image_rows(13)]), expected)


def test_a_start_step_skips_earlier_batches():
  rows = image_rows(13)
  assert_same(taken([rows], start_step=4), taken([rows], count=7)[4:])


def test_batch_at_gives_any_step():
  rows, step = image_rows(13), 10**9
  batch = loader.batch_at([rows], [1], step=step, rows=np.array([1, 5]), **OPTIONS)
  assert_same([batch], taken([rows], count=1, start_step=step, rows=np.array([1, 5])))


def test_latents_are_batched_too():
  (batch,) = taken([latent_rows(5)], count=1)
  assert batch['input_mean'].shape == (10, 4, 4, 4) and batch['input_mean'].dtype == np.float16
  assert batch['weight'].dtype == np.float32 and batch['index'].dtype == np.int32


def test_a_broken_row_has_no_weight_and_is_named():
  rows = image_rows(10)
  rows[4] = rows[4]._replace(pairs=(Pair(rows[4].pairs[0].input_image, b'spoilt'),))
  for start_step in (0, 1):
    (batch,) = taken([rows], count=1, start_step=start_step)
    (place,) = np.flatnonzero(batch['weight'] == 0)
    assert 'row 4: the edited image' in batch['error'][place]
    assert not batch['input_image'][place].any() and not batch['token_ids'][place].any()
    assert batch['weight'].sum() == 9 and sum(map(bool, batch['error'])) == 1


def test_an_input_error_of_a_source_is_a_broken_row():
  (batch,) = taken([Refusing(image_rows(10), InputError('line 4 is no JSON'))], count=1)
  assert batch['error'][batch['weight'] == 0].tolist() == ['line 4 is no JSON']


def test_latents_of_an_odd_size_are_a_broken_row():
  rows = latent_rows(10)
  rows[4] = latent_rows(5, side=2)[4]
  (batch,) = taken([rows], count=1)
  assert 'row 4 has edited_log_variance [2, 2, 4]' in batch['error'][batch['weight'] == 0][0]


class Refusing(list):
  """A source that raises at row 4."""

  def __init__(self, rows, error):
    super().__init__(rows)
    self.error = error

  def __reduce__(self):
    return Refusing, (list(self), self.error)

  def __getitem__(self, i):
    if i == 4:
      raise self.error
    return super().__getitem__(i)


@pytest.mark.parametrize(
  ('sources', 'weights', 'problem'),
  [
    ([image_rows(2), latent_rows(2)], [1, 1], 'all must be images, or all latents'),
    ([latent_rows(2), latent_rows(2, side=8)], [1, 1], 'of one resolution'),
    ([image_rows(2), []], [1, 1], 'data set 2 has no examples'),
    ([image_rows(2)], [0], 'data set 1 has weight 0'),
    ([[row._replace(name='bad', pairs=(Pair(b'x', b'x'),)) for row in image_rows(2)]], [1],
     'all broken: bad: the input image'),
  ],
)  # fmt: skip
def test_an_impossible_mixture_is_refused_at_once(sources, weights, problem):
  with pytest.raises(InputError, match=problem):
    taken(sources, weights)


def test_impossible_settings_are_refused_at_once():
  with pytest.raises(InputError, match=r'data\.resize'):
    taken([image_rows(2)], framing=settings(resize='stretch'))
  with pytest.raises(InputError, match='seed is -1'):
    taken([image_rows(2)], seed=-1)


# Worker processes


def test_workers_change_nothing_and_leave_nothing(monkeypatch):
  monkeypatch.setattr(loader, 'PART', 3)
  rows = [row._replace(instructions=('make it winter', 'a dog')) for row in image_rows(13)]
  options = {'tokenizer': ClipTokenizer(clip_tokenizer()),
             'framing': settings(largest_resize=12), 'start_step': 10**6}  # fmt: skip
  expected = taken([rows], **options)
  assert_same(taken([rows], workers=2, **options), expected)
  assert not multiprocessing.active_children()


@pytest.mark.parametrize('workers', [0, 1])
def test_other_errors_stop_the_run(workers):
  class Odd(Exception):
    def __init__(self, path, line):  # cannot be pickled
      super().__init__(f'{path} is gone')

  source = Refusing(image_rows(10), None)
  source.error = OSError('the disk is gone') if workers else Odd('a.json', 3)
  with pytest.raises(RuntimeError, match=r'examples of step 0 failed with .* is gone') as caught:
    taken([source], workers=workers)
  assert 'in __getitem__' in str(caught.value)  # the traceback
  assert not multiprocessing.active_children()


def test_a_killed_worker_stops_the_run():
  options = OPTIONS | {'rows': np.arange(10), 'start_step': 0, 'workers': 1}
  batches = loader.batches([image_rows(10)], [1], **options)
  next(batches)
  (worker,) = multiprocessing.active_children()
  worker.kill()
  with pytest.raises(RuntimeError, match='terminated unexpectedly with exit code -9'):
    for _ in range(10):  # batches that it had finished still arrive
      next(batches)


def test_without_shared_memory_threads_do_the_work(monkeypatch):
  usage = namedtuple('usage', 'free')
  monkeypatch.setattr(loader.shutil, 'disk_usage', lambda path: usage(free=1000))
  monkeypatch.delattr(loader.grain.IterDataset, 'mp_prefetch')  # fails if a process is started
  expected = taken([image_rows(13)])
  with pytest.warns(UserWarning, match='data.workers need'):
    assert_same(taken([image_rows(13)], workers=2), expected)


ORPHANS = """
  import sys, os, signal
  import numpy as np
  sys.path[:0] = sys.argv[1:]

  class Source(list):
    def __getitem__(self, i):
      import jax
      from ip2p_jax.errors import InputError
      if i == 3:
        raise InputError(f'platforms: {jax.config.jax_platforms}')
      return super().__getitem__(i)

  if __name__ == '__main__':
    import test_loader
    from ip2p_jax.data import loader
    batches = loader.batches(
      [Source(test_loader.image_rows(10))], [1], seed=0, batch_size=10, rows=np.arange(10),
      start_step=0, framing=test_loader.settings(), tokenizer=test_loader.tokenizer,
      workers=2,
    )
    print(*[error for error in next(batches)['error'] if error], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_use_the_cpu_and_die_with_their_parent(tmp_path):
  script = tmp_path / 'orphans.py'
  script.write_text(textwrap.dedent(ORPHANS))
  environment = {key: value for key, value in os.environ.items() if key != 'JAX_PLATFORMS'}
  process = subprocess.Popen(
    [sys.executable, str(script), HERE, os.path.dirname(HERE)],
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
  )  # fmt: skip
  # Workers inherit the pipe, so it ends with the last of them.
  output, _ = process.communicate(timeout=120)
  assert process.returncode == -9
  assert output == 'platforms: cpu\n'


# Validation


def test_validation_goes_through_the_first_rows_in_order():
  framing = settings(largest_resize=12, flip_rate=1.0)
  rows, hosts = image_rows(30), (np.array([0, 2]), np.array([1, 3]))
  options = {'batch_size': 4, 'examples': 10, 'framing': framing, 'tokenizer': tokenizer}
  batches = list(loader.validation_batches(rows, rows=np.arange(4), **options))
  assert [batch['index'].tolist() for batch in batches] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9, 10, 11],
  ]
  assert [batch['weight'].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
  assert np.concatenate([b['token_ids'][:, 0] for b in batches])[:10].tolist() == list(range(10))
  first = np.asarray(Image.open(io.BytesIO(rows[0].pairs[0].input_image)))
  np.testing.assert_array_equal(batches[0]['input_image'][0], first)
  assert not any(error for batch in batches for error in batch['error'])
  for host in hosts:
    expected = [{key: value[host] for key, value in batch.items()} for batch in batches]
    assert_same(list(loader.validation_batches(rows, rows=host, **options)), expected)


def test_validation_takes_no_more_rows_than_exist():
  options = {'batch_size': 4, 'rows': np.arange(4), 'framing': settings(), 'tokenizer': tokenizer}
  batches = list(loader.validation_batches(image_rows(3), examples=100, **options))
  assert [batch['weight'].tolist() for batch in batches] == [[1, 1, 1, 0]]


# To devices


def feed(count, batch_size, log=None, errors=()):
  """Batches like those of `batches`, with known values. `log` gets the steps and the close."""
  log = [] if log is None else log
  try:
    for step in range(count):
      log.append(step)
      rows = np.arange(batch_size) + 100 * step
      yield {
        'index': rows.astype(np.int32),
        'image': np.stack([rows, -rows], -1),
        'error': np.array([*errors, *[''] * (batch_size - len(errors))]),
      }
  finally:
    log.append('closed')


def test_rows_land_in_place_for_any_order_of_devices():
  devices = np.array(jax.devices())[[5, 2, 7, 0, 1, 6, 3, 4]].reshape(4, 2)
  sharding = NamedSharding(Mesh(devices, ('data', 'fsdp')), P(('data', 'fsdp')))
  batches = list(loader.to_device(feed(3, 16), sharding, 16))
  for step, batch in enumerate(batches):
    assert batch.keys() == {'index', 'image'} and batch['image'].sharding.is_equivalent_to(
      sharding, 2
    )
    np.testing.assert_array_equal(batch['index'], np.arange(16) + 100 * step)
    for shard in batch['image'].addressable_shards:
      rows = np.arange(16)[shard.index[0]] + 100 * step
      np.testing.assert_array_equal(shard.data, np.stack([rows, -rows], -1))
    assert batch['index'].addressable_shards[0].data.shape == (2,)


def one_device():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_prefetch_limits_the_batches_ahead():
  log = []
  reader = feed(50, 2, log)  # the name keeps it from being closed
  batches = loader.to_device(reader, one_device(), 2, prefetch=3)
  next(batches), next(batches)
  time.sleep(0.3)
  assert log == [0, 1, 2, 3, 4]
  batches.close()
  assert log == [0, 1, 2, 3, 4, 'closed']


def test_errors_are_reported_with_their_batch():
  reported = []
  batches = loader.to_device(feed(4, 3, errors=['row 1', 'row 2']), one_device(), 3,
                             on_error=reported.append)  # fmt: skip
  assert reported == []
  for _ in range(2):
    next(batches)
  batches.close()
  assert reported == [['row 1', 'row 2']] * 2


def test_an_exception_of_the_reader_closes_it():
  log = []

  def failing():
    yield from feed(2, 2, log)
    raise RuntimeError('reading failed')

  with pytest.raises(RuntimeError, match='reading failed'):
    list(loader.to_device(failing(), one_device(), 2))
  assert log[-1] == 'closed'


HOSTS = """
  import sys
  import jax
  import numpy as np
  from jax.sharding import Mesh
  from ip2p_jax import sharding
  from ip2p_jax.data import loader

  jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
  devices = np.array(jax.devices())[[0, 5, 1, 4, 7, 6, 2, 3]].reshape(4, 2)
  mesh = Mesh(devices, sharding.EVERYWHERE)
  rows = sharding.local_rows(mesh, 16)
  assert 0 < len(rows) < 16 and (np.diff(rows) > 1).any()
  batches = iter([{'image': np.stack([rows, -rows], -1), 'error': np.array([''] * len(rows))}])
  feed = (batch for batch in batches)
  (batch,) = loader.to_device(feed, sharding.of_batch(mesh), 16)
  assert batch['image'].shape == (16, 2)
  for shard in batch['image'].addressable_shards:
    expected = np.arange(16)[shard.index[0]]
    np.testing.assert_array_equal(shard.data, np.stack([expected, -expected], -1))
  print('right')
"""


@pytest.mark.slow
def test_rows_of_two_hosts_land_in_place():
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]  # free a moment later
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(HOSTS), f'localhost:{port}', str(host)],
      stdout=subprocess.PIPE, env=environment, text=True,
    )
    for host in range(2)
  ]  # fmt: skip
  assert [process.communicate(timeout=120)[0] for process in processes] == ['right\n', 'right\n']
