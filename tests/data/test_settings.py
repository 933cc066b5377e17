"""Every data setting, and every option of pack and check, acts on a layout or is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tiny_pairs
from pyarrow import parquet

from ip2p_jax.config import DataConfig, TrainConfig
from ip2p_jax.data import loader, shard_writing, shards
from ip2p_jax.data.pack import pack
from ip2p_jax.data.pack_plan import make_plan
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.errors import InputError
from ip2p_jax.training.start import framing_of, open_data

SIDE, LATENT = 32, 8
MINIATURE = Path(__file__).parents[2] / 'assets' / 'miniature'
LAYOUTS = ('metadata', 'parquet', 'original', 'shards', 'latents')


def write_latents(folder, count=12):
  """Random latents, packed with `--resize crop`; only every second row may be mirrored."""
  rng = np.random.default_rng(0)
  draw = lambda: rng.normal(size=(1, 2, LATENT, LATENT, 4)).astype(np.float16)
  rows = [
    LatentRow(f'row {i}', np.full((1, 77), i, np.int32), draw(), draw(), draw(), i % 2 == 0)
    for i in range(count)
  ]
  settings = {
    'has_input': True, 'resolution': SIDE, 'resize': 'crop', 'dtype': 'float32',
    'fingerprint': 'abc', 'latent_shape': [LATENT, LATENT, 4], 'tokens': 77,
  }  # fmt: skip
  plan = make_plan('latents', settings, {'train': rows}, {'train': []}, len, 1 << 20)
  job = shard_writing.begin(folder, plan, '0/1', 0)
  (shard,) = job.todo
  examples = map(shards.latent_example, rows)
  shard_writing.work(
    job, [(shard, shard_writing.write_shard(folder, plan, shard, examples))], str, lambda *_: None
  )
  shard_writing.finish(job)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A folder with a data set in every layout."""
  folder = tmp_path_factory.mktemp('layouts')
  odd = {'vorher': 'input', 'edited_image': 'edited', 'edit': 'instruction', 'src_img': 'edited'}
  sided = lambda row, i: row._replace(may_flip=i % 2 == 0)
  tiny_pairs.write_metadata(folder / 'metadata', 12, columns=odd)
  tiny_pairs.write_parquet(folder / 'parquet' / 'a.parquet', 12, columns=odd)
  for name in ('metadata', 'parquet'):
    swap_sides(folder / name)
  tiny_pairs.write_original(folder / 'original', prompts=12)
  for prompt in sorted((folder / 'original').glob('*/prompt.json'))[::2]:
    prompt.write_text(prompt.read_text().replace('make it', 'turn left, make it'))
  rows = [sided(row, i) for i, row in enumerate(tiny_pairs.rows(12))]
  pack({'train': rows}, folder / 'shards', size=SIDE, workers=0, say=str)
  write_latents(folder / 'latents')
  return folder


def swap_sides(folder):
  """Adds a side to every second instruction of a table, which forbids mirroring."""
  file = next(path for path in folder.iterdir() if path.is_file())
  if file.suffix == '.jsonl':
    lines = file.read_text().splitlines()
    lines[::2] = [line.replace('make it', 'turn left, make it') for line in lines[::2]]
    file.write_text('\n'.join(lines))
    return
  table = parquet.read_table(file)
  texts = [
    f'turn left, {text}' if i % 2 else text for i, text in enumerate(table['edit'].to_pylist())
  ]
  parquet.write_table(table.set_column(table.column_names.index('edit'), 'edit', [texts]), file)


def tokens(texts):
  return np.array([[len(text)] * 77 for text in texts], np.int32)


def first_batch(path, **settings):
  config = TrainConfig(
    resolution=settings.pop('resolution', SIDE),
    data=dataclasses.replace(DataConfig(path=str(path), workers=0), **settings),
  )
  opened = open_data(config)
  return loader.batch_at(
    opened.train, opened.weights, seed=1, batch_size=24, rows=np.arange(24), step=0,
    framing=framing_of(config), tokenizer=tokens,
  )  # fmt: skip


def differ(a, b):
  return any(not np.array_equal(a[key], b[key]) for key in a)


NO_COLUMNS = 'has no columns to choose from'
NO_EFFECT = 'holds latents, on which a setting has no effect'
# A setting, and the messages of the layouts that refuse it. It must act on the others.
SETTINGS = [
  (
    {'columns': 'input=src_img'},
    {'original': NO_COLUMNS, 'shards': NO_COLUMNS, 'latents': NO_COLUMNS},
  ),
  ({'resize': 'squash'}, {'latents': f'{NO_EFFECT}: data.resize squash'}),
  ({'largest_resize': 36}, {'latents': f'{NO_EFFECT}: data.largest_resize 36'}),
  ({'largest_resize': 40}, {'latents': NO_EFFECT, 'shards': 'packed for 32 px, and data.largest'}),
  ({'flip_rate': 0.0}, {}),
  ({'flip_rate': 1.0}, {}),
  ({'flip_directions': True}, {}),
  (
    {'flip_rate': 0.0, 'flip_directions': True},
    dict.fromkeys(LAYOUTS, 'data.flip_directions has no effect'),
  ),
  (
    {'resize': 'squash', 'largest_resize': 32},
    dict.fromkeys(LAYOUTS, 'so there is only one crop'),
  ),
  ({'workers': 3}, {'latents': f'{NO_EFFECT}: data.workers 3'}),
  ({'resolution': 36}, {}),
  ({'resolution': 64}, {'shards': 'packed for 32 px, and resolution 64 would enlarge'}),
]


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('setting', 'refused'), SETTINGS, ids=str)
def test_a_data_setting_acts_or_is_refused(data, layout, setting, refused):
  usual = {'columns': 'input=vorher'} if layout in ('metadata', 'parquet') else {}
  if layout in refused:
    with pytest.raises(InputError, match=refused[layout]):
      first_batch(data / layout, **(usual | setting))
    return
  changed = first_batch(data / layout, **(usual | setting))
  if 'workers' in setting or (layout == 'latents' and 'resolution' in setting):
    return  # workers change no number; the checkpoint decides on a resolution
  assert differ(first_batch(data / layout, **usual), changed)


