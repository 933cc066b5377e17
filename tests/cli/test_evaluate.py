"""`ip2p evaluate` and `ip2p compare`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_pairs
from PIL import Image

from ip2p_jax import bundled, weights
from ip2p_jax.evaluation.text2live import Edit, Text2Live

COUNT = 3
BASE = Path(bundled.path()).parent / 'miniature-base'

MY_SCORER = """
import numpy as np
from ip2p_jax.evaluation.scorers import Scorer
from ip2p_jax.evaluation.scores import Description

def scorer():
  return Scorer(Description('mine', {}, 'none', 'none'), number)

def number(batch):
  return {} if batch.ids is None else {'number': np.array(batch.ids, np.float32)}
"""


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


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  """Untrained: two editors, a base and a CLIP."""
  folder = tmp_path_factory.mktemp('checkpoints')
  for name, channels in (('one', 8), ('two', 8), ('base', 4)):
    unet = tiny_models.TINY_UNET | {'in_channels': channels}
    weights.write(tiny_models.checkpoint(unet), folder / name)
  (folder / 'clip').mkdir()
  tiny_models.write_clip(folder / 'clip')
  return folder


@pytest.mark.long
def test_figure_8_says_its_cost_and_draws_curves(ip2p, data, checkpoints, tmp_path):
  words = ['evaluate', data, tmp_path / 'out', '--figure', 8, '--ckpt', checkpoints / 'one']
  words += ['--base', checkpoints / 'base', '--clip', checkpoints / 'clip', '--resolution', 16]
  words += ['--steps', 1, '--set', 'steps=4', '--samples', 2]
  code, output = ip2p(*words)
  assert code == 0
  # 2 rows: 2 predictions at image scale 1, 3 at six others; SDEdit does 1 to 3 of 4 steps, twice.
  assert 'one: 7 points of 2 rows, 40 predictions of the network' in output
  assert 'sdedit-caption: 7 points of 2 rows, 56 predictions' in output
  assert output.index('altogether 152 predictions') < output.index('one, 1: ')
  for curve, label in (('one', '2.2'), ('sdedit-instruction', '0.9')):
    assert len(list((tmp_path / 'out' / curve / label / 'edits').glob('*.png'))) == 2
  report = (tmp_path / 'out' / 'report.md').read_text()
  assert '| sdedit-caption/0.3 | 2 |' in report and '* CLIP ' in report
  assert (tmp_path / 'out' / 'report.png').exists()


@pytest.mark.long
def test_figure_10_compares_editors_and_continues(ip2p, data, checkpoints, tmp_path):
  words = ['evaluate', data, tmp_path / 'out', '--figure', 10, '--ckpt', checkpoints / 'one']
  words += ['--ckpt', checkpoints / 'two', '--clip', checkpoints / 'clip', '--resolution', 16]
  words += ['--steps', 1, '--samples', 2]
  assert ip2p(*words)[0] == 0
  report = (tmp_path / 'out' / 'report.md').read_bytes()
  edits = tmp_path / 'out' / 'two' / '1.4' / 'edits'
  files = {file: file.read_bytes() for file in edits.iterdir()}
  times = {file: file.stat().st_mtime_ns for file in edits.parents[2].rglob('*.png')}
  missing = min(files)
  missing.unlink()
  assert ip2p(*words)[0] == 0
  assert {file: file.read_bytes() for file in edits.iterdir()} == files
  changed = [file for file, time in times.items() if file.stat().st_mtime_ns != time]
  assert set(changed) == {missing, tmp_path / 'out' / 'report.png'}
  assert (tmp_path / 'out' / 'report.md').read_bytes() == report


def test_a_users_scorer_adds_scores(ip2p, data, outputs, tmp_path):
  (tmp_path / 'mine.py').write_text(MY_SCORER)
  words = 'evaluate', data, tmp_path / 'out', '--outputs', outputs, '--scorer'
  assert ip2p(*words, f'{tmp_path}/mine.py:scorer')[0] == 0
  lines = (tmp_path / 'out' / 'results-00000-of-00001.jsonl').read_text().splitlines()
  assert {json.loads(line)['id']: json.loads(line)['number'] for line in lines} == {
    '00000': 0, '00001': 1, '00002': 2
  }  # fmt: skip
  assert '* mine: none' in (tmp_path / 'out' / 'report.md').read_text()
  code, output = ip2p(*words, f'{tmp_path}/mine.py:scores')
  assert code == 2 and 'mine.py:scores: cannot be imported' in output


def test_kinds_of_edits_have_their_own_table(ip2p, data, outputs, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data, copy)
  file = copy / 'metadata.jsonl'
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  lines = [json.dumps(row | {'group': kind}) for row, kind in zip(rows, 'bab', strict=True)]
  file.write_text('\n'.join(lines))
  assert ip2p('evaluate', copy, tmp_path / 'out', '--outputs', outputs)[0] == 0
  report = (tmp_path / 'out' / 'report.md').read_text()
  assert '| group | images |' in report and report.index('| a | 1 |') < report.index('| b | 2 |')


def test_other_data_in_the_same_folder_is_refused(ip2p, data, tmp_path):
  words = 'evaluate', data, tmp_path / 'out', '--method', 'identity'
  assert ip2p(*words)[0] == 0
  other = tmp_path / 'other'
  shutil.copytree(data, other)
  for file in (other / 'pictures').iterdir():
    Image.fromarray(255 - np.asarray(Image.open(file).convert('RGB'))).save(file)
  code, output = ip2p('evaluate', other, *words[2:])
  assert code == 2 and 'has results of other settings (data)' in output


def test_a_refused_setting_leaves_no_folder(ip2p, data, outputs, tmp_path):
  assert ip2p('evaluate', data, tmp_path / 'out', '--outputs', tmp_path / 'nowhere')[0] == 2
  assert ip2p('evaluate', data, tmp_path / 'out', '--outputs', outputs)[0] == 0


def test_a_worker_without_rows_is_no_mistake(ip2p, data, outputs, tmp_path):
  words = 'evaluate', data, tmp_path / 'out', '--outputs', outputs, '--shard', '3/4'
  code, output = ip2p(*words)
  assert code == 0 and '0 of 3 rows so far' in output


def test_evaluations_of_one_folder_are_compared(ip2p, data, outputs, tmp_path):
  assert ip2p('evaluate', data, tmp_path / 'runs' / 'a', '--outputs', outputs)[0] == 0
  assert ip2p('evaluate', data, tmp_path / 'runs' / 'b', '--method', 'identity')[0] == 0
  folders = tmp_path / 'runs' / 'a', tmp_path / 'runs' / 'b'
  code, output = ip2p('compare', *folders, '-o', tmp_path / 'x')
  assert code == 0 and 'runs/b - runs/a: psnr ' in output
  assert 'no plot: the scores clip_sim_dir and clip_sim_image are not there' in output
  assert '* pixels: colours in 0..1' in (tmp_path / 'x' / 'report.md').read_text()


def test_scores_of_different_kinds_are_not_compared(ip2p, data, outputs, checkpoints, tmp_path):
  clip = '--clip', checkpoints / 'clip'
  for name, options in (('a', clip), ('b', (*clip, '--original-range')), ('c', ())):
    words = 'evaluate', data, tmp_path / name, '--outputs', outputs, *options
    assert ip2p(*words)[0] == 0
  words = 'compare', tmp_path / 'a', '-o', tmp_path / 'x', '--x', 'l1', '--y', 'ssim'
  code, output = ip2p(*words, tmp_path / 'b')
  assert code == 2 and 'their scores were computed in different ways' in output
  code, output = ip2p(*words, tmp_path / 'c')
  assert code == 0 and '| - |' in output


def test_a_comparison_shows_the_chosen_scores(ip2p, data, outputs, tmp_path):
  for name in ('one', 'two'):
    assert ip2p('evaluate', data, tmp_path / name / 'all', '--outputs', outputs)[0] == 0
  words = 'compare', tmp_path / 'one' / 'all', tmp_path / 'two' / 'all', '-o', tmp_path / 'x'
  assert ip2p(*words, '--x', 'l1', '--y', 'ssim', '--scores', 'psnr,ssim')[0] == 0
  assert '| method | images | psnr | ssim |\n' in (tmp_path / 'x' / 'report.md').read_text()
  code, output = ip2p(*words, '--x', 'l1', '--y', 'sim')
  assert code == 2 and 'there is no score sim; choose' in output


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
  (('--outputs', 'y', '--set', 'steps=3'), '--base and --set: of no use without'),
  (('--method', 'vae', '--base', 'x', '--set', 'steps=3'), 'steps is no setting of the method vae'),
  (('--method', 'vae', '--base', 'x', '--set', 'steps'), '--set steps: give a name and a value'),
  (('--method', 'ddim', '--base', 'x', '--set', 'steps=two'), "steps is 'two'; the method ddim"),
  (('--method', 'morph', '--base', 'x'), 'method'),
  (('--figure', '9', '--ckpt', 'x'), '--figure is 9'),
  (('--figure', '8', '--ckpt', 'x', '--base', 'y'), '--figure 8 needs --clip'),
  (('--figure', '8', '--ckpt', 'x', '--clip', 'y'), '--figure 8 needs one --ckpt'),
  (('--figure', '10', '--clip', 'y'), '--figure 10 needs --ckpt once for each editor'),
  (('--figure', '10', '--method', 'vae', '--clip', 'y'), '--figure 10 makes its own edits'),
  (('--figure', '8', '--ckpt', 'x', '--base', 'b', '--clip', 'y', '--set', 'strength=1'),
   '--set strength: --figure 8 has seven strengths of its own'),
  (('--figure', '10', '--ckpt', 'x', '--clip', 'y', '--cfg-image', '3'), '--cfg-image would do'),
  (('--figure', '10', '--ckpt', 'a/x', '--ckpt', 'b/x', '--clip', 'y'), "called 'x'; write NAME"),
  (('--method', 'vae', '--base', 'x', '--steps', '5'), '--steps would do nothing'),
  (('--outputs', 'y', '--seed', '5'), '--seed would do nothing: the edits of --outputs'),
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
