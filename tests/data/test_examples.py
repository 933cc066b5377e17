import io

import numpy as np
import pytest
import tiny_pairs
from PIL import Image

from ip2p_jax.data import examples
from ip2p_jax.data.examples import Framing
from ip2p_jax.data.rows import LatentRow, Pair, Row
from ip2p_jax.errors import InputError

ORIENTATION = 0x0112


def encode(array, format='PNG', **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(array).save(file, format, **options)
  return file.getvalue()


def noise(seed, width=20, height=20, channels=3):
  return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def row_of(*arrays, **fields) -> Row:
  """A row of one pair: the input and the edited image, or only the edited one."""
  files = [encode(array) for array in arrays]
  return Row('row 3', ('make it winter',), (Pair(*[None, *files][-2:]),), **fields)


def tokenizer(texts):
  return np.array([[len(text), ord(text[0])] for text in texts])


def settings(resolution=16, task='edit', **data) -> Framing:
  return Framing(resolution, task, **data)


def drawn(row, framing, seeds=range(200)):
  return [examples.example(row, np.random.default_rng(s), framing, tokenizer) for s in seeds]


# One image


def test_a_square_image_is_resized_as_in_the_original():
  array = noise(0, 37, 37)
  expected = np.asarray(Image.fromarray(array).resize((16, 16), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(tiny_pairs.decoded(encode(array), 16), expected)
  wide = noise(0, 50, 30)
  expected = np.asarray(Image.fromarray(wide).resize((16, 16), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(tiny_pairs.decoded(encode(wide), 16, 'squash'), expected)


@pytest.mark.parametrize(('width', 'height'), [(70, 40), (33, 77), (12, 11), (900, 9)])
def test_a_crop_resizes_the_short_side_and_keeps_the_centre(width, height):
  array = noise(1, width, height)
  size = [round(side * 16 / min(width, height)) for side in (width, height)]
  resized = np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))
  top, left = (size[1] - 16) // 2, (size[0] - 16) // 2
  expected = resized[top : top + 16, left : left + 16].astype(int)
  difference = np.abs(tiny_pairs.decoded(encode(array), 16) - expected)
  assert difference.max() <= 2 and (difference > 0).mean() < 0.02  # Pillow's boxes are float32


def test_an_image_is_upright_rgb_on_white():
  array = noise(2)
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  turned = tiny_pairs.decoded(encode(np.rot90(array), exif=exif), 20)
  np.testing.assert_array_equal(turned, array)
  clear = np.zeros((20, 20, 4), np.uint8)
  np.testing.assert_array_equal(tiny_pairs.decoded(encode(clear), 16), np.full((16, 16, 3), 255))
  grey = tiny_pairs.decoded(encode(array[..., 0]), 20)
  np.testing.assert_array_equal(grey, np.repeat(array[..., :1], 3, axis=-1))


@pytest.mark.parametrize('spoil', [lambda b: b[:200], lambda b: b'', lambda b: b'no image'])
def test_a_broken_image_is_named(spoil):
  with pytest.raises(InputError, match='photos: line 3'):
    tiny_pairs.decoded(spoil(encode(noise(0), 'JPEG')), 16, name='photos: line 3')


def test_an_image_of_few_pixels_is_refused():
  with pytest.raises(InputError, match='20x7; give at least 8x8 pixels'):
    tiny_pairs.decoded(encode(noise(0, 20, 7)), 16)


# Pairs of images


def test_an_example_has_these_arrays():
  array = noise(0, 16, 16)
  framing = settings(flip_rate=0.0)
  example = examples.example(row_of(array, array), np.random.default_rng(0), framing, tokenizer)
  np.testing.assert_array_equal(example['input_image'], array)
  np.testing.assert_array_equal(example['edited_image'], array)
  np.testing.assert_array_equal(example['token_ids'], [14, ord('m')])
  assert example['token_ids'].dtype == np.int32 and example['weight'].dtype == np.float32
  assert example['weight'] == 1 and example['error'] == ''


@pytest.mark.parametrize('resize', ['crop', 'squash'])
def test_both_images_are_cut_and_mirrored_alike(resize):
  array = noise(0, 40, 30)
  framing = settings(resize=resize, largest_resize=24)
  different = set()
  for example in drawn(row_of(array, 255 - array), framing, range(40)):
    total = example['input_image'].astype(int) + example['edited_image']
    assert np.abs(total - 255).max() <= 2  # Lanczos is linear, but rounds twice
    different.add(example['input_image'].tobytes())
  assert len(different) > 35


def test_by_default_half_of_the_examples_are_mirrored():
  array = noise(0, 16, 16)
  mirrored = 0
  for example in drawn(row_of(array, array), settings(), range(400)):
    mirrored += (is_mirrored := not (example['input_image'] == array).all())
    expected = array[:, ::-1] if is_mirrored else array
    np.testing.assert_array_equal(example['input_image'], expected)
    np.testing.assert_array_equal(example['edited_image'], expected)
  assert 160 < mirrored < 240  # 4 standard deviations


def test_left_and_right_are_mirrored_only_on_demand():
  array = noise(0, 16, 16)
  row = row_of(array, array, may_flip=False)
  unchanged = drawn(row, settings(flip_rate=1.0), range(20))
  assert all((example['input_image'] == array).all() for example in unchanged)
  mirrored = drawn(row, settings(flip_rate=1.0, flip_directions=True), range(20))
  assert all((example['input_image'] == array[:, ::-1]).all() for example in mirrored)


def test_a_random_crop_reaches_every_place():
  columns = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None], (16, 32, 3)).copy()
  framing = settings(largest_resize=16, flip_rate=0.0)
  crops = drawn(row_of(columns, columns), framing, range(300))
  assert {int(example['input_image'][0, 0, 0]) for example in crops} == set(range(17))
  rows = columns.transpose(1, 0, 2).copy()
  crops = drawn(row_of(rows, rows), framing, range(300))
  assert {int(example['input_image'][0, 0, 0]) for example in crops} == set(range(17))


def test_the_short_side_is_drawn_up_to_the_largest():
  steps = (np.arange(240) // 10).astype(np.uint8)  # 24 levels: one per pixel at a short side of 24
  array = np.broadcast_to(steps[None, :, None], (240, 240, 3)).copy()
  framing = settings(largest_resize=24, flip_rate=0.0)
  widths = []
  for example in drawn(row_of(array, array), framing, range(100)):
    line = example['input_image'][0, :, 0].astype(int)
    widths.append(24 / (line[-1] - line[0]) * 15)  # width of the whole image in pixels
  assert min(widths) == pytest.approx(16, abs=1) and max(widths) == pytest.approx(24, abs=1)


def test_an_edited_image_is_resized_to_the_input():
  smooth = np.add.outer(np.arange(64), np.arange(96))[..., None].repeat(3, -1).astype(np.uint8)
  half = np.asarray(Image.fromarray(smooth).resize((48, 31), Image.Resampling.BOX))
  for example in drawn(row_of(smooth, half), settings(largest_resize=20), range(20)):
    difference = example['input_image'].astype(int) - example['edited_image']
    assert np.abs(difference).max() <= 4


@pytest.mark.parametrize(
  ('width', 'accepted'), [(104, True), (106, False), (97, True), (94, False)]
)
def test_images_of_a_pair_must_have_about_the_same_shape(width, accepted):
  row = row_of(noise(0, 100, 100), noise(0, width, 100))
  if accepted:
    assert drawn(row, settings(), [0])[0]['weight'] == 1
  else:
    with pytest.raises(InputError, match=f'row 3.*100x100.*{width}x100'):
      drawn(row, settings(), [0])


def test_a_broken_image_of_a_pair_is_named():
  good, bad = encode(noise(0), 'JPEG'), encode(noise(0), 'JPEG')[:300]
  with pytest.raises(InputError, match='row 3: the edited image cannot be read'):
    drawn(Row('row 3', ('a',), (Pair(good, bad),)), settings(), [0])
  with pytest.raises(InputError, match='row 3: the edited image is not an image; give PNG'):
    drawn(Row('row 3', ('a',), (Pair(good, b'no image'),)), settings(), [0])


def test_without_a_generator_nothing_is_random():
  files = [encode(noise(seed, 30, 20)) for seed in range(4)]
  row = Row('row', ('first', 'second'), (Pair(*files[:2]), Pair(*files[2:])))
  framing = settings(largest_resize=20, flip_rate=1.0)
  example = examples.example(row, None, framing, tokenizer)
  np.testing.assert_array_equal(example['input_image'], tiny_pairs.decoded(files[0], 16))
  np.testing.assert_array_equal(example['edited_image'], tiny_pairs.decoded(files[1], 16))
  np.testing.assert_array_equal(example['token_ids'], tokenizer(['first'])[0])


def test_text_to_image_has_no_input():
  array = noise(0, 16, 16)
  for row in (row_of(array), row_of(noise(1, 40, 16), array)):
    framing = settings(task='text_to_image', flip_rate=0.0)
    example = examples.example(row, np.random.default_rng(0), framing, tokenizer)
    assert 'input_image' not in example
    np.testing.assert_array_equal(example['edited_image'], array)
  with pytest.raises(InputError, match='row 3: the input image is missing'):
    drawn(row_of(array), settings(), [0])


# Latents


def latent_row(pairs, instructions, **fields) -> LatentRow:
  """Values encode the pair and the mirroring: 0 and 1 for pair 0, 10 and 11 for pair 1."""
  values = np.arange(pairs)[:, None] * 10 + np.arange(2)
  mean = np.broadcast_to(values[..., None, None, None], (pairs, 2, 2, 2, 4)).astype(np.float16)
  token_ids = np.arange(instructions, dtype=np.int32)[:, None].repeat(3, 1)
  return LatentRow('row 3', token_ids, mean, mean + 100, mean + 200, **fields)


@pytest.mark.parametrize('may_flip', [True, False])
def test_a_row_and_its_latents_are_drawn_alike(may_flip):
  halves = np.zeros((3, 16, 16, 3), np.uint8)  # pair k is k on the left and 100 on the right
  halves[:, :, :8] = np.arange(3)[:, None, None, None]
  halves[:, :, 8:] = 100
  pairs = tuple(Pair(encode(array), encode(array)) for array in halves)
  row = Row('row', tuple('abcde'), pairs, may_flip)
  latents, framing, seen = latent_row(3, 5, may_flip=may_flip), settings(largest_resize=18), set()
  for seed in range(60):
    rng = lambda seed=seed: np.random.default_rng(seed)
    image_example = examples.example(row, rng(), framing, tokenizer)
    latent_example = examples.latent_example(latents, rng(), framing)
    pair, mirrored = divmod(int(latent_example['input_mean'][0, 0, 0]), 10)
    assert image_example['input_image'][8, -1 if mirrored else 0, 0] == pair
    assert chr(image_example['token_ids'][1]) == 'abcde'[latent_example['token_ids'][0]]
    assert latent_example['edited_mean'][0, 0, 0] == 100 + 10 * pair + mirrored
    assert latent_example['edited_log_variance'][0, 0, 0] == 200 + 10 * pair + mirrored
    seen.add((pair, mirrored, int(latent_example['token_ids'][0])))
  assert {mirrored for _, mirrored, _ in seen} == ({0, 1} if may_flip else {0})
  assert len(seen) > 12


def test_latents_keep_their_types_and_shapes():
  example = examples.latent_example(latent_row(2, 1), np.random.default_rng(0), settings())
  for key in ('input_mean', 'edited_mean', 'edited_log_variance'):
    assert example[key].shape == (2, 2, 4) and example[key].dtype == np.float16
  assert example['token_ids'].shape == (3,) and example['token_ids'].dtype == np.int32
  assert example['weight'] == 1 and example['error'] == ''


def test_latents_without_an_input_are_for_text_to_image():
  row = latent_row(1, 1)._replace(input_mean=None)
  framing = settings(task='text_to_image')
  assert 'input_mean' not in examples.latent_example(row, None, framing)
  assert 'input_mean' not in examples.latent_example(latent_row(1, 1), None, framing)
  with pytest.raises(InputError, match='row 3 has no input'):
    examples.latent_example(row, None, settings())


# Blanks and settings


def test_a_blank_has_the_usual_shapes_and_no_weight():
  like = examples.latent_example(latent_row(1, 1), None, settings())
  blank = examples.blank(like, 'row 4 is broken')
  assert blank.keys() == like.keys() and blank['error'] == 'row 4 is broken'
  for key in like.keys() - {'error'}:
    assert blank[key].shape == like[key].shape and blank[key].dtype == like[key].dtype
    assert not blank[key].any()


@pytest.mark.parametrize(
  ('framing', 'knob'),
  [
    (settings(task='paint'), 'task'),
    (settings(resolution=4), 'resolution'),
    (settings(resize='stretch'), 'data.resize'),
    (settings(largest_resize=15), 'data.largest_resize'),
    (settings(flip_rate=1.5), 'data.flip_rate'),
  ],
)
def test_impossible_settings_are_named(framing, knob):
  settings(largest_resize=16).check()
  with pytest.raises(InputError, match=knob):
    framing.check()
