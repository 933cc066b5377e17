"""The whole edit: compared with diffusers' pipeline, and properties for any weights."""

import re
import warnings

import jax
import numpy as np
import peers
import pytest
import tiny_models
import torch_models as reference
from PIL import Image

from ip2p_jax import Editor, sharding
from ip2p_jax.editing.editor import Sampling
from ip2p_jax.errors import InputError
from ip2p_jax.parameters import flatten
from ip2p_jax.planning import program_text

torch = peers.module('torch')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('pipeline')


@pytest.fixture(scope='module')
def saved(folder):
  return tiny_models.write(folder / 'saved')


@pytest.fixture(scope='module')
def pipeline(saved):
  return reference.load_pipeline(saved)


@pytest.fixture(scope='module')
def editor(saved):
  return Editor.load(saved)


@pytest.fixture
def photo(rng):
  """uint8 [1, 32, 48, 3], smooth and not constant."""
  y, x = np.mgrid[:32, :48] / 48
  image = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x + 5 * y)], -1)
  return np.round(255 * image).astype(np.uint8)[None]


def watch(editor, monkeypatch, replacement):
  """Replaces the program for one image by a function. Returns the program."""
  programs = editor._alone
  monkeypatch.setattr(editor, '_alone', programs._replace(whole=replacement))
  return programs.whole


def test_keys_and_values_of_the_text_are_computed_once(editor, photo, monkeypatch):
  """XLA moves them out of the loop, since no step changes them."""
  arguments = []
  program = watch(editor, monkeypatch, lambda *inputs: arguments.extend(inputs))
  editor.edit_arrays(photo, ['make it winter'], Sampling(7))
  monkeypatch.undo()
  compiled = program.lower(*arguments).compile().as_text()
  tokens = 3 * editor.tokenizer.length  # for three branches
  products = rf'= f32\[{tokens},\d+\]\S* (dot|custom-call)\('
  times = [count for line, count in program_text.walk(compiled) if re.search(products, line)]
  layers = sum('attn2.to_k' in name or 'attn2.to_v' in name for name in kernels(editor))
  assert times == [1] * layers and layers
  assert 7 in [count for _, count in program_text.walk(compiled)]


def kernels(editor):
  return [name for name in flatten(editor.params['unet']) if name.endswith('kernel')]


def edit_both(editor, pipeline, photo, rng, steps, text='make it winter', negative=''):
  """Our edit and diffusers' (latents, pixels), with the same noise."""
  init_noise = rng.standard_normal((1, 8, 12, 4), np.float32)
  step_noise = rng.standard_normal((steps, 1, 8, 12, 4), np.float32)
  theirs = reference.run_edit(
    pipeline, photo, text, init_noise, step_noise,
    guidance_scale=7.5, image_guidance_scale=1.5, negative_prompt=negative or None,
  )  # fmt: skip
  options = {'negative': negative, 'init_noise': init_noise, 'step_noise': step_noise}
  return editor.edit_arrays(photo, [text], Sampling(steps), **options), *theirs


def test_the_whole_edit_agrees_with_diffusers(editor, pipeline, photo, rng):
  edit, latents, pixels = edit_both(editor, pipeline, photo, rng, 10)
  assert reference.relative_error(edit.latents, latents) <= 1e-3
  assert np.abs(np.asarray(edit.images, np.float32) - np.round(pixels)).max() <= 1


@pytest.mark.long
def test_a_negative_instruction_agrees_with_diffusers(editor, pipeline, photo, rng):
  edit, latents, _ = edit_both(editor, pipeline, photo, rng, 4, negative='people')
  assert reference.relative_error(edit.latents, latents) <= 1e-3


@pytest.mark.long
def test_image_i_of_eight_equals_the_same_edit_alone(editor, rng):
  photos = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
  instructions = [f'make it {i}' for i in range(8)]
  together = editor.edit_arrays(photos, instructions, Sampling(4), seeds=5)
  for i in (0, 3, 7):
    alone = editor.edit_arrays(
      photos[i : i + 1], instructions[i : i + 1], Sampling(4), seeds=5, indices=[i]
    )
    assert reference.relative_error(alone.latents[0], np.asarray(together.latents[i])) <= 1e-5
  # All devices share eight images. One device makes a single image, with the weights it has.
  assert together.images.sharding.shard_shape(together.images.shape) == (1, 32, 32, 3)
  assert alone.images.devices() == {jax.devices()[0]}
  weights, copies = jax.tree.leaves(editor.params)[0], jax.tree.leaves(editor._on_all())[0]
  pointers = [shard.data.unsafe_buffer_pointer() for shard in copies.addressable_shards]
  assert len(pointers) == 8 and weights.unsafe_buffer_pointer() in pointers


