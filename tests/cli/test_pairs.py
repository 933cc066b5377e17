"""`ip2p pairs` and `ip2p filter`, from files to files."""

import json

import pytest
import tiny_models

from ip2p_jax import weights
from ip2p_jax.data.sources import open_source
from ip2p_jax.images import read_settings

COARSE = tiny_models.TINY_UNET | {
  'in_channels': 4,
  'down_block_types': ['CrossAttnDownBlock2D'] * 2,
  'up_block_types': ['CrossAttnUpBlock2D'] * 2,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A checkpoint, a CLIP and prompts."""
  folder = tmp_path_factory.mktemp('pairs')
  weights.write(tiny_models.checkpoint(COARSE), folder / 'ckpt')
  (folder / 'clip').mkdir()
  tiny_models.write_clip(folder / 'clip', 32)
  lines = [
    {'input': f'a cat {i}', 'edit': 'make it a dog', 'output': f'a dog {i}'} for i in range(12)
  ]
  (folder / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  return folder


def drawing(folder, out, *more, samples=('--samples', 2)):
  models = ('--ckpt', folder / 'ckpt', '--clip', folder / 'clip')
  small = ('--steps', 2, '--size', 32)
  return ('pairs', folder / 'prompts.jsonl', out, *models, *samples, *small, *more)


@pytest.mark.long
def test_from_prompts_to_a_data_set(ip2p, folder, tmp_path):
  for i in range(2):
    status, output = ip2p(*drawing(folder, tmp_path / 'raw', '--shard', f'{i}/2'))
    assert status == 0 and '12 pairs' in output
  status, output = ip2p('filter', tmp_path / 'raw', tmp_path / 'none', '--image', 1)
  assert status == 2 and 'clip_sim_dir >= 0.2 (direction)' in output
  assert output.endswith(
    'no pair passes all thresholds, so there is nothing to write; lower them.\n'
  )
  loose = ('--image', '-1', '--caption', '-1', '--direction', '-1', '--most', 1)
  status, output = ip2p('filter', tmp_path / 'raw', tmp_path / 'pairs', *loose)
  assert status == 0 and '12 pairs of 12 prompts' in output
  assert (tmp_path / 'pairs' / 'histograms.png').exists()
  assert ip2p('check', tmp_path / 'pairs')[0] == 0
  status, output = ip2p('filter', tmp_path / 'pairs', tmp_path / 'again', *loose)
  assert status == 2 and 'was filtered already; give the folder that it came from' in output
  status, output = ip2p(
    'pack', tmp_path / 'pairs', tmp_path / 'shards', '--size', 32, '--workers', 0
  )
  assert status == 0 and '12 train' in output
  (tmp_path / '.straight.tmp' / 'pairs').mkdir(parents=True)  # left by a killed run
  status, output = ip2p('filter', tmp_path / 'raw', tmp_path / 'straight', *loose, '--shards')
  assert status == 0 and '12 pairs of 12 prompts' in output
  rows = [[row.edited_caption for row in open_source(str(tmp_path / name), 'train')]
          for name in ('shards', 'straight')]  # fmt: skip
  assert rows[0] == rows[1] and len(rows[0]) == 12
  status, output = ip2p('filter', tmp_path / 'raw', tmp_path / 'empty', '--image', '1', '--shards')
  assert status == 2 and 'nothing to pack' in output
  assert {file.name for file in tmp_path.iterdir()} == {'raw', 'pairs', 'shards', 'straight'}

  status, output = ip2p(*drawing(folder, tmp_path / 'raw', '--seed', 1))
  assert status == 2 and 'was drawn with seed 0, not 1' in output
  for part in ('vae', 'text_encoder'):  # images depend on all parts, not only on the UNet
    changed = tiny_models.checkpoint(COARSE)
    changed.tensors[part] = {name: -tensor for name, tensor in changed.tensors[part].items()}
    weights.write(changed, tmp_path / part)
    status, output = ip2p(*drawing(folder, tmp_path / 'raw', '--ckpt', tmp_path / part))
    assert status == 2 and f'was drawn with {part} ' in output


@pytest.mark.long
def test_attention_is_shown(ip2p, folder, tmp_path):
  defaults = ('--threshold', 0.1, 0.9, '--keep', 'all')  # no effect here, but accepted
  words = ('--control', 'auto', '--show-attention', 1, *defaults)
  words = drawing(folder, tmp_path / 'maps', *words, samples=())
  assert ip2p(*words)[0] == 0
  (file,) = (tmp_path / 'maps').iterdir()
  assert read_settings(file)['output'] == 'a dog 0'


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--control', 'p2p'), 'control is'),
    (('--shard', '2/2'), 'shard is'),
    (('--threshold', '0.9', '0.1'), 'threshold is 0.9 to 0.1'),
    (('--batch-size', 3), 'multiple of the 8 devices'),
    (('--dtype', 'float16'), "--dtype is 'float16'"),
    (('--control', 'none', '--threshold', '0.2', '0.9'), '--threshold would do nothing'),
    (('--control', 'auto', '--threshold', '0.2', '0.9'), '--threshold would do nothing'),
    (('--cross-steps', '0.5'), '--cross-steps would do nothing: no attention'),
    (('--control', 'none', '--self-steps', '0.5'), '--self-steps would do nothing'),
    (('--guidance', '1', '1', '--negative', 'x'), '--negative would do nothing'),
    (('--show-attention', '1'), '--samples would do nothing: --show-attention'),
    (('--clip', 'nowhere'), 'nowhere: no CLIP here'),
    (('--ckpt', 'nowhere'), 'nowhere'),
  ],
)
def test_a_mistake_is_one_line(words, message, ip2p, folder, tmp_path):
  status, output = ip2p(*drawing(folder, tmp_path / 'raw', *words))
  assert status == 2 and message in output and output.count('\n') == 1
  assert not (tmp_path / 'raw').exists()


def test_filter_refuses_impossible_options(ip2p, folder, tmp_path):
  assert 'has no pairs' in ip2p('filter', folder, tmp_path / 'out')[1]
  assert 'then a new one' in ip2p('filter', folder)[1]
  words = ('filter', folder, tmp_path / 'out')
  assert "--preset is 'mine'" in ip2p(*words, '--preset', 'mine')[1]
  assert 'leave out one of them' in ip2p(*words, '--preset', 'paper', '--image', 0.8)[1]
  assert '--image, --caption and --direction are cosines' in ip2p(*words, '--direction', 'nan')[1]
  assert 'are cosines' in ip2p(*words, '--image', 75)[1]
  assert '--holdout is only for --shards' in ip2p(*words, '--holdout', 0.1)[1]


def test_one_message_has_all_faults_of_a_file(ip2p, folder, tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  words = {'input': 'a cat', 'edit': 'make it a dog', 'output': 'a dog', 'weights': {'tree': 2}}
  prompts.write_text(json.dumps({'input': 'a cat'}) + '\n' + json.dumps(words))
  command = [prompts if word == folder / 'prompts.jsonl' else word for word in drawing(
    folder, tmp_path / 'raw', '--control', 'auto'
  )]  # fmt: skip
  status, output = ip2p(*command)
  assert status == 2 and "line 1 has no text 'output'; line 1 has no text 'edit'" in output
  assert "line 2: the word 'tree' is not in 'a dog'" in output and not (tmp_path / 'raw').exists()
