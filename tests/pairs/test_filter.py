"""The filter: thresholds, ranks, counts, the original's layout, and refusals."""

import json

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.data.rows import SPLITS
from ip2p_jax.data.sources import open_source
from ip2p_jax.errors import InputError
from ip2p_jax.pairs import filter
from ip2p_jax.pipeline.scores import Scores

GOOD = Scores(0.3, 0.3, 0.3, 0.8)


def write_raw(folder, samples_of_prompts, first=0, with_images=True):
  """Raw pairs: {prompt: [(seed, scores), ...]}; every seed has its own image."""
  for prompt, samples in samples_of_prompts.items():
    place = folder / f'{prompt:07d}'
    place.mkdir(parents=True)
    text = {'caption': 'a cat', 'edit': 'make it a dog', 'output': 'a dog'}
    (place / 'prompt.json').write_text(json.dumps(text))
    lines = []
    for number, (seed, scores) in enumerate(samples):
      line = {'sample': number, 'seed': seed, 'p2p_threshold': 0.5, 'cfg_scale': 8.0}
      lines.append(json.dumps(line | scores._asdict()))
      for side in (0, 1) if with_images else ():
        noise = np.random.default_rng([seed, side]).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(place / f'{seed}_{side}.jpg')
    (place / 'scores.jsonl').write_text(''.join(line + '\n' for line in lines))
  return folder


def seeds_of(folder):
  """Seeds of each prompt, in order of rank."""
  return {
    int(file.parent.name): [json.loads(line)['seed'] for line in file.read_text().splitlines()]
    for file in sorted(folder.glob('*/metadata.jsonl'))
  }


def test_every_threshold_counts_and_equal_scores_pass(tmp_path):
  bad = [
    GOOD._replace(clip_sim_0=0.19), GOOD._replace(clip_sim_1=0.19),
    GOOD._replace(clip_sim_dir=0.19), GOOD._replace(clip_sim_image=0.74),
  ]  # fmt: skip
  samples = [GOOD, *bad, Scores(0.2, 0.2, 0.2, 0.75)]
  raw = write_raw(tmp_path / 'raw', {0: list(enumerate(samples))})
  result = filter.filter_pairs([raw], tmp_path / 'out')
  assert seeds_of(tmp_path / 'out') == {0: [0, 5]}
  assert result.drawn == 6 and result.passed_all == result.kept == 2 and result.prompts == 1
  assert set(result.passed.values()) == {5}


def test_the_best_by_direction_are_kept(tmp_path):
  directions = [0.3, 0.5, 0.4, 0.3, 0.6, 0.25]
  samples = [(10 + i, GOOD._replace(clip_sim_dir=d)) for i, d in enumerate(directions)]
  raw = write_raw(tmp_path / 'raw', {3: samples})
  filter.filter_pairs([raw], tmp_path / 'out')
  assert seeds_of(tmp_path / 'out') == {3: [14, 11, 12, 13]}
  assert json.loads((tmp_path / 'out' / 'seeds.json').read_text()) == [
    ['0000003', ['11', '12', '13', '14']]
  ]


def test_a_prompt_without_a_good_pair_is_left_out(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)], 1: [(2, GOOD._replace(clip_sim_0=0.0))]})
  filter.filter_pairs([raw], tmp_path / 'out')
  names = ['0000000', 'filter.json', 'seeds.json']
  assert [path.name for path in sorted((tmp_path / 'out').iterdir())] == names


def test_other_thresholds_can_be_tried_on_the_same_pairs(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD), (2, GOOD._replace(clip_sim_image=0.72))]})
  filter.filter_pairs([raw], tmp_path / 'paper')
  filter.filter_pairs([raw], tmp_path / 'released', Scores(0.2, 0.2, 0.2, 0.7))
  assert (seeds_of(tmp_path / 'paper'), seeds_of(tmp_path / 'released')) == ({0: [1]}, {0: [2, 1]})


def test_workers_folders_are_merged_and_may_not_overlap(tmp_path):
  a = write_raw(tmp_path / 'a', {0: [(1, GOOD)], 2: [(3, GOOD)]})
  b = write_raw(tmp_path / 'b', {1: [(2, GOOD)]})
  filter.filter_pairs([a, b], tmp_path / 'out')
  assert seeds_of(tmp_path / 'out') == {0: [1], 1: [2], 2: [3]}
  with pytest.raises(InputError, match='pairs of the same prompt'):
    filter.filter_pairs([a, a], tmp_path / 'twice')


def test_only_the_best_duplicate_is_kept(tmp_path):
  samples = [(i, GOOD._replace(clip_sim_dir=0.3 + i / 100)) for i in range(3)]
  raw = write_raw(tmp_path / 'raw', {0: samples})
  for side in (0, 1):
    with Image.open(raw / '0000000' / f'2_{side}.jpg') as image:
      image.point(lambda value: min(255, value + 3)).save(raw / '0000000' / f'0_{side}.jpg')
  result = filter.filter_pairs([raw], tmp_path / 'out', drop_duplicates=True)
  assert seeds_of(tmp_path / 'out') == {0: [2, 1]} and result.duplicates == 1