@pytest.mark.long
def test_devices_and_single_steps_do_not_change_an_image(editor, rng):
  mesh_of = lambda count: sharding.make_mesh(devices=jax.devices()[:count])
  on = lambda count: Editor(
    editor.networks, editor.params, editor.tokenizer, mesh=mesh_of(count)
  )  # fmt: skip
  photos = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)  # not a multiple of 2
  options = {
    'seeds': range(3), 'text_guidance': np.linspace(3, 9, 3),
    'mask': np.float32(rng.random((3, 8, 8, 1)) > 0.5),
    'step_noise': rng.standard_normal((2, 3, 8, 8, 4), np.float32),
  }  # fmt: skip
  run = lambda editor, **more: editor.edit_arrays(
    photos, [f'make it {i}' for i in range(3)], Sampling(2), **options, **more
  )
  expected, two = np.asarray(run(on(1)).latents), on(2)
  for edit in (run(two), run(two, progress=lambda *_: None)):
    assert edit.images.shape == photos.shape
    assert reference.relative_error(edit.latents, expected) <= 1e-5


def test_another_instruction_scale_or_seed_never_recompiles(editor, photo):
  run = lambda text, text_guidance, image_guidance, seed, negative='': editor.edit_arrays(
    photo, [text], Sampling(3), text_guidance=text_guidance, image_guidance=image_guidance,
    seeds=seed, negative=negative,
  )  # fmt: skip
  run('make it winter', 7.5, 1.5, 0)
  before = editor._alone.whole._cache_size()
  run('make it summer', 5, 1.2, 9)
  run('a longer instruction, with more words', 10, 2.2, 2**32 - 1, 'people')
  assert editor._alone.whole._cache_size() == before


@pytest.mark.long
def test_skipping_a_cancelled_branch_does_not_change_the_edit(editor, photo):
  nearly = np.nextafter(np.float32(1), np.float32(2))
  for scales in [(7.5, 1.0), (2.0, 2.0), (1.0, 1.0)]:
    fast = editor.edit_arrays(
      photo, ['go'], Sampling(3), text_guidance=scales[0], image_guidance=scales[1]
    )
    full = editor.edit_arrays(
      photo, ['go'], Sampling(3), text_guidance=scales[0] * nearly,
      image_guidance=scales[1] * nearly * nearly,
    )  # fmt: skip
    assert reference.relative_error(fast.latents, np.asarray(full.latents)) <= 1e-4


@pytest.mark.long
def test_cancelled_branches_save_their_work(editor, photo, monkeypatch):
  lowered = []
  program = watch(editor, monkeypatch, lambda *args: lowered.append(program.lower(*args)))
  for scales in ((7.5, 1.5), (7.5, 1.0), (1.0, 1.0)):
    editor.edit_arrays(
      photo, ['go'], Sampling(1, sampler='euler'), text_guidance=scales[0], image_guidance=scales[1]
    )
  three, two, one = (each.compile().cost_analysis()['flops'] for each in lowered)
  assert one < two < three
  assert abs((three - two) / (two - one) - 1) < 0.1


@pytest.mark.long
def test_an_empty_interval_is_the_unguided_edit(editor, photo):
  run = lambda interval, **scales: np.asarray(
    editor.edit_arrays(photo, ['go'], Sampling(4, interval=interval), **scales).latents
  )
  unguided = run((0.0, 1.0), text_guidance=1.0, image_guidance=1.0)
  assert reference.relative_error(run((0.5, 0.5)), unguided) <= 1e-5
  assert reference.relative_error(run((0.0, 0.999)), run((0.0, 1.0))) <= 1e-5
  assert reference.relative_error(run((0.25, 0.75)), unguided) > 1e-3


@pytest.mark.parametrize(
  ('steps', 'interval', 'expected'),
  [
    (10, (0.0, 1.0), range(10)),
    (10, (0.2, 0.8), range(2, 8)),
    (100, (0.15, 0.54), range(15, 54)),
    (1, (0.0, 1.0), range(1)),
    (10, (0.5, 0.5), range(0)),
  ],
)
def test_an_interval_is_a_fraction_of_the_steps(steps, interval, expected):
  sigmas = np.linspace(10, 0, steps + 1)
  low, high = Sampling(steps, interval=interval).guided_sigmas(sigmas)
  assert [i for i in range(steps) if low < np.float32(sigmas[i]) <= high] == list(expected)


