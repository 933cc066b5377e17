"""Files that a run writes into its workdir, its measured speed, and its progress line."""

import json
import struct
import types

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from ip2p_jax.errors import InputError
from ip2p_jax.training import logs


def lines(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def events(workdir):
  """All TensorBoard events of a workdir, in the order of their files."""
  records = []
  for file in sorted((workdir / 'tensorboard').iterdir()):
    content = file.read_bytes()
    while content:  # length, checksum, event, checksum
      (length,) = struct.unpack('<Q', content[:8])
      records.append(Event.FromString(content[12 : 12 + length]))
      content = content[16 + length :]
  return records


def tags(workdir):
  return {(event.step, value.tag) for event in events(workdir) for value in event.summary.value}


def test_each_log_is_a_line_of_json_and_an_event(tmp_path):
  with logs.Writer(tmp_path) as writer:
    writer.scalars(50, {'loss': 0.1 + 0.2, 'skipped': 3})
    first = lines(tmp_path)  # written at once, for those who watch
    writer.scalars(100, {'loss': np.float32(0.0412)})
  assert len(first) == 1
  first, second = lines(tmp_path)
  assert first.pop('time') <= second.pop('time')
  assert first == {'step': 50, 'loss': 0.3, 'skipped': 3}
  assert second == {'step': 100, 'loss': 0.0412}
  assert tags(tmp_path) >= {(50, 'loss'), (50, 'skipped'), (100, 'loss')}
  loss = [e.summary.value[0].simple_value for e in events(tmp_path) if e.step == 100]
  assert loss == [pytest.approx(0.0412)]


def test_numbers_that_are_not_finite_stay_strict_json(tmp_path):
  with logs.Writer(tmp_path) as writer:
    writer.scalars(1, {'a': float('nan'), 'b': float('inf'), 'c': -float('inf')})

  def refuse(constant):
    raise AssertionError(constant)

  line = json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse)
  assert (line['a'], line['b'], line['c']) == ('nan', 'inf', '-inf')


def test_resuming_drops_later_lines_and_a_half_written_one(tmp_path):
  with logs.Writer(tmp_path) as writer:
    for step in (50, 100, 150):
      writer.scalars(step, {'loss': step})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 80, "ti')
  with logs.Writer(tmp_path, start_step=100) as writer:
    writer.scalars(150, {'loss': -1})
  assert [(line['step'], line['loss']) for line in lines(tmp_path)] == [
    (50, 50), (100, 100), (150, -1)
  ]  # fmt: skip
  # TensorBoard hides what it has of step 101 and later when it meets this.
  assert [event.step for event in events(tmp_path) if event.HasField('session_log')] == [1, 101]


def test_a_preview_is_a_file_and_an_event(tmp_path):
  image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
  with logs.Writer(tmp_path) as writer:
    writer.image(1000, 'edits', image)
  assert [file.name for file in (tmp_path / 'previews').iterdir()] == ['edits_00001000.png']
  with Image.open(tmp_path / 'previews' / 'edits_00001000.png') as saved:
    np.testing.assert_array_equal(np.asarray(saved), np.asarray(image))
  (image,) = [v.image for e in events(tmp_path) if e.step == 1000 for v in e.summary.value]
  assert (image.height, image.width) == (4, 4)


def test_the_loss_curve_is_an_image(tmp_path):
  with logs.Writer(tmp_path) as writer:
    writer.curve()
    assert not (tmp_path / 'loss.png').exists()  # nothing to draw yet
    writer.scalars(1, {'loss': 1.0, 'grad_norm': float('inf')})
    writer.curve()
    with Image.open(tmp_path / 'loss.png') as one_point:
      few = (np.asarray(one_point.convert('RGB')) == BLUE).all(-1).sum()
    writer.scalars(2, {'learning_rate': 1e-4})  # all examples were broken
    writer.scalars(1000, {'loss': 0.1, 'validation_loss': 0.2})
    writer.curve()
  with Image.open(tmp_path / 'loss.png') as image:
    pixels = np.asarray(image.convert('RGB'))
  blue, orange = ((pixels == colour).all(-1).sum() for colour in (BLUE, ORANGE))
  assert blue > 100 > few > 10 and orange > 10
  assert not list(tmp_path.glob('.*'))


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_a_text_goes_to_tensorboard_as_it_is(tmp_path):
  with logs.Writer(tmp_path) as writer:
    writer.text(0, 'overview', '| a |\n| b |')
  (text,) = [v.tensor.string_val[0] for e in events(tmp_path) for v in e.summary.value]
  assert text == b'    | a |\n    | b |\n'


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with logs.Writer(tmp_path / 'run') as writer:
    writer.scalars(1, {'loss': 1.0})
    writer.image(1, 'edits', Image.new('RGB', (4, 4)))
    writer.text(1, 'overview', 'text')
    writer.curve()
  assert not (tmp_path / 'run').exists()