def test_the_result_is_a_data_set(tmp_path):
  raw = write_raw(tmp_path / 'raw', {i: [(1, GOOD), (2, GOOD)] for i in range(10)})
  filter.filter_pairs([raw], tmp_path / 'out')
  lengths = [len(open_source(str(tmp_path / 'out'), split)) for split in SPLITS]
  assert lengths == [10, 0, 0]  # not split into the original's 90, 5 and 5 %
  row = open_source(str(tmp_path / 'out'), 'train', '', 'edit')[0]
  assert row.instructions == ('make it a dog',) and len(row.pairs) == 2
  assert (row.caption, row.edited_caption) == ('a cat', 'a dog')


def test_a_missing_image_stops_the_filter(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]}, with_images=False)
  with pytest.raises(InputError, match='--keep all'):
    filter.filter_pairs([raw], tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_pair_rounded_up_to_a_threshold_may_lack_images(tmp_path):
  border = GOOD._replace(clip_sim_dir=0.2)  # rounded from 0.199996, which an older version refused
  raw = write_raw(tmp_path / 'raw', {0: [(1, border), (2, GOOD), (3, border)]})
  for side in (0, 1):
    (raw / '0000000' / f'1_{side}.jpg').unlink()
  result = filter.filter_pairs([raw], tmp_path / 'out')
  assert seeds_of(tmp_path / 'out') == {0: [2, 3]} and result.passed_all == 2
  raw = write_raw(
    tmp_path / 'low', {0: [(1, border._replace(clip_sim_image=0.69))]}, with_images=False
  )
  with pytest.raises(InputError, match='--keep all'):
    filter.filter_pairs([raw], tmp_path / 'more', Scores(0.1, 0.1, 0.1, 0.6))


def test_a_pair_that_overflowed_passes_nothing(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, Scores(None, 0.5, None, None)), (2, GOOD)]})
  result = filter.filter_pairs([raw], tmp_path / 'out', Scores(-1, -1, -1, -1))
  assert (
    seeds_of(tmp_path / 'out') == {0: [2]}
    and result.broken == 1
    and result.passed['clip_sim_0'] == 1
  )
  filter.draw_histograms(result.scores, filter.PAPER, tmp_path / 'histograms.png')


def test_without_a_passing_pair_nothing_is_written(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})
  assert not filter.filter_pairs([raw], tmp_path / 'out', Scores(1, 1, 1, 1)).kept
  assert [path.name for path in tmp_path.iterdir()] == ['raw']


def test_prompts_without_an_instruction_are_named(tmp_path):
  raw = write_raw(tmp_path / 'raw', {i: [(1, GOOD)] for i in range(3)})
  (raw / '0000001' / 'prompt.json').write_text('{"caption": "a", "output": "b"}')
  (raw / '0000002' / 'prompt.json').write_text('{"caption": "a", "instruction": "b"}')
  with pytest.raises(InputError) as error:
    filter.filter_pairs([raw], tmp_path / 'out')
  assert "0000001/prompt.json has no text 'edit'" in str(error.value)
  assert "0000002/prompt.json has no text 'edit', the instruction; rename" in str(error.value)
  assert not (tmp_path / 'out').exists()


def test_two_filters_do_not_write_one_folder(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})

  def progress(done, total):
    with pytest.raises(InputError, match='another process writes it'):
      filter.filter_pairs([raw], tmp_path / 'out')

  filter.filter_pairs([raw], tmp_path / 'out', progress=progress)
  assert seeds_of(tmp_path / 'out') == {0: [1]}


def test_an_existing_folder_is_not_overwritten(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})
  (tmp_path / 'out').mkdir()
  with pytest.raises(InputError, match='exists'):
    filter.filter_pairs([raw], tmp_path / 'out')


def test_damaged_scores_are_named(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})
  (raw / '0000000' / 'scores.jsonl').write_text('{"sample": 0}\n')
  with pytest.raises(InputError, match=r'scores\.jsonl: is damaged'):
    filter.filter_pairs([raw], tmp_path / 'out')


def test_histograms_are_drawn(tmp_path):
  scores = np.random.default_rng(0).random((50, 4), np.float32)
  filter.draw_histograms(scores, filter.PAPER, tmp_path / 'histograms.png')
  with Image.open(tmp_path / 'histograms.png') as image:
    assert image.width > 400


def test_shards_keep_all_rows_and_take_holdout(tmp_path, ip2p):
  raw = write_raw(tmp_path / 'raw', {i: [(1 + 10 * i, GOOD)] for i in range(20)})
  for name, words, expected in (
    ('all', (), [20, 0, 0]), ('some', ('--holdout', '0.2'), [16, 4, 0]),
  ):  # fmt: skip
    out = tmp_path / name
    status, output = ip2p('filter', raw, out, '--shards', *words)
    assert status == 0, output
    assert [len(open_source(str(out), split)) for split in SPLITS] == expected