@pytest.mark.long
def test_progress_does_not_change_the_edit(editor, photo):
  progress = []
  expected = editor.edit_arrays(photo, ['go'], Sampling(5))
  edit = editor.edit_arrays(photo, ['go'], Sampling(5), progress=lambda *x: progress.append(x))
  assert reference.relative_error(edit.latents, np.asarray(expected.latents)) <= 1e-5
  assert progress == [(i, 5) for i in range(6)]


def test_pixels_outside_of_the_mask_do_not_change(editor, rng):
  photo = Image.fromarray(rng.integers(0, 256, (37, 51, 3), np.uint8))
  mask = np.zeros((37, 51), np.float32)
  mask[10:20, 5:30] = 1
  (result,) = editor.edit(photo, 'go', steps=3, seed=0, mask=mask)
  changed = (np.asarray(result) != np.asarray(photo)).any(-1)
  assert not changed[mask == 0].any()
  assert changed[mask == 1].mean() > 0.9


def test_a_full_mask_is_the_edit_without_a_mask(editor, photo):
  run = lambda mask: np.asarray(editor.edit_arrays(photo, ['go'], Sampling(3), mask=mask).latents)
  assert reference.relative_error(run(np.ones((1, 8, 12, 1))), run(None)) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize('size', [(64, 40), (33, 70), (9, 90), (100, 8)])
def test_the_result_has_the_size_of_the_input(editor, size):
  (result,) = editor.edit(Image.new('RGB', size, 'green'), 'go', steps=1, resolution=32, seed=0)
  assert result.size == size


def test_transparency_comes_back(editor):
  photo = Image.new('RGBA', (32, 32), (200, 10, 10, 77))
  (result,) = editor.edit(photo, 'go', steps=1, seed=0)
  assert result.mode == 'RGBA'
  assert (np.asarray(result)[..., 3] == 77).all()


@pytest.mark.long
def test_images_of_many_sizes_come_back_in_their_order(editor):
  sizes = [(32, 32), (64, 32), (32, 32), (32, 64), (32, 32)]
  photos = [Image.new('RGB', size, (i, 90, 90)) for i, size in enumerate(sizes)]
  results = editor.edit(photos, 'go', steps=2, seed=3, batch_size=2)
  alone = editor.edit(photos[4], 'go', steps=2, seed=3, indices=[4])
  assert [result.size for result in results] == sizes
  assert np.abs(np.asarray(results[4], int) - np.asarray(alone[0], int)).max() <= 1


def test_a_variation_is_the_edit_of_its_seed(editor):
  photo = Image.new('RGB', (32, 32), 'teal')
  both = editor.edit(photo, 'go', steps=2, seed=[1, 2])
  (second,) = editor.edit(photo, 'go', steps=2, seed=2)
  assert np.abs(np.asarray(both[1], int) - np.asarray(second, int)).max() <= 1


@pytest.mark.long
def test_arrays_in_give_arrays_out(editor, photo):
  result = editor.edit(photo, 'go', steps=1, seed=[1, 2])
  assert result.dtype == np.uint8 and result.shape == (2, 32, 48, 3)
  assert (result[0] != result[1]).any()


@pytest.mark.long
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_stays_near_float32(pipeline, folder, editor, photo, dtype):
  half = Editor.load(folder / 'saved', dtype)
  options = {'text_guidance': 2.0, 'image_guidance': 1.2}
  expected = editor.edit_arrays(photo, ['go'], Sampling(4), **options)
  error = reference.relative_error(
    half.edit_arrays(photo, ['go'], Sampling(4), **options).latents, np.asarray(expected.latents)
  )
  assert error < 0.1


