"""Runs of pairs: seeds, restarts, workers, and files."""

import concurrent.futures
import copy
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_models
from PIL import Image

from ip2p_jax import sharding, storage
from ip2p_jax.errors import InputError
from ip2p_jax.models.attention import attend, splash
from ip2p_jax.pairs import generate, inversion, pair_files, program
from ip2p_jax.pairs.generate import PairGenerator, PairSettings, Sample
from ip2p_jax.pairs.prompt_to_prompt import Control
from ip2p_jax.pairs.prompts import read_prompts
from ip2p_jax.pairs.run import draw_all
from ip2p_jax.pipeline.clip_scores import Clip
from ip2p_jax.pipeline.networks import networks_of, params_of, tokenizer_of
from ip2p_jax.pipeline.scores import Scores

UNET = tiny_models.TINY_UNET | {'in_channels': 4}
DRAWING = PairSettings(samples=5, steps=3, size=32, batch_size=8)
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
  tiny_models.write_clip(folder, 32)
  checkpoint = tiny_models.checkpoint(UNET)
  networks = networks_of(checkpoint)
  params = params_of(checkpoint, networks, 'float32')
  return networks, params, tokenizer_of(checkpoint, networks), Clip.load(folder)


@pytest.fixture(scope='module')
def generator(parts):
  return PairGenerator(*parts, DRAWING)


@pytest.fixture(scope='module')
def whole(generator, prompts, tmp_path_factory):
  """The folder of a run that was not stopped."""
  folder = tmp_path_factory.mktemp('whole')
  assert draw_all(generator, prompts, folder, IDENTITY) == 15
  return folder


def contents(folder: Path) -> dict[str, bytes]:
  """All files, except the workers' markers."""
  files = [file for file in folder.rglob('*') if file.is_file()]
  names = {str(file.relative_to(folder)): file.read_bytes() for file in files}
  return {name: content for name, content in names.items() if not name.startswith('done-')}


def lines_of(folder, prompt):
  return pair_files.read_scores(folder / f'{prompt:07d}' / 'scores.jsonl')


# Samples.


def test_every_sample_has_a_seed_of_its_own():
  drawing = PairSettings()
  samples = [drawing.sample(prompt, i) for prompt in range(300) for i in range(100)]
  assert len({sample.seed for sample in samples}) > len(samples) - 5  # few are equal by chance
  for prompt in range(300):
    assert len({s.seed for s in samples[100 * prompt : 100 * (prompt + 1)]}) == 100


def test_thresholds_and_scales_are_uniform():
  samples = [PairSettings().sample(prompt, i) for prompt in range(20) for i in range(100)]
  for values, low, high in (
    ([s.threshold for s in samples], 0.1, 0.9),
    ([s.guidance for s in samples], 7.5, 15.0),
  ):
    assert low <= min(values) < max(values) <= high
    counts, _ = np.histogram(values, 8, (low, high))
    assert counts.min() > 190 and counts.max() < 310  # 250 each, within four deviations


def test_a_sample_depends_only_on_run_prompt_and_number():
  assert PairSettings(steps=5).sample(3, 7) == PairSettings(batch_size=2, size=64).sample(3, 7)
  assert PairSettings().sample(3, 7) != PairSettings(seed=1).sample(3, 7)
  assert PairSettings().sample(3, 7) != PairSettings().sample(4, 7)


@pytest.mark.parametrize(
  ('threshold', 'steps', 'count'),
  [(0.1, 100, 10), (0.9, 100, 90), (0.0, 100, 0), (1.0, 100, 99), (0.5, 1, 1), (0.5, 5, 2)],
)
def test_sharing_stops_as_in_the_released_generator(threshold, steps, count):
  assert generate.shared_steps(threshold, steps) == count


# Runs.


def test_a_run_writes_the_originals_layout_and_all_scores(whole, prompts):
  for i, prompt in enumerate(prompts):
    folder = whole / f'{i:07d}'
    assert json.loads((folder / 'prompt.json').read_text()) == json.loads(prompt.line)
    lines = lines_of(whole, i)
    assert [line['sample'] for line in lines] == list(range(5))
    for line in lines:
      assert {'p2p_threshold', 'cfg_scale', 'clip_sim_0', 'clip_sim_1'} < set(line)
      for side in (0, 1):
        with Image.open(folder / f'{line["seed"]}_{side}.jpg') as image:
          assert (image.size, image.format) == ((32, 32), 'JPEG')


class Killed(Exception):
  pass


