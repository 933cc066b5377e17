"""The filter: thresholds, ranks, yields, the original's layout, and what it refuses."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from ip2p_jax.cli import main
from ip2p_jax.data.rows import SPLITS
from ip2p_jax.data.sources import open_source
from ip2p_jax.errors import InputError
from ip2p_jax.pairs import filter
from ip2p_jax.pipeline.scores import Scores

GOOD = Scores(0.3, 0.3, 0.3, 0.8)


def write_raw(folder, samples_of_prompts, first=0, with_images=True):
  """Raw pairs: {prompt: [(seed, scores), ...]}; the image of a seed is of its own pattern."""
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


def kept(folder):
  """Seeds of each prompt, in order of rank."""
  return {
    int(file.parent.name): [json.loads(line)['seed'] for line in file.read_text().splitlines()]
    for file in sorted(folder.glob('*/metadata.jsonl'))
  }


def test_each_threshold_counts_and_borders_pass(tmp_path):
  bad = [
    GOOD._replace(clip_sim_0=0.19), GOOD._replace(clip_sim_1=0.19),
    GOOD._replace(clip_sim_dir=0.19), GOOD._replace(clip_sim_image=0.74),
  ]  # fmt: skip
  samples = [GOOD, *bad, Scores(0.2, 0.2, 0.2, 0.75)]
  raw = write_raw(tmp_path / 'raw', {0: list(enumerate(samples))})
  found = filter.filter_pairs([raw], tmp_path / 'out')
  assert kept(tmp_path / 'out') == {0: [0, 5]}
  assert found.drawn == 6 and found.passed_all == found.kept == 2 and found.prompts == 1
  assert set(found.passed.values()) == {5}


def test_the_best_by_direction_stay_best_first_and_seeds_break_ties(tmp_path):
  directions = [0.3, 0.5, 0.4, 0.3, 0.6, 0.25]
  samples = [(10 + i, GOOD._replace(clip_sim_dir=d)) for i, d in enumerate(directions)]
  raw = write_raw(tmp_path / 'raw', {3: samples})
  filter.filter_pairs([raw], tmp_path / 'out')
  assert kept(tmp_path / 'out') == {3: [14, 11, 12, 13]}
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
  assert (kept(tmp_path / 'paper'), kept(tmp_path / 'released')) == ({0: [1]}, {0: [2, 1]})


def test_workers_folders_are_merged_and_may_not_overlap(tmp_path):
  a = write_raw(tmp_path / 'a', {0: [(1, GOOD)], 2: [(3, GOOD)]})
  b = write_raw(tmp_path / 'b', {1: [(2, GOOD)]})
  filter.filter_pairs([a, b], tmp_path / 'out')
  assert kept(tmp_path / 'out') == {0: [1], 1: [2], 2: [3]}
  with pytest.raises(InputError, match='pairs of the same prompt'):
    filter.filter_pairs([a, a], tmp_path / 'twice')


def test_of_pairs_that_look_the_same_the_best_stays(tmp_path):
  samples = [(i, GOOD._replace(clip_sim_dir=0.3 + i / 100)) for i in range(3)]
  raw = write_raw(tmp_path / 'raw', {0: samples})
  for side in (0, 1):
    with Image.open(raw / '0000000' / f'2_{side}.jpg') as image:
      image.point(lambda value: min(255, value + 3)).save(raw / '0000000' / f'0_{side}.jpg')
  found = filter.filter_pairs([raw], tmp_path / 'out', drop_duplicates=True)
  assert kept(tmp_path / 'out') == {0: [2, 1]} and found.duplicates == 1


def test_the_result_is_a_data_set(tmp_path):
  raw = write_raw(tmp_path / 'raw', {i: [(1, GOOD), (2, GOOD)] for i in range(10)})
  filter.filter_pairs([raw], tmp_path / 'out')
  lengths = [len(open_source(str(tmp_path / 'out'), split)) for split in SPLITS]
  assert lengths == [10, 0, 0]  # none is lost to the original's 90, 5 and 5 %
  row = open_source(str(tmp_path / 'out'), 'train', '', 'edit')[0]
  assert row.instructions == ('make it a dog',) and len(row.pairs) == 2
  assert (row.caption, row.edited_caption) == ('a cat', 'a dog')


def test_an_image_that_was_not_kept_is_told_and_nothing_is_written(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]}, with_images=False)
  with pytest.raises(InputError, match='--keep all'):
    filter.filter_pairs([raw], tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_pair_that_was_rounded_up_to_a_threshold_may_lack_its_images(tmp_path):
  border = GOOD._replace(clip_sim_dir=0.2)  # 0.199996 before it was rounded, and judged then
  raw = write_raw(tmp_path / 'raw', {0: [(1, border), (2, GOOD), (3, border)]})
  for side in (0, 1):
    (raw / '0000000' / f'1_{side}.jpg').unlink()
  found = filter.filter_pairs([raw], tmp_path / 'out')
  assert kept(tmp_path / 'out') == {0: [2, 3]} and found.passed_all == 2
  raw = write_raw(
    tmp_path / 'low', {0: [(1, border._replace(clip_sim_image=0.69))]}, with_images=False
  )
  with pytest.raises(InputError, match='--keep all'):
    filter.filter_pairs([raw], tmp_path / 'more', Scores(0.1, 0.1, 0.1, 0.6))


def test_a_pair_that_overflowed_passes_nothing(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, Scores(None, 0.5, None, None)), (2, GOOD)]})
  found = filter.filter_pairs([raw], tmp_path / 'out', Scores(-1, -1, -1, -1))
  assert (
    kept(tmp_path / 'out') == {0: [2]} and found.broken == 1 and found.passed['clip_sim_0'] == 1
  )
  filter.draw_histograms(found.scores, filter.PAPER, tmp_path / 'histograms.png')


def test_where_nothing_passes_nothing_is_written(tmp_path):
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
  assert "0000002/prompt.json has no text 'edit': the instruction is called so" in str(error.value)
  assert not (tmp_path / 'out').exists()


def test_two_filters_do_not_write_one_folder(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})

  def progress(done, total):
    with pytest.raises(InputError, match='another process writes it'):
      filter.filter_pairs([raw], tmp_path / 'out')

  filter.filter_pairs([raw], tmp_path / 'out', progress=progress)
  assert kept(tmp_path / 'out') == {0: [1]}


def test_what_is_there_is_not_overwritten(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})
  (tmp_path / 'out').mkdir()
  with pytest.raises(InputError, match='exists'):
    filter.filter_pairs([raw], tmp_path / 'out')


def test_damaged_numbers_are_named(tmp_path):
  raw = write_raw(tmp_path / 'raw', {0: [(1, GOOD)]})
  (raw / '0000000' / 'scores.jsonl').write_text('{"sample": 0}\n')
  with pytest.raises(InputError, match=r'scores\.jsonl: is damaged'):
    filter.filter_pairs([raw], tmp_path / 'out')


def test_histograms_are_drawn(tmp_path):
  scores = np.random.default_rng(0).random((50, 4), np.float32)
  filter.draw_histograms(scores, filter.PAPER, tmp_path / 'histograms.png')
  with Image.open(tmp_path / 'histograms.png') as image:
    assert image.width > 400


def test_shards_of_good_pairs_keep_all_rows_and_hold_out_what_is_asked_for(
  tmp_path, monkeypatch, capsys
):
  raw = write_raw(tmp_path / 'raw', {i: [(1 + 10 * i, GOOD)] for i in range(20)})
  monkeypatch.setattr('ip2p_jax.cli.console.cache_compilations', lambda: None)
  for name, words, expected in (
    ('all', (), [20, 0, 0]), ('some', ('--holdout', '0.2'), [16, 4, 0]),
  ):  # fmt: skip
    out = tmp_path / name
    monkeypatch.setattr(sys, 'argv', ['ip2p', 'filter', str(raw), str(out), '--shards', *words])
    with pytest.raises(SystemExit) as stop:
      main.main()
    assert not stop.value.code, capsys.readouterr()
    assert [len(open_source(str(out), split)) for split in SPLITS] == expected
