"""The miniature's caption writer: what it starts from, and how its sentences are judged."""

import itertools
import json
import re

import grammar
import numpy as np
import peers
import pytest
import start_writer
import world

from ip2p_jax.captions import generate, triplets

torch = peers.module('torch')
AutoModelForCausalLM = peers.module('transformers').AutoModelForCausalLM
PreTrainedTokenizerFast = peers.module('transformers').PreTrainedTokenizerFast


@pytest.mark.parametrize('split', ['train', 'test'])
def test_every_triplet_of_the_world_belongs_together(split):
  for seed in range(300):
    one = world.example(seed, split)
    assert grammar.belongs(one.caption, one.instruction, one.edited_caption), one


def test_what_was_not_asked_for_does_not_belong():
  examples = [world.example(seed) for seed in range(300)]
  others = list(itertools.pairwise(examples))
  swapped = [grammar.belongs(a.caption, a.instruction, b.edited_caption) for a, b in others]
  misled = [grammar.belongs(a.caption, b.instruction, a.edited_caption) for a, b in others]
  # By chance some do: a caption may leave out what changed.
  assert np.mean(swapped) < 0.02 and np.mean(misled) < 0.05


@pytest.mark.parametrize(
  ('instruction', 'edited'),
  [
    ('make the circle blue', 'a green circle on red'),
    ('make the square blue', 'a blue circle on red'),
    ('remove the circle', 'a red circle on red'),
    ('make it night', 'a red circle on red'),
    ('add a red circle at the top left', 'a red circle and a red circle on red'),
    ('make it red', 'a red circle on red'),
    ('make the circle purplish', 'a blue circle on red'),
    ('make the circle blue', 'a blue circle'),
    ('make it a sketch', 'a sketch of a red circle on red'),
  ],
)
def test_these_do_not_belong(instruction, edited):
  grounds = list(world.BACKGROUNDS)
  text = edited.replace('on red', f'on {grounds[0]}')
  assert not grammar.belongs(f'a red circle on {grounds[0]}', instruction, text)


def test_two_steps_belong_if_both_are_done():
  ground = next(iter(world.BACKGROUNDS))
  before, both = f'a red circle on {ground}', 'make the circle blue and make it night'
  assert grammar.belongs(before, both, f'a large blue circle on {ground} at night')
  assert not grammar.belongs(before, both, f'a blue circle on {ground}')


def test_a_triplet_keeps_the_words_that_the_edit_does_not_change():
  kept, seeds = 0, range(start_writer.FIRST, start_writer.FIRST + 300)
  for seed in seeds:
    one = start_writer.triplet(seed)
    assert grammar.belongs(one.caption, one.instruction, one.edited), one
    edits = world.example(seed).edits
    if len(edits) == 1 and edits[0].kind in ('recolour', 'resize', 'reshape', 'background'):
      before, after = (re.sub(r'\ban\b', 'a', text).split() for text in (one.caption, one.edited))
      assert len(before) == len(after), one
      assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, one
      kept += 1
  assert kept > 100


def test_the_hardest_triplets_are_of_several_objects_and_often_one_goes():
  seeds = range(start_writer.FIRST, start_writer.FIRST + 200)
  ones = [start_writer.triplet(seed, start_writer.several) for seed in seeds]
  assert all(grammar.belongs(one.caption, one.instruction, one.edited) for one in ones)
  counts = [len(grammar.read_caption(one.caption).things) for one in ones]
  assert set(counts) == {2, 3}
  assert counts.count(3) > 60
  kinds = [grammar.read_instruction(one.instruction)[0].kind for one in ones]
  assert kinds.count('remove') > 40
  assert len(set(kinds)) > 8


def test_captions_to_write_for_are_of_scenes_that_no_triplet_is_of(tmp_path):
  for folder, count in (('few', 40), ('more', 60)):
    start_writer.main(tmp_path / folder, count, 10)
  few, more = ((tmp_path / folder / 'captions.txt').read_text() for folder in ('few', 'more'))
  assert few == more


def test_the_start_is_read_by_transformers_and_by_us_alike(tmp_path):
  start_writer.main(tmp_path, 300, 20)
  learned = triplets.read(tmp_path / 'triplets.jsonl')
  assert 200 < len(learned) <= 300  # but for the long ones
  assert json.loads((tmp_path / 'model' / 'config.json').read_text())['vocab_size'] == 512
  held_out = (tmp_path / 'captions.txt').read_text().splitlines()
  assert all(grammar.read_caption(caption) for caption in held_out)
  assert not {one.caption for one in learned} & set(held_out)

  prompt = triplets.prompt(held_out[0])
  ours = generate.Language.load(tmp_path / 'model')
  (found,) = generate.write(ours, [prompt], seeds=[0], temperature=0, max_tokens=12, stop=None)
  model = AutoModelForCausalLM.from_pretrained(tmp_path / 'model')
  tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'model' / 'tokenizer.json'))
  ids = torch.tensor([tokenizer.encode(prompt)])
  expected = model.generate(
    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
  )
  assert found.tokens == tuple(expected[0, ids.shape[1] :].tolist())