def kill(done, total):
  raise Killed


def test_a_run_killed_after_a_batch_continues_to_the_same_bytes(
  generator, prompts, whole, tmp_path
):
  with pytest.raises(Killed):
    draw_all(generator, prompts, tmp_path, IDENTITY, progress=kill)
  assert contents(tmp_path) != contents(whole)
  draw_all(generator, prompts, tmp_path, IDENTITY)
  assert contents(tmp_path) == contents(whole)


@pytest.mark.long
@pytest.mark.parametrize('survivors', [0, 1, 3, 7, 16, 17, 18, 19, 20, 21, 22, 30, 39])
def test_a_run_killed_within_a_batch_continues_to_the_same_bytes(
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
  seed = generator.drawing.sample(2, 0).seed
  (tmp_path / '0000002').mkdir(exist_ok=True)  # left by a kill while writing a file
  (tmp_path / '0000002' / f'.{seed}_0.jpg.0123.tmp').write_bytes(b'half')
  draw_all(generator, prompts, tmp_path, IDENTITY)
  assert contents(tmp_path) == contents(whole)


def with_drawing(generator, **changes):
  """The same compiled program with other settings, on which it does not depend."""
  changed = copy.copy(generator)
  changed.drawing = dataclasses.replace(generator.drawing, **changes)
  return changed


def check_same_but_for_rounding(folder, whole):
  """Compares two folders whose batches held other pairs."""
  files, expected = contents(folder), contents(whole)
  assert set(files) == set(expected)
  for name, content in expected.items():
    if name.endswith('.jpg'):
      images = (np.asarray(Image.open(place / name)).astype(int) for place in (folder, whole))
      assert np.abs(np.subtract(*images)).max() <= 4
    elif name.endswith('scores.jsonl'):
      lines = (pair_files.read_scores(place / name) for place in (folder, whole))
      for ours, theirs in zip(*lines, strict=True):
        assert [*ours] == [*theirs] and ours == pytest.approx(theirs, abs=2e-5)
    else:
      assert files[name] == content


def test_a_run_continues_with_more_samples_prompts_and_workers(generator, prompts, whole, tmp_path):
  few = with_drawing(generator, samples=3)
  with pytest.raises(Killed):
    draw_all(few, prompts[:2], tmp_path, IDENTITY, shard=(0, 2), progress=kill)
  assert len(lines_of(tmp_path, 0)) == 3
  progress = []
  draw_all(generator, prompts, tmp_path, IDENTITY, progress=lambda *n: progress.append(n))
  assert progress == [(11, 15), (15, 15)]  # 3 existed
  check_same_but_for_rounding(tmp_path, whole)
  with pytest.raises(InputError, match='has 5 samples of each prompt, and --samples is 3'):
    draw_all(few, prompts, tmp_path, IDENTITY)


@pytest.mark.long
def test_a_run_continues_with_another_batch_size(parts, generator, prompts, whole, tmp_path):
  large = PairGenerator(*parts, dataclasses.replace(DRAWING, batch_size=16))
  with pytest.raises(Killed):
    draw_all(generator, prompts, tmp_path, IDENTITY, progress=kill)
  draw_all(large, prompts, tmp_path, IDENTITY)
  check_same_but_for_rounding(tmp_path, whole)


def rewritten(prompts, index, **changes):
  line = json.dumps(json.loads(prompts[index].line) | changes)
  fields = {'caption': 'caption', 'output': 'edited_caption', 'weights': 'weights'}
  changes = {fields[key]: value for key, value in changes.items() if key in fields}
  return [
    prompt._replace(line=line, **changes) if prompt.index == index else prompt for prompt in prompts
  ]


def test_only_undrawn_lines_may_change(generator, prompts, whole, tmp_path):
  broken = rewritten(prompts, 2, output='a smell hat')
  with pytest.raises(Killed):  # after line 1 and a part of line 2
    draw_all(generator, broken, tmp_path, IDENTITY, progress=kill)
  for index in (0, 1):
    with pytest.raises(InputError, match=f'differ from those drawn: {index + 1};'):
      draw_all(generator, rewritten(prompts, index, output='a tree'), tmp_path, IDENTITY)
  with pytest.raises(InputError, match='differ from those drawn: 1;'):
    draw_all(generator, prompts[1:], tmp_path, IDENTITY)
  draw_all(generator, prompts, tmp_path, IDENTITY)
  assert contents(tmp_path) == contents(whole)
  other = rewritten(prompts, 1, edit='call them dogs')  # no image depends on it
  assert draw_all(generator, other, tmp_path, IDENTITY) == 15
  assert (tmp_path / '0000001' / 'prompt.json').read_text() == other[1].line + '\n'


def test_a_folder_of_an_older_version_continues(generator, prompts, whole, tmp_path):
  folder = shutil.copytree(whole, tmp_path / 'old')
  settings = json.loads((folder / 'pairs.json').read_text())
  settings |= {'batch_size': 8, 'prompts': 'a digest of the file'}
  (folder / 'pairs.json').write_text(json.dumps(settings))
  (folder / 'done-00000-of-00001.json').write_text('{"batches": 1}')
  shutil.rmtree(folder / '0000002')
  lines = (folder / '0000001' / 'scores.jsonl').read_text().splitlines(keepends=True)
  (folder / '0000001' / 'scores.jsonl').write_text(''.join(lines[:3]))
  draw_all(generator, prompts, folder, IDENTITY)
  check_same_but_for_rounding(folder, whole)


def with_scores(generator, change):
  """A generator with other scores."""
  changed = copy.copy(generator)
  changed.draw = lambda prompts, samples: (
    generator.draw(prompts, samples)[0],
    Scores(*change(len(prompts))),
    None,
  )
  return changed


def test_a_pair_that_overflows_is_recorded(generator, prompts, tmp_path):
  def third(count):
    return np.where(np.arange(8) == 2, np.float32([[np.nan]] * 4), 0.5)

  changed = with_scores(generator, third)
  with pytest.warns(UserWarning, match='2 of 15 pairs overflowed, and have no images'):
    assert draw_all(changed, prompts, tmp_path, IDENTITY) == 15
  line = lines_of(tmp_path, 0)[2]
  assert line['clip_sim_dir'] is None and not any(tmp_path.rglob(f'{line["seed"]}_*'))
  assert len(list(tmp_path.rglob('*.jpg'))) == 2 * 13
  with pytest.warns(UserWarning, match='2 of 15'):  # draws nothing, but warns again
    draw_all(changed, prompts, tmp_path, IDENTITY)
  changed = with_scores(generator, lambda count: np.full((4, 8), np.inf, np.float32))
  with pytest.raises(InputError, match='15 of 15 pairs overflowed'):
    draw_all(changed, prompts, tmp_path / 'all', IDENTITY)


def test_thresholds_apply_to_rounded_scores(prompts, tmp_path):
  directions = [0.199994, 0.199996, 0.2, 0.6]
  scores = Scores(*np.float32([[0.5] * 4, [0.5] * 4, directions, [0.9] * 4]))
  rows = [(prompts[0], i) for i in range(4)]
  samples = [Sample(i, 0.5, 7.5) for i in range(4)]
  images = np.zeros((2, 4, 8, 8, 3), np.uint8)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    written = pair_files.write_batch(
      storage.folder(tmp_path), (0, 1), 4, rows, samples, images, scores, 'passing', pool
    )
  assert written == (4, 0)
  for line, passes in zip(lines_of(tmp_path, 0), (False, True, True, True), strict=True):
    assert pair_files.passes(pair_files.scores_of(line), pair_files.RELEASED) == passes
    assert (tmp_path / '0000000' / f'{line["seed"]}_1.jpg').exists() == passes


def test_a_finished_run_draws_nothing_again(generator, prompts, whole, monkeypatch):
  before = contents(whole)
  monkeypatch.setattr(generator, 'draw', None)
  assert draw_all(generator, prompts, whole, IDENTITY) == 15
  assert contents(whole) == before


def test_two_workers_draw_the_same_as_one(generator, prompts, whole, tmp_path):
  for i in (1, 0):
    draw_all(generator, prompts, tmp_path, IDENTITY, shard=(i, 2))
  assert contents(tmp_path) == contents(whole)


def test_pairs_do_not_depend_on_devices_or_neighbours(parts, prompts, whole, rng):
  single = PairGenerator(*parts, DRAWING, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  sample = DRAWING.sample(1, 3)
  images, scores, _ = single.draw([prompts[1]], [sample])
  line = lines_of(whole, 1)[3]
  assert line['seed'] == sample.seed
  np.testing.assert_allclose(scores.clip_sim_dir[0], line['clip_sim_dir'], atol=2e-5)
  for side in (0, 1):
    with Image.open(whole / '0000001' / f'{sample.seed}_{side}.jpg') as file:
      stored = np.asarray(file).astype(int)
    assert np.abs(stored - np.asarray(images)[side, 0]).max() <= 4  # JPEG


@pytest.mark.long
def test_two_devices_with_the_kernel_draw_the_pairs_of_one(parts, prompts, monkeypatch):
  mesh_of = lambda count: sharding.make_mesh(devices=jax.devices()[:count])
  drawing = PairSettings(steps=2, size=64, batch_size=2)
  samples = [drawing.sample(i, 0) for i in range(2)]
  expected, *_ = PairGenerator(*parts, drawing, mesh_of(1)).draw(prompts[:2], samples)
  used = []

  def dispatch(mesh):  # as on a TPU; other devices interpret the kernel
    def attention(q, k, v, site=None):
      if q.shape[1] % 128 or k.shape[1] % 128:
        return attend(q, k, v)
      used.append(mesh.size)
      return splash(q, k, v, mesh=mesh, interpret=True)

    return attention

  monkeypatch.setattr(generate.attention, 'dispatch', dispatch)
  images, *_ = PairGenerator(*parts, drawing, mesh_of(2)).draw(prompts[:2], samples)
  assert set(used) == {2}
  assert images.sharding.shard_shape(images.shape) == (2, 1, 64, 64, 3)
  assert np.abs(np.asarray(images, int) - np.asarray(expected, int)).max() <= 1


def test_a_run_refuses_other_settings(parts, generator, prompts, whole):
  with pytest.raises(InputError, match=r"weights 'tiny', not 'other'"):
    draw_all(generator, prompts, whole, {'weights': 'other'})


@pytest.mark.long
def test_keep_passing_writes_only_passing_images(parts, prompts, tmp_path):
  generator = PairGenerator(*parts, PairSettings(samples=2, steps=2, size=32, keep='passing'))
  draw_all(generator, prompts, tmp_path, IDENTITY)
  for i in range(3):
    for line in lines_of(tmp_path, i):
      scores = pair_files.scores_of(line)
      file = tmp_path / f'{i:07d}' / f'{line["seed"]}_0.jpg'
      assert file.exists() == pair_files.passes(scores, pair_files.RELEASED)


@pytest.mark.parametrize('control', ['none', 'auto', 'share+auto'])
def test_every_control_draws(control, parts, prompts, whole):
  generator = PairGenerator(*parts, PairSettings(samples=5, steps=3, size=32, control=control))
  images, _, _ = generator.draw(prompts, [DRAWING.sample(i, 0) for i in range(3)])
  for i in range(3):
    seed = DRAWING.sample(i, 0).seed
    with Image.open(whole / f'{i:07d}' / f'{seed}_0.jpg') as file:
      first = np.asarray(file).astype(int)
    assert np.abs(first - np.asarray(images)[0, i]).max() <= 4  # the same for every control


@pytest.mark.long
def test_attention_to_words_is_drawn(parts, prompts):
  unet = UNET | {
    'down_block_types': ['CrossAttnDownBlock2D'] * 2,
    'up_block_types': ['CrossAttnUpBlock2D'] * 2,
  }
  checkpoint = tiny_models.checkpoint(unet)
  networks = networks_of(checkpoint)
  params = params_of(checkpoint, networks, 'float32')
  generator = PairGenerator(networks, params, *parts[2:], PairSettings(steps=2, size=32))
  images, _, attention = generator.draw(prompts[:1], [DRAWING.sample(0, 0)], True)
  sheet = pair_files.attention_sheet(
    generator.tokenizer, prompts[0], np.asarray(images)[:, 0], np.asarray(attention)[:, 0]
  )
  assert sheet.width > 4 * 32  # the image and three words


@pytest.mark.slow
def test_a_pair_can_start_from_a_photo(parts, tmp_path, rng):
  photo = rng.integers(0, 256, (4, 6, 3), np.uint8).repeat(20, 0).repeat(20, 1)
  Image.fromarray(photo).save(tmp_path / 'photo.png')
  line = {'caption': 'a red star', 'edit': 'make it blue', 'output': 'a blue star'}
  line['image'] = 'photo.png'
  (tmp_path / 'prompts.jsonl').write_text(json.dumps(line))
  prompts = read_prompts(tmp_path / 'prompts.jsonl')
  with pytest.raises(InputError, match='need the sampler ddim'):
    PairGenerator(*parts, DRAWING).draw(prompts, [DRAWING.sample(0, 0)])
  generator = PairGenerator(*parts, PairSettings(steps=2, size=32, sampler='ddim'))
  sample = generator.drawing.sample(0, 0)
  drawn, _, _ = generator.draw(prompts, [sample])

  networks, params, tokenizer, _ = parts
  middle = Image.fromarray(photo[:, 20:100]).resize((32, 32), Image.Resampling.LANCZOS)
  ids, nothing = tokenizer([line['caption'], line['output']]), tokenizer([''])
  scale = np.float32([sample.guidance])
  inverted = inversion.invert(
    networks, params, np.asarray(middle)[None], ids[:1], nothing, scale, generator.grid
  )
  control = Control(np.int32([generate.shared_steps(sample.threshold, 2)]))
  request = program.PairRequest(
    ids[:, None], nothing, scale, np.uint32([0]), generator.grid, control,
    inverted.init_noise, None, inverted.null_contexts,
  )  # fmt: skip
  expected = program.pair_program(networks, generator.spec, params, request).images
  np.testing.assert_allclose(np.asarray(drawn)[:, 0] / 255, expected[:, 0], atol=0.02)


# Mistakes.


def test_all_impossible_lines_are_named_before_drawing(generator, prompts, tmp_path):
  wrong = rewritten(prompts, 0, weights={'tree': 2.0})
  wrong[2] = wrong[2]._replace(image=tmp_path / 'photo.png', blend=(['hat'], ['cap']))
  (tmp_path / 'photo.png').write_bytes(b'no image')
  with pytest.raises(InputError) as error:
    draw_all(generator, wrong, tmp_path / 'out', IDENTITY)
  assert 'line 1: weights do nothing with the control' in str(error.value)
  assert 'line 3: blend do' in str(error.value) and 'need the sampler ddim' in str(error.value)
  assert 'photo.png is not an image' in str(error.value)
  auto = with_drawing(generator, control='auto')
  with pytest.raises(InputError) as error:
    draw_all(auto, wrong, tmp_path / 'out', IDENTITY)
  assert "line 1: the word 'tree' is not in 'a blue star'" in str(error.value)
  assert "line 3: the word 'cap' is not in 'a big hat'" in str(error.value)
  with pytest.raises(InputError, match='cannot be replaced one by one'):
    draw_all(with_drawing(generator, control='replace'), prompts, tmp_path / 'out', IDENTITY)
  assert not (tmp_path / 'out').exists()


def test_cut_off_captions_are_a_warning(generator, prompts):
  long = rewritten(prompts, 1, output='two dogs ' + 'and two dogs ' * 40)
  with pytest.warns(UserWarning, match=r"1 of the captions .* 77 .*line 2, output \(ignored: '"):
    generator.check(long)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"caption": "a"', 'line 2 is not JSON'),
    ('[]', 'line 2 is not a JSON object'),
    ('{"caption": "a", "edit": "b"}', "line 2 has no text 'output'"),
    ('{"edit": "b", "output": "c"}', "line 2 has no text 'caption'"),
    ('{"caption": "a", "output": "c"}', "line 2 has no text 'edit', the instruction"),
    ('{"caption": "a", "edit": " ", "output": "c"}', "line 2 has no text 'edit'"),
    ('{"caption": "a", "instruction": "b", "output": "c"}', "rename 'instruction' to 'edit'"),
    ('{"caption": "a", "input": "b", "edit": "b", "output": "c"}', 'which differ'),
    ('{"caption": "a", "edit": "\\ud800", "output": "c"}', 'text that is not Unicode'),
    ('{"caption": "a", "output": "c", "weights": {"c": true}}', 'line 2: weights is not an object'),
    ('{"caption": "a", "output": "c", "weights": {"c": NaN}}', 'weights is not an object'),
    (
      '{"caption": "a", "output": "c", "cross_steps": {"c": 1.5}}',
      'cross_steps: 1.5 is not a part',
    ),
    ('{"caption": "a", "output": "c", "cross_steps": {"c": [0.5, 0.1]}}', 'is not a part of'),
    ('{"caption": "a", "output": "c", "blend": [[], []]}', 'blend is not two lists'),
    ('{"caption": "a", "output": "c", "weights": [1]}', 'weights is not an object'),
    ('{"caption": "a", "output": "c", "cross_steps": {"c": "x"}}', 'cross_steps is not an object'),
    ('{"caption": "a", "output": "c", "blend": ["a"]}', 'blend is not two lists'),
    ('{"caption": "a", "output": "c", "image": "no.png"}', 'there is no image'),
  ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
  file = tmp_path / 'prompts.jsonl'
  file.write_text(prompt_lines()[0] + '\n' + line + '\n')
  with pytest.raises(InputError, match=message):
    read_prompts(file)


def test_all_wrong_lines_are_named_at_once(tmp_path):
  file = tmp_path / 'prompts.jsonl'
  file.write_text('\n'.join(['[]', prompt_lines()[0], '', '{"caption": 3}'] + ['x'] * 9))
  with pytest.raises(InputError) as error:
    read_prompts(file)
  message = str(error.value)
  assert 'line 1 is not a JSON object; line 4 has no text' in message and 'and 8 more' in message
  file.write_bytes(b'\xff')
  with pytest.raises(InputError, match='is not UTF-8'):
    read_prompts(file)


def test_one_message_has_faults_of_form_and_words(parts, tmp_path):
  """Also if both are in one line."""
  sound = json.loads(prompt_lines()[0])
  lines = [
    sound | {'weights': {'tree': 2, 'star': 1}, 'cross_steps': {'bush': 1.5}},
    sound | {'edit': '', 'blend': [['moon'], ['sun']]},
    sound | {'weights': [1]},
  ]
  file, drawing = tmp_path / 'prompts.jsonl', PairSettings(steps=2, size=32, control='auto')
  file.write_text('\n'.join(map(json.dumps, lines)))
  results = []
  faults = lambda prompt: generate.faults(prompt, drawing, parts[2])
  with pytest.raises(InputError) as error:
    read_prompts(file, lambda prompt: results.append(faults(prompt)) or ())
  assert len(results) == 3 and 'tree' not in str(error.value)
  assert [list(result) for result in results] == [
    ["the word 'tree' is not in 'a blue star'; use one of its words",
     "the word 'bush' is not in 'a blue star'; use one of its words"],
    ["the word 'moon' is not in 'a red star'; use one of its words",
     "the word 'sun' is not in 'a blue star'; use one of its words"],
    [],
  ]  # fmt: skip
  with pytest.raises(InputError) as error:
    read_prompts(file, faults)
  message = str(error.value)
  assert 'line 1: cross_steps: 1.5 is not a part of the steps' in message
  assert "line 1: the word 'tree' is not in" in message and "line 1: the word 'bush'" in message
  assert "line 2 has no text 'edit'" in message and "line 2: the word 'moon'" in message
  assert message.endswith('and 2 more; mend this first.')


def test_only_a_newline_ends_a_line(tmp_path):
  file = tmp_path / 'prompts.jsonl'
  line = '{"caption": "a\u2028cat", "edit": "b", "output": "c"}'
  file.write_bytes(f'\ufeff{line}\r\n{line}'.encode())
  assert [prompt.line for prompt in read_prompts(file)] == [line, line]


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
    ({'cross': 1.5}, '1.5 is not a part'),
    ({'sampler': 'plms'}, 'sampler is'),
  ],
)
def test_wrong_settings_are_named(settings, message):
  with pytest.raises(InputError, match=message):
    PairSettings(**settings)


