"""`ip2p evaluate` and `ip2p compare`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_pairs
from PIL import Image

from ip2p_jax import bundled
from ip2p_jax.evaluation.text2live import Edit, Text2Live

COUNT = 3
BASE = Path(bundled.path()).parent / 'miniature-base'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  tiny_pairs.write_metadata(folder, COUNT)
  return folder


@pytest.fixture
def outputs(data, tmp_path):
  """Edits by another method: half as bright."""
  folder = tmp_path / 'outputs'
  folder.mkdir()
  for i in range(COUNT):
    image = np.asarray(Image.open(data / 'pictures' / f'{i}_input.jpg').convert('RGB'))
    Image.fromarray(image // 2).save(folder / f'{i:05d}.png')
  return folder


def test_edits_of_any_method_are_scored(ip2p, data, outputs, tmp_path):
  code, output = ip2p('evaluate', data, tmp_path / 'out', '--outputs', outputs)
  assert code == 0 and '| out | 3 |' in output
  report = (tmp_path / 'out' / 'report.md').read_text()
  assert '| method | images | l1 | l2 | psnr | ssim | target_l1' in report
  assert '* pixels: colours in 0..1' in report
  lines = (tmp_path / 'out' / 'results-00000-of-00001.jsonl').read_text().splitlines()
  assert len({json.loads(line)['id'] for line in lines}) == COUNT


@pytest.mark.long
def test_an_editor_is_run_and_compared(ip2p, data, outputs, tmp_path):
  runs = tmp_path / 'runs'
  ckpt = '--ckpt', bundled.path(), '--steps', 2, '--resolution', 32
  assert ip2p('evaluate', data, runs / 'editor' / '1.5', *ckpt)[0] == 0
  assert len(list((runs / 'editor' / '1.5' / 'edits').glob('*.png'))) == COUNT
  assert ip2p('evaluate', data, runs / 'darker' / 'half', '--outputs', outputs)[0] == 0
  folders = runs / 'editor' / '1.5', runs / 'darker' / 'half'
  code, output = ip2p('compare', *folders, '-o', tmp_path / 'x', '--x', 'l1', '--y', 'ssim')
  assert code == 0 and 'darker/half - editor/1.5: l1 ' in output
  assert {file.suffix for file in (tmp_path / 'x').iterdir()} == {'.md', '.csv', '.png'}


@pytest.mark.long
def test_a_method_of_the_table_makes_the_edits(ip2p, data, tmp_path):
  words = '--method', 'vae', '--base', BASE, '--resolution', 32
  code, output = ip2p('evaluate', data, tmp_path / 'out', *words)
  assert code == 0 and len(list((tmp_path / 'out' / 'edits').glob('*.png'))) == COUNT
  assert '| out | 3 |' in output


def test_text2live_takes_a_clip_and_one_image_at_a_time(ip2p, data, tmp_path, monkeypatch):
  clip, seeds = tiny_models.write_clip(tmp_path / 'clip', 32), []

  def trained(self, image, texts, seed, report):
    seeds.append(seed)
    return Edit(image, np.zeros((*image.shape[:2], 4), np.float32))

  monkeypatch.setattr(Text2Live, 'edit', trained)
  words = '--method', 'text2live', '--base', clip, '--set', 'levels=2', '--seed', 5
  code, output = ip2p('evaluate', data, tmp_path / 'out', *words, '--batch-size', 4)
  assert code == 0 and seeds == [5, 6, 7] and '| out | 3 |' in output


def test_identity_keeps_every_pixel(ip2p, data, tmp_path):
  code, _ = ip2p('evaluate', data, tmp_path / 'out', '--method', 'identity')
  lines = (tmp_path / 'out' / 'results-00000-of-00001.jsonl').read_text().splitlines()
  assert code == 0 and [json.loads(line)['l1'] for line in lines] == [0] * COUNT


def test_both_workers_together_score_every_row(ip2p, data, outputs, tmp_path):
  words = 'evaluate', data, tmp_path / 'out', '--outputs', outputs
  assert '2 of 3 rows so far' in ip2p(*words, '--shard', '0/2')[1]
  code, output = ip2p(*words, '--shard', '1/2')
  assert code == 0 and '| out | 3 |' in output


@pytest.mark.parametrize(('options', 'message'), [
  ((), 'give one of --ckpt'),
  (('--ckpt', 'x', '--outputs', 'y'), 'give one of --ckpt'),
  (('--outputs', 'y', '--original-range'), '--original-range: of no use here'),
  (('--outputs', 'y', '--protocol', 'paper2'), '--protocol'),
  (('--outputs', 'y', '--shard', '2/2'), 'shard is'),
  (('--outputs', 'nowhere'), '3 of 3 edits are missing'),
  (('--method', 'vae'), '--method vae needs --base'),
  (('--method', 'text2live'), '--method text2live needs --base, the folder of a CLIPModel'),
  (('--method', 'identity', '--base', 'x'), '--base: of no use with --method identity'),
  (('--outputs', 'y', '--set', 'steps=3'), '--base and --set: of no use without --method'),
  (('--method', 'vae', '--base', 'x', '--set', 'steps=3'), 'steps is no setting of the method vae'),
  (('--method', 'vae', '--base', 'x', '--set', 'steps'), '--set steps: give a name and a value'),
  (('--method', 'ddim', '--base', 'x', '--set', 'steps=two'), "steps is 'two'; the method ddim"),
  (('--method', 'morph', '--base', 'x'), 'method'),
])  # fmt: skip
def test_a_mistake_is_one_line(ip2p, data, tmp_path, options, message):
  code, output = ip2p('evaluate', data, tmp_path / 'out', *options)
  assert code == 2 and message in output and 'Traceback' not in output


def test_a_folder_of_other_settings_is_refused(ip2p, data, outputs, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(outputs, other)
  assert ip2p('evaluate', data, tmp_path / 'out', '--outputs', outputs)[0] == 0
  code, output = ip2p('evaluate', data, tmp_path / 'out', '--outputs', other)
  assert code == 2 and 'has results of other settings (outputs)' in output
