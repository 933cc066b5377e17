"""Pairs of a whole run: seeds, restarts, workers, and what is written."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_models as reference
from PIL import Image

from ip2p_jax import inversion, pair_files, pair_program, pairs, sharding, storage
from ip2p_jax import prompt_to_prompt as p2p
from ip2p_jax.errors import InputError
from ip2p_jax.networks import networks_of, params_of, tokenizer_of
from ip2p_jax.pair_run import draw_all
from ip2p_jax.pairs import Drawing, Generator, Sample
from ip2p_jax.prompts import read_prompts
from ip2p_jax.similarity import Clip

UNET = reference.TINY_UNET | {'in_channels': 4}
DRAWING = Drawing(samples=5, steps=3, size=32, batch_size=8)
IDENTITY = {'weights': 'tiny'}


def prompt_lines():
  texts = (('a red star', 'a blue star'), ('two cats', 'two dogs'), ('a hat', 'a big hat'))
  return [
    json.dumps({'caption': a, 'edit': f'make it {b}', 'output': b, 'url': str(i)})
    for i, (a, b) in enumerate(texts)
  ]


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  file = tmp_path_factory.mktemp('prompts') / 'prompts.jsonl'
  file.write_text('\n'.join(prompt_lines()) + '\n')
  return read_prompts(file)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
  folder = tmp_path_factory.mktemp('clip')
  reference.write_clip(folder, 32)
  checkpoint, _ = reference.checkpoint(UNET)
  networks = networks_of(checkpoint)
  params = params_of(checkpoint, networks, 'float32')
  return networks, params, tokenizer_of(checkpoint, networks), Clip.load(folder)


@pytest.fixture(scope='module')
def generator(parts):
  return Generator(*parts, DRAWING)


@pytest.fixture(scope='module')
def whole(generator, prompts, tmp_path_factory):
  """A run that nobody stopped."""
  folder = tmp_path_factory.mktemp('whole')
  assert draw_all(generator, prompts, folder, IDENTITY) == 15
  return folder


def contents(folder: Path) -> dict[str, bytes]:
  """All files but the workers' markers."""
  files = [file for file in folder.rglob('*') if file.is_file()]
  names = {str(file.relative_to(folder)): file.read_bytes() for file in files}
  return {name: content for name, content in names.items() if not name.startswith('done-')}


def lines_of(folder, prompt):
  return pair_files.read_scores(folder / f'{prompt:07d}' / 'scores.jsonl')


# Samples.


def test_every_sample_has_a_seed_of_its_own():
  drawing = Drawing()
  found = [drawing.sample(prompt, i) for prompt in range(300) for i in range(100)]
  assert len({sample.seed for sample in found}) > len(found) - 5  # of 2**32 some meet by chance
  for prompt in range(300):
    assert len({s.seed for s in found[100 * prompt : 100 * (prompt + 1)]}) == 100


def test_thresholds_and_scales_are_spread_evenly_over_their_ranges():
  found = [Drawing().sample(prompt, i) for prompt in range(20) for i in range(100)]
  for values, low, high in (
    ([s.threshold for s in found], 0.1, 0.9),
    ([s.guidance for s in found], 7.5, 15.0),
  ):
    assert low <= min(values) < max(values) <= high
    counts, _ = np.histogram(values, 8, (low, high))
    assert counts.min() > 190 and counts.max() < 310  # 250 each, within four deviations


def test_a_sample_depends_on_run_prompt_and_number_alone():
  assert Drawing(steps=5).sample(3, 7) == Drawing(batch_size=2, size=64).sample(3, 7)
  assert Drawing().sample(3, 7) != Drawing(seed=1).sample(3, 7)
  assert Drawing().sample(3, 7) != Drawing().sample(4, 7)


@pytest.mark.parametrize(
  ('threshold', 'steps', 'count'),
  [(0.1, 100, 10), (0.9, 100, 90), (0.0, 100, 0), (1.0, 100, 99), (0.5, 1, 1), (0.5, 5, 2)],
)
def test_sharing_stops_as_in_the_released_generator(threshold, steps, count):
  assert pairs.shared_steps(threshold, steps) == count


# Runs.


def test_a_run_writes_the_originals_layout_and_all_numbers(whole, prompts):
  for i, prompt in enumerate(prompts):
    folder = whole / f'{i:07d}'
    assert json.loads((folder / 'prompt.json').read_text()) == json.loads(prompt.line)
    lines = lines_of(whole, i)
    assert [line['sample'] for line in lines] == list(range(5))
    for line in lines:
      assert {'p2p_threshold', 'cfg_scale', 'clip_sim_0', 'clip_sim_1'} < set(line)
      for side in (0, 1):
        with Image.open(folder / f'{line["seed"]}_{side}.jpg') as picture:
          assert (picture.size, picture.format) == ((32, 32), 'JPEG')


class Killed(Exception):
  pass


