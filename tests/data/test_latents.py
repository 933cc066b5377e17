"""Precomputed latents: training from them sees the same as training from images."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tensorflow_datasets as tfds
import tiny_pairs
import tiny_training as tiny
import torch_models as reference
from flax import nnx

from ip2p_jax.data import examples, shards
from ip2p_jax.data.examples import Framing
from ip2p_jax.data.latents import pack_latents
from ip2p_jax.data.rows import Pair
from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer

torch = peers.module('torch')

R = 32
HALF = 2**-10  # float16 has 11 significant bits; then float32 sums that differ by their order
OPTIONS = {'batch_size': 8, 'workers': 1, 'say': lambda line: None}


@pytest.fixture(scope='module')
def tokenizer():
  return ClipTokenizer(reference.tokenizer_files())


@pytest.fixture(scope='module')
def packed(tmp_path_factory, tokenizer):
  """A function that packs rows and gives (the new folder, the summary)."""
  required = {
    'networks': tiny.networks(),
    'params': tiny.params()['vae'],
    'tokenizer': tokenizer,
    'resolution': R,
    'fingerprint': 'abc',
  }

  def pack(rows, folder=None, **options):
    folder = folder or tmp_path_factory.mktemp('latents') / 'set'
    return folder, pack_latents({'train': rows}, folder, **(required | OPTIONS | options))

  return pack


@pytest.fixture(scope='module')
def encode():
  """A function: uint8 [B, R, R, 3] -> (mean, log variance), as the training step computes them."""

  @jax.jit
  def moments(images):
    vae = nnx.merge(tiny.networks().vae_def, tiny.params()['vae'])
    return tuple(vae.encode(images.astype(jnp.float32) / 127.5 - 1))

  return moments


@pytest.fixture(scope='module')
def rows():
  """Two pairs of wide images each. Row 0 has several instructions and may not be mirrored."""
  rows = tiny_pairs.rows(5, pairs=2)
  texts = ('make it blue', 'turn left', 'more')
  return [rows[0]._replace(instructions=texts, may_flip=False), *rows[1:]]


@pytest.fixture(scope='module')
def folder(packed, rows):
  return packed(rows, shard_bytes=20_000)[0]


def read(folder):
  return shards.open_shards(folder, 'train')


def files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_half(stored, exact):
  assert stored.dtype == np.float16
  np.testing.assert_allclose(np.float32(stored), exact, rtol=HALF, atol=1e-4)


def test_both_mirrorings_are_encoded_as_in_training(folder, rows, encode):
  stored = read(folder)
  assert len(stored) == 5
  for row, latents in zip(rows, stored, strict=True):
    for k, pair in enumerate(row.pairs):
      for image, role in zip(pair, ('input', 'edited'), strict=True):
        pixels = tiny_pairs.decoded(image, R)
        mean, log_variance = encode(np.stack([pixels, pixels[:, ::-1]]))
        assert_half(getattr(latents, f'{role}_mean')[k], mean)
        if role == 'edited':
          assert_half(latents.edited_log_variance[k], log_variance)
        # Pixels are mirrored, not latents.
        assert np.abs(mean[1] - mean[0][:, ::-1]).max() > 0.1


def test_latents_agree_with_diffusers(folder, rows):
  pixels = np.stack([tiny_pairs.decoded(row.pairs[1].edited_image, R) for row in rows])
  pixels = pixels[:, :, ::-1]
  with torch.no_grad():
    posterior = tiny.models()['vae'].encode(reference.nchw(np.float32(pixels) / 127.5 - 1))
  stored = read(folder)
  mean = np.stack([latents.edited_mean[1, 1] for latents in stored])
  log_variance = np.stack([latents.edited_log_variance[1, 1] for latents in stored])
  assert_half(mean, reference.nhwc(posterior.latent_dist.mean))
  assert_half(log_variance, reference.nhwc(posterior.latent_dist.logvar))


@pytest.mark.parametrize('resize', ['crop', 'squash'])
def test_training_draws_the_same_examples_from_latents(packed, rows, tokenizer, encode, resize):
  framing = Framing(R, resize=resize)
  for seed, (row, latents) in enumerate(
    zip(rows, read(packed(rows, resize=resize)[0]), strict=True)
  ):
    for draw in range(6):
      rng = lambda seed=seed, draw=draw: np.random.default_rng([seed, draw])
      online = examples.example(row, rng(), framing, tokenizer)
      stored = examples.latent_example(latents, rng(), framing)
      np.testing.assert_array_equal(stored['token_ids'], online['token_ids'])
      mean, log_variance = encode(np.stack([online['input_image'], online['edited_image']]))
      assert_half(stored['input_mean'], mean[0])
      assert_half(stored['edited_mean'], mean[1])
      assert_half(stored['edited_log_variance'], log_variance[1])


def test_names_tokens_and_mirroring_are_stored(folder, rows, tokenizer):
  stored = read(folder)
  assert [latents.name for latents in stored] == [row.name for row in rows]
  assert [latents.may_flip for latents in stored] == [False, True, True, True, True]
  assert stored[0].token_ids.dtype == np.int32
  for row, latents in zip(rows, stored, strict=True):
    np.testing.assert_array_equal(latents.token_ids, tokenizer(row.instructions))


def test_the_description_has_resolution_and_fingerprint(folder):
  description = shards.describe(folder)
  assert description['kind'] == 'latents' and description['splits'] == {'train': 5}
  assert description['resolution'] == R and description['fingerprint'] == 'abc'
  settings = description['settings']
  assert settings['has_input'] and settings['latent_shape'] == [8, 8, 4]


def test_captioned_images_have_no_input(packed, rows, encode):
  captioned = [row._replace(pairs=(Pair(None, row.pairs[1].edited_image),)) for row in rows]
  stored = read(packed(captioned)[0])
  assert stored[2].input_mean is None
  mean, _ = encode(np.stack([tiny_pairs.decoded(rows[2].pairs[1].edited_image, R)] * 2))
  assert_half(stored[2].edited_mean[0, 0], mean[0])


def test_tensorflow_datasets_reads_the_folder(folder):
  source = tfds.builder_from_directory(folder).as_data_source(split='train')
  latents = read(folder)[1]
  for name in ('token_ids', 'input_mean', 'edited_mean', 'edited_log_variance'):
    value = source[1][name]
    np.testing.assert_array_equal(value, getattr(latents, name))
    assert value.dtype == getattr(latents, name).dtype


@pytest.mark.parametrize(('batch_size', 'workers'), [(1, 4), (40, 0)])
def test_batches_and_threads_do_not_matter(packed, folder, rows, batch_size, workers):
  again = read(packed(rows, batch_size=batch_size, workers=workers)[0])
  for a, b in zip(read(folder), again, strict=True):
    for name in ('input_mean', 'edited_mean', 'edited_log_variance'):
      assert_half(getattr(a, name), np.float32(getattr(b, name)))


def test_bfloat16_is_a_coarser_encoder(packed, folder, rows):
  coarse = read(packed(rows, dtype='bfloat16')[0])[0].edited_mean
  error = reference.relative_error(coarse, np.float64(read(folder)[0].edited_mean))
  assert 1e-3 < error < 3e-2


def test_broken_rows_do_not_change_the_others(packed, folder, rows):
  bad = [*rows]
  bad[1] = rows[1]._replace(pairs=(Pair(b'', rows[1].pairs[0].edited_image),))
  with pytest.raises(InputError, match=r'1 broken row, .*row 1: the input image is missing'):
    packed(bad)
  path, summary = packed(bad, max_corrupt=1)
  assert summary.rows == {'train': 4} and 'row 1' in summary.skipped[0]
  for a, b in zip([read(folder)[i] for i in (0, 2, 3, 4)], read(path), strict=True):
    assert a.name == b.name
    assert_half(a.input_mean, np.float32(b.input_mean))


def test_a_killed_pack_continues_to_the_same_bytes(packed, folder, rows):
  class Source(list):
    def __init__(self, rows):
      super().__init__(rows)
      self.left = 2 * len(rows) - 1  # the plan reads each once, then they are read one by one

    def __getitem__(self, i):
      self.left -= 1
      if self.left < 0:
        raise KeyboardInterrupt
      return list.__getitem__(self, i)

  path = folder.parent / 'killed'
  with pytest.raises(KeyboardInterrupt):
    packed(Source(rows), path, shard_bytes=20_000, batch_size=1)
  with pytest.raises(InputError, match='run ip2p pack again'):
    read(path)
  assert list(path.glob('edits-*'))
  packed(rows, path, shard_bytes=20_000)
  assert files(folder) == files(path)


def test_machines_share_the_work(packed, folder, rows):
  path, first = packed(rows, shard='1/2', shard_bytes=20_000)
  assert not first.is_complete
  assert packed(rows, path, shard='0/2', shard_bytes=20_000)[1].is_complete
  assert files(folder) == files(path)


def test_a_pair_and_its_way_back_are_in_one_split(packed):
  there = tiny_pairs.rows(3)
  back = [row._replace(pairs=(Pair(*row.pairs[0][::-1]),), name=f'back {i}')
          for i, row in enumerate(there)]  # fmt: skip
  path, summary = packed([*there, *back], holdout=0.4)
  assert summary.rows == {'train': 4, 'validation': 2}
  held = shards.open_shards(path, 'validation')
  assert [row.name for row in held] == ['memory: row 2', 'back 2']


def test_latents_of_another_checkpoint_or_size_do_not_mix(packed, folder, rows):
  with pytest.raises(InputError, match='fingerprint was abc and is other now'):
    packed(rows, folder, fingerprint='other')
  with pytest.raises(InputError, match='resolution was 32 and is 64 now'):
    packed(rows, folder, resolution=64)


def test_latents_are_not_packed_again(packed, folder):
  with pytest.raises(InputError, match='as latents already'):
    packed(read(folder))


def test_an_encoder_that_overflows_is_reported(packed, rows):
  params = jax.tree.map(lambda leaf: 1e30 * leaf, tiny.params()['vae'])
  with pytest.raises(InputError, match='row 0: the VAE gives values that are not finite'):
    packed(rows, params=params)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'resolution': 34}, 'multiple of 4'),
    ({'resolution': 4}, 'resolution is 4'),
    ({'resize': 'stretch'}, "'stretch'"),
    ({'dtype': 'float16'}, "'float16'"),
    ({'batch_size': 0}, 'batch_size is 0'),
  ],
)
def test_impossible_values_are_refused(packed, rows, tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    packed(rows, tmp_path / 'set', **options)
  assert not (tmp_path / 'set').exists()
