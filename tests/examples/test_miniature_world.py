"""The drawn world, and the oracle that judges edits in it."""

import itertools
import math

import numpy as np
import oracle
import phrases
import pytest
import sunset
import world

from ip2p_jax.data.sources import open_source
from ip2p_jax.errors import InputError

EXAMPLES = [world.example(seed, 'test') for seed in range(200)]


def of_kind(kind):
  return [one for one in EXAMPLES if [edit.kind for edit in one.edits] == [kind]]


def is_done(one, picture):
  return oracle.judge(one, picture).is_done


def blend(one, share):
  """A picture `share` of the way from the scene to the target."""
  before, after = (world.render(scene) for scene in (one.scene, one.edited_scene))
  return np.round(((1 - share) * before + share * after) * 255).astype(np.uint8)


# The world.


def test_a_seed_always_gives_the_same_example():
  assert [world.example(seed, 'test') for seed in range(20)] == EXAMPLES[:20]
  one = EXAMPLES[0]
  np.testing.assert_array_equal(world.picture(one.scene), world.picture(one.scene))


def test_seeds_of_some_kinds_are_as_many_of_each():
  found = world.seeds(5, first=30, kinds=('style', world.TWO_STEPS))
  kinds = [world.kind_of(world.example(seed)) for seed in found]
  assert sorted(kinds) == ['style'] * 3 + [world.TWO_STEPS] * 2
  assert min(found) >= 30 and len(set(found)) == 5
  assert world.seeds(3, first=7) == [7, 8, 9]


def test_training_and_test_share_no_picture():
  def pictures(examples):
    scenes = [scene for one in examples for scene in (one.scene, one.edited_scene)]
    return {world.picture(scene).tobytes() for scene in scenes}

  assert not pictures(EXAMPLES) & pictures(world.example(seed) for seed in range(2000))


def test_half_of_the_test_instructions_are_phrased_as_training_never_is():
  assert [one.is_new_phrasing for one in EXAMPLES[:4]] == [False, True, False, True]
  for name, new in phrases.NEW.items():
    assert not set(new) & set(phrases.TRAINED[name])


def test_everything_the_world_has_occurs():
  scenes = [one.scene for one in EXAMPLES]
  assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)
  assert {scene.pattern for scene in scenes} == set(world.PATTERNS)
  assert {scene.is_night for scene in scenes} == {False, True}
  assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
  things = [thing for scene in scenes for thing in scene.objects]
  assert {thing.shape for thing in things} == set(world.SHAPES)
  assert {thing.colour for thing in things} == set(world.COLOURS)
  assert {thing.size for thing in things} == set(world.SIZES)
  assert {thing.place for thing in things} == set(world.PLACES)
  kinds = {world.kind_of(one) for one in EXAMPLES}
  assert kinds == {*world.KINDS, world.TWO_STEPS}


def test_sunset_is_in_no_training_example_and_no_phrase():
  assert 'sunset' not in world.BACKGROUNDS
  phrasings = {**phrases.TRAINED, **phrases.NEW}
  assert not [text for texts in phrasings.values() for text in texts if 'sun' in text.split()]
  assert not set(sunset.INSTRUCTIONS) & {text for texts in phrasings.values() for text in texts}


@pytest.mark.parametrize('seed', range(4))
def test_the_oracle_judges_sunsets(seed):
  one = sunset.example(seed, 'test')
  assert is_done(one, world.picture(one.edited_scene))
  assert not is_done(one, world.picture(one.scene))
  for background in world.BACKGROUNDS:
    assert not is_done(one, world.picture(one.scene._replace(background=background)))


def test_pairs_of_sunsets_are_a_data_set(tmp_path):
  sunset.write_pairs(tmp_path / 'pairs', 3)
  source = open_source(str(tmp_path / 'pairs'))
  expected = [(sunset.example(seed).instruction,) for seed in range(3)]
  assert [tuple(row.instructions) for row in source] == expected


def test_edges_are_smooth():
  thing = world.Object('circle', 'red', 'large', 'middle', 32.0, 32.0)
  cover = world.coverage(thing)
  assert ((cover > 0.05) & (cover < 0.95)).any()
  assert cover.sum() == pytest.approx(math.pi * world.SIZES['large'] ** 2, rel=0.01)