def test_defaults_are_never_refused(data):
  for layout in ('original', 'shards', 'latents'):
    open_data(TrainConfig(resolution=SIDE, data=DataConfig(path=str(data / layout))))


def test_columns_of_a_mixture_must_be_in_one_of_its_tables(data):
  config = TrainConfig(resolution=SIDE)
  config.data.path = f'{data / "metadata"},{data / "original"}'
  config.data.columns = 'input=vorher'
  assert len(open_data(config).train) == 2
  config.data.columns = 'input=vorher,input=vorhin'
  with pytest.raises(InputError, match="there is no column 'vorhin'; the columns are vorher"):
    open_data(config)


ONLY_LATENTS = 'is only for --latents'
# Options of a command, and the messages of the layouts that refuse them.
OPTIONS = [
  (('--resize', 'squash'), dict.fromkeys(LAYOUTS, f'--resize {ONLY_LATENTS}')),
  (('--dtype', 'bfloat16'), dict.fromkeys(LAYOUTS, f'--dtype {ONLY_LATENTS}')),
  (('--batch-size', '4'), dict.fromkeys(LAYOUTS, f'--batch-size {ONLY_LATENTS}')),
  (('--ckpt', 'checkpoint'), dict.fromkeys(LAYOUTS, f'--ckpt {ONLY_LATENTS}')),
  (('--size', '64'), {'shards': 'packed for 32 px, and --size 64 would scale them up'}),
  (('--holdout', '0.25'), {}),
  (('--columns', 'input=src_img'), dict.fromkeys(('original', 'shards', 'latents'), NO_COLUMNS)),
  (('--columns', 'image=edit'), dict.fromkeys(('metadata', 'parquet'), 'does not fit edit')),
]


@pytest.mark.parametrize(('words', 'refused'), OPTIONS, ids=str)
def test_an_option_of_pack_acts_or_is_refused(ip2p, data, tmp_path, words, refused):
  for layout in LAYOUTS[:4]:
    usual = ('--columns', 'input=vorher') if layout in ('metadata', 'parquet') else ()
    usual = usual if '--columns' not in words else ()
    out = tmp_path / layout
    status, output = ip2p('pack', data / layout, out, '--workers', 0, *usual, *words)
    if layout in refused:
      assert (status, output.count('\n')) == (2, 1) and refused[layout] in output
      assert not out.exists()
    elif '--columns' not in words or layout in ('metadata', 'parquet'):
      assert status == 0, output
      assert bool(shards.describe(out)['splits'].get('validation')) == (
        '--holdout' in words or layout == 'original'
      )


def test_images_packed_again_keep_their_size(ip2p, data, tmp_path):
  for words, size in (((), SIDE), (('--size', 0), SIDE), (('--size', 16), 16)):
    out = tmp_path / f'{len(list(tmp_path.iterdir()))}'
    assert ip2p('pack', data / 'shards', out, '--workers', 0, *words)[0] == 0
    assert shards.describe(out)['settings']['size'] == size
  assert 'as latents already' in ip2p('pack', data / 'latents', tmp_path / 'x', '--workers', 0)[1]


def test_an_option_of_check_acts_or_is_refused(ip2p, data):
  for layout in ('original', 'shards', 'latents'):
    status, output = ip2p('check', data / layout, '--columns', 'input=vorher')
    assert status == 2 and NO_COLUMNS in output
  for layout, split in (('parquet', 'test'), ('shards', 'validation'), ('latents', 'test')):
    usual = ('--columns', 'input=vorher') if layout == 'parquet' else ()
    status, output = ip2p('check', data / layout, *usual, '--split', split)
    assert status == 2 and f'has no rows in the split {split}' in output
  for words in (('--columns', 'input=a'), ('--limit', 3), ('--split', 'test'),
                ('--task', 'text_to_image')):  # fmt: skip
    status, output = ip2p('check', MINIATURE, *words)
    assert status == 2 and f'is a checkpoint, and {words[0]} is for data sets' in output
  assert ip2p('check', data / 'original', '--split', 'test', '--limit', 3)[0] == 0


def test_a_data_set_that_edits_nothing_does_not_pass(ip2p, tmp_path):
  images = [tiny_pairs.photo(i) for i in range(12)]
  almost_same = [*images[:11], tiny_pairs.photo(99)]
  for name, edited, expected in (('same', almost_same, 2), ('other', images[::-1], 0)):
    table = {'input_image': images, 'edited_image': edited, 'edit': ['make it red'] * 12}
    parquet.write_table(pyarrow.table(table), tmp_path / f'{name}.parquet')
    status, output = ip2p('check', tmp_path / f'{name}.parquet')
    assert status == expected, output
    assert ('in 11 of 12 pairs both images are the same' in output) == (name == 'same')