def test_an_unwritable_workdir_is_an_input_error(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(InputError, match=r'the workdir .*/file/run cannot be written'):
    logs.Writer(tmp_path / 'file' / 'run')


def test_a_workdir_may_be_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  logs.Writer('~/run').close()
  assert (tmp_path / 'run' / 'metrics.jsonl').exists()


class Cloud(MemoryFileSystem):
  """Files in memory at gs://, which cannot be appended to."""

  store, pseudo_dirs = {}, ['']
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + path.removeprefix('gs://').strip('/')

  def _open(self, path, mode='rb', **options):
    assert 'a' not in mode
    return super()._open(path, mode, **options)


@pytest.fixture
def cloud(monkeypatch):
  Cloud.store.clear()
  fsspec.register_implementation('gcs', Cloud, clobber=True)
  yield Cloud.store
  fsspec.register_implementation('gcs', 'gcsfs.GCSFileSystem', clobber=True)


def test_a_remote_workdir_gets_whole_files(cloud, monkeypatch):
  monkeypatch.setattr(logs, 'UPLOAD_EVERY', 0)
  with logs.Writer('gs://bucket/run') as writer:
    writer.scalars(50, {'loss': 1.0})
    early = cloud['/bucket/run/metrics.jsonl'].getvalue()
    writer.scalars(100, {'loss': 2.0})
    writer.image(100, 'edits', Image.new('RGB', (4, 4)))
    writer.curve()
  assert cloud['/bucket/run/loss.png'].getvalue().startswith(b'\x89PNG')
  assert early.count(b'\n') == 1
  with logs.Writer('gs://bucket/run', start_step=50) as writer:
    writer.scalars(75, {'loss': 3.0})
  content = cloud['/bucket/run/metrics.jsonl'].getvalue()
  assert [json.loads(line)['step'] for line in content.splitlines()] == [50, 75]
  assert '/bucket/run/previews/edits_00000100.png' in cloud
  assert len([name for name in cloud if '/tensorboard/events' in name]) == 2


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


def test_a_meter_counts_steps_and_not_pauses():
  clock = Clock()
  meter = logs.Meter(32, 5e11, num_devices=4, peak=1e13, clock=clock)
  assert meter.read(1) == {}
  clock.now += 60  # compilation
  meter.start(1)
  clock.now += 10
  with meter.paused():
    clock.now += 1000
  clock.now += 10
  assert meter.read(11) == {
    'step_time': 2.0,
    'examples_per_second': 16.0,
    'tflops_per_device': 2.0,
    'mfu': 0.2,
  }
  clock.now += 5
  assert meter.read(12)['step_time'] == 5
  assert meter.read(12) == {}


def test_a_pause_waits_for_the_training_in_flight(monkeypatch):
  order = []
  monkeypatch.setattr(jax, 'block_until_ready', lambda arrays: order.append(arrays))
  meter = logs.Meter(1, 1.0, 1, None, clock=lambda: order.append('clock') or 0.0)
  with meter.paused('state'):
    order.append('inside')
  assert order == ['state', 'clock', 'inside', 'clock']


def test_an_error_in_a_pause_passes_through():
  with pytest.raises(KeyboardInterrupt), logs.Meter(1, 1.0, 1, None).paused(jnp.ones(3)):
    raise KeyboardInterrupt


def test_without_a_peak_there_is_no_utilization():
  clock = Clock()
  meter = logs.Meter(1, 1.0, num_devices=1, peak=None, clock=clock)
  meter.start(0)
  clock.now += 1
  assert 'mfu' not in meter.read(1)


def test_the_progress_line():
  values = {
    'loss': 0.04119,
    'examples_per_second': 577.2,
    'tflops_per_device': 311.9,
    'mfu': 0.3948,
    'step_time': 1.7046,
  }
  assert logs.progress_line(1200, 10_000, values) == (
    'step 1,200/10,000  loss 0.0412  577 examples/s  312 TFLOP/s per device (39 %)  4 h 10 min left'
  )
  assert logs.progress_line(20, 20, {'loss': 0.0000412}) == 'step 20/20  loss 4.12e-05'
  assert logs.progress_line(20, 20, {'loss': float('nan'), 'step_time': 1}) == (
    'step 20/20  loss nan'
  )


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.4, '0 s'), (59, '59 s'), (61, '1 min'), (3600, '1 h 0 min'), (90_000, '1 d 1 h')],
)
def test_the_time_that_is_left(seconds, text):
  line = logs.progress_line(1, 2, {'step_time': seconds})
  assert line == f'step 1/2  {text} left'


def test_memory_is_logged_per_device_but_not_on_cpus(monkeypatch):
  assert logs.memory() == {}
  stats = {'bytes_in_use': 5, 'peak_bytes_in_use': 7, 'bytes_limit': 9}
  devices = [types.SimpleNamespace(id=i, memory_stats=lambda: stats) for i in (4, 5)]
  monkeypatch.setattr(jax, 'local_devices', lambda: devices)
  assert logs.memory() == {
    'memory/in_use_4': 5, 'memory/peak_4': 7, 'memory/in_use_5': 5, 'memory/peak_5': 7
  }  # fmt: skip


def test_the_overview_lists_parameters_and_totals():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
  text = logs.overview(
    {'conv_in.kernel': shape(3, 3, 8, 320), 'conv_in.bias': shape(320), 'mid.scale': shape(7)}
  )
  assert '| conv_in.kernel | (3, 3, 8, 320) | float32 | 23,040 |' in text
  assert 'Total: 23,367 -- 93,468 bytes\n  conv_in: 23,360\n  mid: 7' in text