def test_instructions_and_captions_name_what_they_are_about():
  for one in EXAMPLES:
    for thing in one.scene.objects:
      assert thing.shape in one.caption
    for edit in one.edits:
      if edit.kind == 'recolour':
        assert edit.word in one.instruction and edit.before.shape in one.instruction


# The oracle.


@pytest.mark.long
def test_every_exact_target_is_done_and_keeps_the_rest():
  for one in EXAMPLES:
    verdict = oracle.judge(one, world.picture(one.edited_scene))
    assert verdict.is_done, (one.instruction, verdict.reasons)
    # What the edit changes by less than oracle.CHANGE, 30 dB, counts as the rest.
    assert math.isnan(verdict.kept) or verdict.kept > 30


@pytest.mark.long
def test_no_untouched_input_is_done_though_it_keeps_everything():
  for one in EXAMPLES:
    verdict = oracle.judge(one, world.picture(one.scene))
    assert not verdict.is_done
    assert math.isnan(verdict.kept) or verdict.kept == oracle.BEST_KEPT


def test_no_random_picture_is_done(rng):
  for one in EXAMPLES[:100]:
    assert not is_done(one, rng.integers(0, 256, (64, 64, 3), np.uint8))
    assert not is_done(one, np.full((64, 64, 3), rng.integers(0, 256), np.uint8))


@pytest.mark.long
def test_no_other_scene_is_done():
  for one, other in itertools.pairwise(EXAMPLES):
    shown = world.picture(other.edited_scene)
    # Outline drawings show no colours, so two scenes may give one picture.
    if not np.array_equal(shown, world.picture(one.edited_scene)):
      assert not is_done(one, shown)


@pytest.mark.long
def test_half_an_edit_is_not_done():
  for one in EXAMPLES:
    assert not is_done(one, blend(one, 0.5))


def test_one_step_of_two_is_not_done():
  pairs = [one for one in EXAMPLES if len(one.edits) == 2]
  assert pairs
  for one in pairs:
    for edit in one.edits:
      assert not is_done(one, world.picture(oracle.applied(one.scene, edit)))


@pytest.mark.long
@pytest.mark.parametrize(
  ('kind', 'field', 'words'),
  [
    ('recolour', 'colour', world.COLOURS),
    ('reshape', 'shape', world.SHAPES),
    ('add', 'shape', world.SHAPES),
    ('add', 'colour', world.COLOURS),
    ('add', 'size', world.SIZES),
  ],
)
def test_another_word_than_the_one_asked_for_is_not_done(kind, field, words):
  for one in of_kind(kind)[:10]:
    after = one.edits[0].after
    for word in words:
      other = after._replace(**{field: word})
      things = tuple(other if thing == after else thing for thing in one.edited_scene.objects)
      shown = world.picture(one.edited_scene._replace(objects=things))
      assert is_done(one, shown) == (word == getattr(after, field))


def test_a_target_with_a_little_noise_is_done_and_with_much_is_not(rng):
  for one in EXAMPLES[:60]:
    target = world.render(one.edited_scene)
    shown = lambda noise, t=target: np.uint8(np.clip(t + noise, 0, 1) * 255)
    assert is_done(one, shown(rng.normal(0, 0.02, target.shape)))
    assert not is_done(one, shown(rng.normal(0, 0.5, target.shape)))


def test_a_change_elsewhere_lowers_what_is_kept():
  one = next(one for one in of_kind('recolour') if len(one.scene.objects) == 1)
  shown = world.picture(one.edited_scene).copy()
  shown[:4, :4] = 255 - shown[:4, :4]
  assert oracle.judge(one, shown).kept < 30


def test_a_summary_counts_and_averages():
  verdicts = [oracle.Verdict(True, 30.0, ()), oracle.Verdict(False, math.nan, ('why',))]
  found = oracle.summary(verdicts)
  assert (found['done'], found['kept'], found['count']) == (0.5, 30.0, 2)
  low, high = found['done_interval']
  assert 0 < low < 0.5 < high < 1


def test_wilsons_interval_is_the_books():
  low, high = oracle.wilson(0.85, 500)  # 425 of 500
  assert (round(low, 4), round(high, 4)) == (0.8160, 0.8786)


def test_a_picture_of_another_size_is_a_sentence():
  with pytest.raises(InputError, match=r'the oracle judges uint8 \[64, 64, 3\]'):
    oracle.judge(EXAMPLES[0], np.zeros((32, 32, 3), np.uint8))