def test_killed_after_a_batch_it_goes_on_to_the_same_bytes(generator, prompts, whole, tmp_path):
  def kill(done, total):
    raise Killed

  with pytest.raises(Killed):
    draw_all(generator, prompts, tmp_path, IDENTITY, progress=kill)
  assert contents(tmp_path) != contents(whole)
  draw_all(generator, prompts, tmp_path, IDENTITY)
  assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize('survivors', [0, 3, 7, 16, 17, 18])
def test_killed_within_a_batch_it_goes_on_to_the_same_bytes(
  survivors, generator, prompts, whole, tmp_path, monkeypatch
):
  written = []

  def write_bytes(file, content, real=storage.write_bytes):
    if len(written) == survivors:
      raise Killed
    written.append(file)
    real(file, content)

  monkeypatch.setattr(storage, 'write_bytes', write_bytes)
  with pytest.raises(Killed):
    draw_all(generator, prompts, tmp_path, IDENTITY)
  monkeypatch.undo()
  draw_all(generator, prompts, tmp_path, IDENTITY)
  assert contents(tmp_path) == contents(whole)


def test_a_finished_run_draws_nothing_again(generator, prompts, whole, monkeypatch):
  before = contents(whole)
  monkeypatch.setattr(generator, 'draw', None)
  assert draw_all(generator, prompts, whole, IDENTITY) == 15
  assert contents(whole) == before


def test_two_workers_make_what_one_makes(generator, prompts, whole, tmp_path):
  for i in (1, 0):
    draw_all(generator, prompts, tmp_path, IDENTITY, shard=(i, 2))
  assert contents(tmp_path) == contents(whole)