def test_an_impossible_generator_is_refused(parts):
  with pytest.raises(InputError, match='multiple of the 8 devices'):
    PairGenerator(*parts, PairSettings(size=32, batch_size=3))
  with pytest.raises(InputError, match='size is 30'):
    PairGenerator(*parts, PairSettings(size=30))
  editor = networks_of(tiny_models.checkpoint())
  with pytest.raises(InputError, match='text-to-image checkpoint'):
    PairGenerator(editor, *parts[1:], DRAWING)


def test_words_may_have_their_own_steps(parts, prompts, tmp_path):
  line = {'caption': 'a cat', 'edit': 'x', 'output': 'a dog', 'cross_steps': {'dog': [0.5, 1]}}
  (tmp_path / 'prompts.jsonl').write_text(json.dumps(line))
  generator = PairGenerator(*parts, PairSettings(steps=10, size=32, control='share+replace'))
  control = generator._control(read_prompts(tmp_path / 'prompts.jsonl'), [Sample(0, 0.5, 7.5)])
  assert control.injection.cross_window[0, :, 1:3].tolist() == [[0, 5], [8, 10]]  # a, dog


def test_words_outside_of_the_caption_are_named(parts, prompts):
  generator = PairGenerator(*parts, PairSettings(steps=2, size=32, control='auto'))
  wrong = prompts[1]._replace(weights={'tree': 2.0})
  with pytest.raises(InputError, match=r"line 2 of the prompts: the word 'tree' is not in"):
    generator.draw([wrong], [DRAWING.sample(0, 0)])
