"""`ip2p pairs` and `ip2p filter`, from files to files."""

import json
import sys

import pytest
import torch_models as reference

from ip2p_jax import cli, weights
from ip2p_jax.data.sources import open_source
from ip2p_jax.images import read_settings

COARSE = reference.TINY_UNET | {
  'in_channels': 4,
  'down_block_types': ['CrossAttnDownBlock2D'] * 2,
  'up_block_types': ['CrossAttnUpBlock2D'] * 2,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A checkpoint, a CLIP and prompts."""
  folder = tmp_path_factory.mktemp('pairs')
  weights.write(reference.checkpoint(COARSE)[0], folder / 'ckpt')
  (folder / 'clip').mkdir()
  reference.write_clip(folder / 'clip', 32)
  lines = [
    {'input': f'a cat {i}', 'edit': 'make it a dog', 'output': f'a dog {i}'} for i in range(12)
  ]
  (folder / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  return folder


@pytest.fixture
def ip2p(folder, monkeypatch, capsys):
  """Runs the command with these words: (status, stderr)."""
  monkeypatch.setattr(cli, 'cache_compilations', lambda: None)

  def run(*words):
    monkeypatch.setattr(sys, 'argv', ['ip2p', *map(str, words)])
    with pytest.raises(SystemExit) as stop:
      cli.main()
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out + printed.err

  return run


def drawing(folder, out, *more):
  models = ('--ckpt', folder / 'ckpt', '--clip', folder / 'clip')
  small = ('--samples', 2, '--steps', 2, '--size', 32)
  return ('pairs', folder / 'prompts.jsonl', out, *models, *small, *more)


def test_from_prompts_to_a_data_set(ip2p, folder, tmp_path):
  for i in range(2):
    status, said = ip2p(*drawing(folder, tmp_path / 'raw', '--shard', f'{i}/2'))
    assert status == 0 and '12 pairs' in said
  status, said = ip2p('filter', tmp_path / 'raw', tmp_path / 'none')
  assert status == 0 and 'clip_sim_dir >= 0.2 (direction)' in said
  loose = ('--image', '-1', '--caption', '-1', '--direction', '-1', '--most', 1)
  status, said = ip2p('filter', tmp_path / 'raw', tmp_path / 'pairs', *loose)
  assert status == 0 and '12 pairs of 12 prompts' in said
  assert (tmp_path / 'pairs' / 'histograms.png').exists()
  assert ip2p('check', tmp_path / 'pairs')[0] == 0
  status, said = ip2p('pack', tmp_path / 'pairs', tmp_path / 'shards', '--size', 32, '--workers', 0)
  assert status == 0 and '12 train' in said
  status, said = ip2p('filter', tmp_path / 'raw', tmp_path / 'straight', *loose, '--shards')
  assert status == 0 and '12 pairs of 12 prompts' in said
  rows = [[row.edited_caption for row in open_source(str(tmp_path / name), 'train')]
          for name in ('shards', 'straight')]  # fmt: skip
  assert rows[0] == rows[1] and len(rows[0]) == 12
  status, said = ip2p('filter', tmp_path / 'raw', tmp_path / 'empty', '--image', '1.1', '--shards')
  assert status == 2 and 'nothing to pack' in said
  assert {file.name for file in tmp_path.iterdir()} == {
    'raw',
    'none',
    'pairs',
    'shards',
    'straight',
  }

  status, said = ip2p(*drawing(folder, tmp_path / 'raw', '--seed', 1))
  assert status == 2 and 'was drawn with seed 0, not 1' in said


def test_attention_is_shown(ip2p, folder, tmp_path):
  status, _ = ip2p(*drawing(folder, tmp_path / 'maps', '--control', 'auto', '--show-attention', 1))
  assert status == 0
  (file,) = (tmp_path / 'maps').iterdir()
  assert read_settings(file)['output'] == 'a dog 0'


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--control', 'p2p'), 'control is'),
    (('--shard', '2/2'), 'shard is'),
    (('--threshold', '0.9', '0.1'), 'threshold is 0.9 to 0.1'),
    (('--batch-size', 3), 'multiple of the 8 devices'),
    (('--clip', 'nowhere'), 'nowhere: no CLIP here'),
    (('--ckpt', 'nowhere'), 'nowhere'),
  ],
)
def test_a_mistake_is_one_line(words, message, ip2p, folder, tmp_path):
  status, said = ip2p(*drawing(folder, tmp_path / 'raw', *words))
  assert status == 2 and message in said and said.count('\n') == 1
  assert not (tmp_path / 'raw').exists()


def test_filter_says_what_it_lacks(ip2p, folder, tmp_path):
  assert 'has no pairs' in ip2p('filter', folder, tmp_path / 'out')[1]
  assert 'then a new one' in ip2p('filter', folder)[1]
  assert "--preset is 'mine'" in ip2p('filter', folder, tmp_path / 'out', '--preset', 'mine')[1]