def test_pairs_do_not_depend_on_devices_or_neighbours(parts, prompts, whole, rng):
  lone = Generator(*parts, DRAWING, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  sample = DRAWING.sample(1, 3)
  pictures, scores, _ = lone.draw([prompts[1]], [sample])
  line = lines_of(whole, 1)[3]
  assert line['seed'] == sample.seed
  np.testing.assert_allclose(scores.clip_sim_dir[0], line['clip_sim_dir'], atol=2e-5)
  for side in (0, 1):
    with Image.open(whole / '0000001' / f'{sample.seed}_{side}.jpg') as file:
      found = np.asarray(file).astype(int)
    assert np.abs(found - np.asarray(pictures)[side, 0]).max() <= 4  # JPEG


def test_other_settings_do_not_go_on_with_a_run(parts, generator, prompts, whole):
  with pytest.raises(InputError, match=r"weights 'tiny', not 'other'"):
    draw_all(generator, prompts, whole, {'weights': 'other'})


def test_pictures_that_fail_the_released_thresholds_need_not_be_kept(parts, prompts, tmp_path):
  generator = Generator(*parts, Drawing(samples=2, steps=2, size=32, keep='passing'))
  draw_all(generator, prompts, tmp_path, IDENTITY)
  for i in range(3):
    for line in lines_of(tmp_path, i):
      scores = pair_files.scores_of(line)
      file = tmp_path / f'{i:07d}' / f'{line["seed"]}_0.jpg'
      assert file.exists() == pair_files.passes(scores, pair_files.RELEASED)


@pytest.mark.parametrize('control', ['none', 'auto', 'share+auto'])
def test_every_control_draws(control, parts, prompts, whole):
  generator = Generator(*parts, Drawing(samples=5, steps=3, size=32, control=control))
  pictures, _, _ = generator.draw(prompts, [DRAWING.sample(i, 0) for i in range(3)])
  for i in range(3):
    seed = DRAWING.sample(i, 0).seed
    with Image.open(whole / f'{i:07d}' / f'{seed}_0.jpg') as file:
      first = np.asarray(file).astype(int)
    assert np.abs(first - np.asarray(pictures)[0, i]).max() <= 4  # the same whatever the control


def test_attention_to_words_is_drawn(parts, prompts):
  unet = UNET | {
    'down_block_types': ['CrossAttnDownBlock2D'] * 2,
    'up_block_types': ['CrossAttnUpBlock2D'] * 2,
  }
  checkpoint, _ = reference.checkpoint(unet)
  networks = networks_of(checkpoint)
  params = params_of(checkpoint, networks, 'float32')
  generator = Generator(networks, params, *parts[2:], Drawing(steps=2, size=32))
  pictures, _, attention = generator.draw(prompts[:1], [DRAWING.sample(0, 0)], True)
  sheet = pair_files.attention_sheet(
    generator.tokenizer, prompts[0], np.asarray(pictures)[:, 0], np.asarray(attention)[:, 0]
  )
  assert sheet.width > 4 * 32  # the picture and three words


@pytest.mark.slow
def test_a_pair_can_begin_with_a_photograph(parts, tmp_path, rng):
  photo = rng.integers(0, 256, (4, 6, 3), np.uint8).repeat(20, 0).repeat(20, 1)
  Image.fromarray(photo).save(tmp_path / 'photo.png')
  line = {'caption': 'a red star', 'edit': 'make it blue', 'output': 'a blue star'}
  line['image'] = 'photo.png'
  (tmp_path / 'prompts.jsonl').write_text(json.dumps(line))
  prompts = read_prompts(tmp_path / 'prompts.jsonl')
  with pytest.raises(InputError, match='by the sampler ddim'):
    Generator(*parts, DRAWING).draw(prompts, [DRAWING.sample(0, 0)])
  generator = Generator(*parts, Drawing(steps=2, size=32, sampler='ddim'))
  sample = generator.drawing.sample(0, 0)
  drawn, _, _ = generator.draw(prompts, [sample])

  networks, params, tokenizer, _ = parts
  middle = Image.fromarray(photo[:, 20:100]).resize((32, 32), Image.Resampling.LANCZOS)
  ids, nothing = tokenizer([line['caption'], line['output']]), tokenizer([''])
  scale = np.float32([sample.guidance])
  found = inversion.invert(
    networks, params, np.asarray(middle)[None], ids[:1], nothing, scale, generator.grid
  )
  control = p2p.Control(np.int32([pairs.shared_steps(sample.threshold, 2)]))
  request = pair_program.Request(
    ids[:, None], nothing, scale, np.uint32([0]), generator.grid, control, found.init_noise, None,
    found.null_contexts,
  )  # fmt: skip
  expected = pair_program.pair_program(networks, generator.plan, params, request).images
  np.testing.assert_allclose(np.asarray(drawn)[:, 0] / 255, expected[:, 0], atol=0.02)


# Mistakes.


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"caption": "a"', 'line 2 is not JSON'),
    ('[]', 'line 2 is no JSON object'),
    ('{"caption": "a", "edit": "b"}', "line 2 has no text 'output'"),
    ('{"edit": "b", "output": "c"}', "line 2 has no text 'caption'"),
    ('{"caption": "a", "output": "c", "weights": [1]}', 'weights is no object'),
    ('{"caption": "a", "output": "c", "cross_steps": {"c": "x"}}', 'cross_steps is no object'),
    ('{"caption": "a", "output": "c", "blend": ["a"]}', 'blend is not two lists'),
    ('{"caption": "a", "output": "c", "image": "no.png"}', 'there is no picture'),
  ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
  file = tmp_path / 'prompts.jsonl'
  file.write_text(prompt_lines()[0] + '\n' + line + '\n')
  with pytest.raises(InputError, match=message):
    read_prompts(file)


def test_the_key_of_the_released_prompts_is_known(tmp_path):
  file = tmp_path / 'prompts.jsonl'
  file.write_text('{"input": "a cat", "edit": "make it a dog", "output": "a dog"}\n')
  assert read_prompts(file)[0].caption == 'a cat'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'control': 'p2p'}, 'control is'),
    ({'keep': 'some'}, 'keep is'),
    ({'samples': 0}, 'samples is 0'),
    ({'threshold': (0.9, 0.1)}, 'threshold is 0.9 to 0.1'),
    ({'cross': 1.5}, '1.5 is no part'),
    ({'sampler': 'plms'}, 'sampler is'),
  ],
)
def test_wrong_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    Drawing(**settings)


def test_what_does_not_fit_is_told_before_drawing(parts):
  with pytest.raises(InputError, match='multiple of the 8 devices'):
    Generator(*parts, Drawing(size=32, batch_size=3))
  with pytest.raises(InputError, match='size is 30'):
    Generator(*parts, Drawing(size=30))
  editor = networks_of(reference.checkpoint(reference.TINY_UNET)[0])
  with pytest.raises(InputError, match='text-to-image checkpoint'):
    Generator(editor, *parts[1:], DRAWING)


def test_words_may_have_steps_of_their_own(parts, prompts, tmp_path):
  line = {'caption': 'a cat', 'edit': 'x', 'output': 'a dog', 'cross_steps': {'dog': [0.5, 1]}}
  (tmp_path / 'prompts.jsonl').write_text(json.dumps(line))
  generator = Generator(*parts, Drawing(steps=10, size=32, control='share+replace'))
  control = generator._control(read_prompts(tmp_path / 'prompts.jsonl'), [Sample(0, 0.5, 7.5)])
  assert control.injection.cross_window[0, :, 1:3].tolist() == [[0, 5], [8, 10]]  # a, dog


def test_words_that_are_not_in_the_caption_are_named(parts, prompts):
  generator = Generator(*parts, Drawing(steps=2, size=32, control='auto'))
  wrong = prompts[1]._replace(weights={'tree': 2.0})
  with pytest.raises(InputError, match=r"line 2 of the prompts: the word 'tree' is not in"):
    generator.draw([wrong], [DRAWING.sample(0, 0)])