def test_text_after_77_tokens_is_a_warning(editor, photo):
  with pytest.warns(UserWarning, match='77 tokens; ignored: .*tail'):
    editor.edit_arrays(photo, ['x ' * 80 + 'tail'], Sampling(1))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    editor.edit_arrays(photo, ['x ' * 75], Sampling(1))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'instructions': '  '}, 'instruction is empty'),
    ({'seed': -1}, 'seed'),
    ({'seed': 2**32}, 'seed'),
    ({'steps': 0}, 'steps'),
    ({'sampler': 'magic'}, 'sampler.*euler_ancestral'),
    ({'rescale': 2.0}, 'rescale'),
    ({'interval': (0.8, 0.2)}, 'interval'),
    ({'text_guidance': float('nan')}, 'text_guidance'),
    ({'text_guidance': 1e30}, 'text_guidance'),
    ({'seed': 1.5}, 'seed'),
    ({'batch_size': -1}, 'batch_size'),
    ({'batch_size': 0}, 'batch_size'),
    ({'resolution': 0}, 'resolution'),
    ({'mask': np.ones((5, 5))}, 'mask'),
    ({'mask': np.full((32, 32), 255, np.uint8)}, 'mask has values that are not from 0 to 1'),
    ({'mask': np.full((32, 32), np.nan)}, 'mask has values that are not from 0 to 1'),
    ({'instructions': ['one', 'two'], 'seed': [1, 2, 3]}, 'instructions'),
    # Settings without effect.
    ({'mask': np.zeros((32, 32))}, 'mask is 0 everywhere'),
    ({'karras': True}, 'karras changes nothing in 1 steps'),
    ({'steps': 5, 'sampler': 'dpmpp_2m', 'karras': True, 'spacing': 'leading'}, 'spacing changes'),
    ({'text_guidance': 1, 'image_guidance': [1, 1], 'rescale': 0.5}, 'rescale: of no use'),
    ({'text_guidance': 1, 'image_guidance': 1, 'negative': 'fog'}, 'negative: of no use'),
    ({'interval': (0.0, 0.2)}, 'holds none of 1 steps'),
    ({'interval': (0.0, 0.9)}, 'holds all of 1 steps'),
    ({'seed': None, 'indices': [3]}, 'indices: of no use without a seed'),
    (
      {'sampler': 'euler', 'step_noise': np.zeros((1, 1, 8, 8, 4))},
      'step_noise: the sampler euler',
    ),
    ({'sampler': 'euler', 'init_noise': np.zeros((1, 8, 8, 4))}, 'seed and indices make noise'),
  ],
)
def test_a_wrong_value_is_named(editor, options, message):
  arguments = {'instructions': 'go', 'seed': 0, 'steps': 1} | options
  with pytest.raises(InputError, match=message):
    editor.edit(Image.new('RGB', (32, 32)), **arguments)


def test_a_text_to_image_unet_is_refused(tmp_path):
  config = {**reference.TINY_UNET, 'in_channels': 4}
  tiny_models.write(tmp_path / 'saved', config)
  with pytest.raises(InputError, match='text-to-image model, which cannot see the image'):
    Editor.load(tmp_path / 'saved')


def test_v_prediction_agrees_with_diffusers(photo, rng, tmp_path):
  pipeline = reference.pipeline(folder=tmp_path, prediction_type='v_prediction')
  editor = Editor.load(tmp_path / 'saved')
  edit, latents, _ = edit_both(editor, pipeline, photo, rng, 4, 'go')
  assert reference.relative_error(edit.latents, latents) <= 1e-3


@pytest.mark.parametrize('rows', [1, 3])
def test_noise_with_a_wrong_number_of_rows_is_refused(editor, photo, rows):
  images = np.concatenate([photo] * 2)
  noise = np.zeros((rows, 8, 12, 4), np.float32)
  for name, value in (('init_noise', noise), ('step_noise', np.stack([noise] * 2))):
    with pytest.raises(InputError, match=f'{name} has shape .* for 2 results; give one row each'):
      editor.edit(images, 'go', steps=2, **{name: value})


def test_noise_of_the_wrong_shape_is_refused(editor, photo):
  with pytest.raises(InputError, match='step_noise'):
    editor.edit_arrays(photo, ['go'], Sampling(2), step_noise=np.zeros((3, 1, 8, 12, 4)))


def test_the_program_holds_no_weights(editor, photo, monkeypatch):
  """Every compilation would copy weights that are constants of a program."""
  jaxprs = []
  jaxpr_of = lambda *args: jaxprs.append(jax.make_jaxpr(program, static_argnums=0)(*args))
  program = watch(editor, monkeypatch, jaxpr_of)
  editor.edit_arrays(photo, ['go'], Sampling(1))
  assert sum(np.size(const) for const in jaxprs[0].consts) < 10_000
