"""Which token answers to which: hand-made cases, the original's rule, and the faults it has."""

import numpy as np
import pytest

from ip2p_jax import alignment
from ip2p_jax.errors import InputError
from ip2p_jax.text import ClipTokenizer
from ip2p_jax.weights import clip_tokenizer

TOKENIZER = ClipTokenizer(clip_tokenizer())
LONG = 'hypotrochoid'  # four tokens


def sources(result: alignment.Alignment, count: int) -> list[int]:
  """The source of each of the first tokens of the target, or -1."""
  return [
    int(column.argmax()) if has else -1
    for column, has in zip(result.matrix.T[:count], result.has_source[:count], strict=True)
  ]


def test_words_know_their_tokens():
  found = TOKENIZER.words(f"It's a {LONG}, asleep")
  assert [word for word, _ in found] == ['it', "'s", 'a', LONG, ',', 'asleep']
  assert [tokens.start for _, tokens in found] == [1, 2, 3, 4, 8, 9]


def test_replace_pairs_the_words_of_captions_that_differ_in_one():
  result = alignment.replace(TOKENIZER, 'a cat on a mat', 'a dog on a mat')
  assert (result.matrix == np.eye(77)).all()
  assert (result.has_source == 1).all()


def test_a_new_word_of_more_tokens_shares_what_the_old_one_has_and_the_rest_follows():
  result = alignment.replace(TOKENIZER, 'a burger on grass', f'a {LONG} on grass')
  assert result.matrix[2, 2:6].tolist() == [0.25] * 4
  assert result.matrix[3, 6] == result.matrix[4, 7] == result.matrix[5, 8] == 1  # on, grass, end
  assert result.matrix[:6].sum() == 6  # nothing is lost
  assert sources(result, 77)[9:] == list(range(9, 77))  # padding


def test_a_new_word_of_fewer_tokens_has_all_that_the_old_one_had():
  result = alignment.replace(TOKENIZER, f'a {LONG} on grass', 'a burger on grass')
  assert result.matrix[2:6, 2].tolist() == [1.0] * 4
  assert sources(result, 12)[3:] == [6, 7, 8, 9, 9, 9, 9, 10, 11]  # none reads a word as padding


def test_replace_wants_words_that_were_swapped():
  with pytest.raises(InputError, match='use refine'):
    alignment.replace(TOKENIZER, 'a cat', 'a black cat')


def test_refine_keeps_what_both_have():
  result = alignment.refine(TOKENIZER, 'soup', 'pea soup with croutons')
  croutons = len(TOKENIZER.words('pea soup with croutons')[3][1])
  expected = [0, -1, 1, -1] + [-1] * croutons + [2]
  assert sources(result, len(expected)) == expected
  assert sources(result, 77)[len(expected) :] == list(range(len(expected), 77))


def test_refine_is_the_original_rule_for_captions_that_grew():
  """Its rule for tokens, restated: see seq_aligner of google/prompt-to-prompt."""
  source, target = 'a photo of a house on a mountain', 'a photo of a house on a mountain at winter'
  ids, target_ids = TOKENIZER([source, target])
  length = len(TOKENIZER.words(source)) + 2
  found = sources(alignment.refine(TOKENIZER, source, target), 77)
  assert found[:9] == list(range(9))
  assert found[9:11] == [-1, -1]
  assert found[11] == length - 1  # end to end
  kept = [j for j, i in enumerate(found) if i >= 0]
  assert (target_ids[kept] == ids[[found[j] for j in kept]]).all()


@pytest.mark.parametrize(
  ('target', 'kind'),
  [
    ('A lion in the snow, at night', 'replace'),
    ('a cat in the snow at night', 'refine'),  # a sign less
    ('a cat sleeping in the snow, at night', 'refine'),
    ('the snow, a cat in at night', 'refine'),  # as many words, but none in its place
  ],
)
def test_the_kind_of_control_follows_from_the_captions(target, kind):
  assert alignment.align(TOKENIZER, 'a cat in the snow, at night', target)[0] == kind


def test_words_are_found_whatever_their_case_and_the_signs_behind_them():
  text = f'A {LONG}, and a Cat. a cat'
  assert alignment.places(TOKENIZER, text, LONG.upper()) == [2, 3, 4, 5]
  assert alignment.places(TOKENIZER, text, 'cat') == [9, 12]
  assert alignment.places(TOKENIZER, text, 'a cat') == [8, 9, 11, 12]
  with pytest.raises(InputError, match="'dog' is not in"):
    alignment.places(TOKENIZER, text, 'dog')


def test_all_tokens_of_a_word_get_its_weight():
  weights = alignment.equalizer(TOKENIZER, f'a {LONG} cat', {LONG: 3.0, 'cat': -1.0})
  assert weights[:9].tolist() == [1, 1, 3, 3, 3, 3, -1, 1, 1]


def test_words_can_have_steps_of_their_own():
  found = alignment.windows(TOKENIZER, 'a lion', 50, 0.8, {'lion': (0.1, 0.4)})
  assert found[:, 0].tolist() == [0, 40]
  assert found[:, 2].tolist() == [5, 20]


@pytest.mark.parametrize('span', [1.5, (0.5, 0.2), (-0.1, 1.0)])
def test_a_window_is_a_part_of_the_steps(span):
  with pytest.raises(InputError, match='fractions'):
    alignment.step_window(span, 50)
