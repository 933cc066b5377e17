"""Alignment of tokens: hand-made cases, and the rule of the released code."""

import numpy as np
import pytest

from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pairs import alignment
from ip2p_jax.weights import clip_tokenizer

TOKENIZER = ClipTokenizer(clip_tokenizer())
LONG = 'hypotrochoid'  # four tokens


# The released code, restated from its description: spaces separate words, and the number of letters
# of the tokens finds their words.


def their_places(text: str) -> list[list[int]]:
  """The tokens of each word."""
  words, places, letters = text.split(' '), [[]], 0
  ids = TOKENIZER([text])[0]
  for place in range(1, used(text) - 1):
    places[-1].append(place)
    letters += len(TOKENIZER.decode(ids[place : place + 1]))
    if letters >= len(words[len(places) - 1]):
      places.append([])
      letters = 0
  return places[:-1]


def used(text: str) -> int:
  """The number of tokens, with start and end."""
  return int((TOKENIZER([text])[0] == TOKENIZER([''])[0, 1]).argmax()) + 1


def their_replacement(source: str, target: str) -> tuple[np.ndarray, int]:
  """The matrix, and the first token after the last replaced word."""
  old, new = source.split(' '), target.split(' ')
  places, target_places = their_places(source), their_places(target)
  matrix, i, j = np.zeros((77, 77)), 0, 0
  for word in [k for k in range(len(new)) if old[k] != new[k]]:
    rows, columns = places[word], target_places[word]
    while i < rows[0]:
      matrix[i, j] = 1
      i, j = i + 1, j + 1
    same = len(rows) == len(columns)
    matrix[np.ix_(rows, columns)] = np.eye(len(rows)) if same else 1 / len(columns)
    i, j = i + len(rows), j + len(columns)
  tail = np.arange(j, 77 - max(i - j, 0))
  matrix[tail, tail] = 1
  return matrix, j


def their_refinement(source: str, target: str) -> list[int]:
  """The source of each token of the target, or -1."""
  x, y = TOKENIZER([source])[0, : used(source)], TOKENIZER([target])[0, : used(target)]
  best, way = np.zeros((len(x) + 1, len(y) + 1)), {}
  for i in range(1, len(x) + 1):
    for j in range(1, len(y) + 1):
      steps = {
        'left': best[i, j - 1],
        'up': best[i - 1, j],
        'both': best[i - 1, j - 1] + (1 if x[i - 1] == y[j - 1] else -1),
      }
      way[i, j] = max(steps, key=steps.get)  # the first maximum
      best[i, j] = steps[way[i, j]]
  result, i, j = [], len(x), len(y)
  while j:
    step = way.get((i, j), 'left')
    if step == 'up':
      i -= 1
      continue
    j -= 1
    i -= step == 'both'
    result.append(i if step == 'both' else -1)
  return result[::-1]


SWAPS = [
  ('a photo of a rose', 'a close-up of a rose'),
  ('a close-up of a rose', 'a photo of a rose'),
  ('an x-ray of a hand', 'an oil-painting of a hand'),
  ("a dog's bone", "a lion's bone"),
  ("a dog's bone", 'a dog bone'),
  ("the dogs' bone", "the hypotrochoid's bone"),
  ('a red rose, and a cat.', 'a blue lily, and a hypotrochoid.'),
  ('a burger, on grass', 'a lasagne, on grass'),
  ('a cat in the snow, at night', 'the snow, a cat in at night'),
  ('a cat in the snow, at night', 'a cat in the snow at night'),
  ('a black cat on a mat', 'a cat on a red mat'),
  ('35mm photo of 2 cats', '50mm photo of 12 cats'),
  ('a cat and a cat and a cat', 'a cat and a hypotrochoid and a cat'),
  ('a hypotrochoid and a cat', 'a cat and a hypotrochoid'),
  ('Cat, cat, CAT', 'cat. Cat! dog?'),
  ('"a" (cat)', '"the" (hypotrochoid)'),
  ('a cat -- asleep', 'a cat & asleep'),
  ('t-shirt', 'a-b-c-d'),
  ('photo', 'photo'),
]


@pytest.mark.parametrize(('source', 'target'), SWAPS)
def test_swaps_match_the_released_code_up_to_its_tail(source, target):
  ours = alignment.replace(TOKENIZER, source, target)
  theirs, end = their_replacement(source, target)
  np.testing.assert_array_equal(ours.matrix[:, :end], theirs[:, :end].astype(np.float32))
  shift = used(target) - used(source)
  if shift == 0:
    np.testing.assert_array_equal(ours.matrix, theirs.astype(np.float32))
  else:  # the released code does not shift its tail
    assert sources(ours, used(target))[end:] == list(range(end - shift, used(source)))
  assert (ours.has_source == 1).all()


def test_random_captions_are_aligned_as_in_the_released_code(rng):
  words = (
    f"a the cat dog dog's x-ray close-up {LONG} {LONG}'s rose, rose. lion's Cat 35mm 2 & \"red\" on"
  ).split()
  draw = lambda count: ' '.join(rng.choice(words, count))
  for _ in range(100):
    source, target = draw(rng.integers(1, 9)), draw(rng.integers(1, 9))
    ours = sources(alignment.refine(TOKENIZER, source, target), 77)
    assert ours[: used(target)] == their_refinement(source, target)
    if used(source) <= used(target):  # else their padding reads words
      assert ours[used(target) :] == list(range(used(target), 77))
    count = len(source.split())
    target = draw(count)
    ours, (theirs, end) = (f(source, target) for f in (replaced, their_replacement))
    np.testing.assert_array_equal(ours[:, :end], theirs[:, :end].astype(np.float32))
    if used(source) == used(target):
      np.testing.assert_array_equal(ours, theirs.astype(np.float32))


def replaced(source: str, target: str) -> np.ndarray:
  return alignment.replace(TOKENIZER, source, target).matrix


def test_windows_are_those_of_the_released_code():
  """The released table has one row more than steps. The last row is never read."""
  for steps in range(1, 201):
    for hundredths in range(0, 101, 1 if steps in (10, 50, 100) else 5):
      share = hundredths / 100
      table = np.zeros(steps + 1, bool)
      table[: int(share * (steps + 1))] = True
      start, stop = alignment.windows(TOKENIZER, 'a lion', steps, share, {})[:, 0]
      assert (start, stop) == (0, table[:steps].sum()), (steps, share)
      assert alignment.step_window(share, steps) == (0, int(share * steps))
      start, stop = alignment.windows(TOKENIZER, '', steps, (share, 1.0), {})[:, 0]
      assert (start, stop) == (min(int(share * (steps + 1)), steps), steps)


def sources(result: alignment.Alignment, count: int) -> list[int]:
  """The source of each of the first tokens of the target, or -1."""
  return [
    int(column.argmax()) if has else -1
    for column, has in zip(result.matrix.T[:count], result.has_source[:count], strict=True)
  ]


def test_words_know_their_tokens():
  words = TOKENIZER.words(f"It's a {LONG}, asleep")
  assert [word for word, _ in words] == ['it', "'s", 'a', LONG, ',', 'asleep']
  assert [tokens.start for _, tokens in words] == [1, 2, 3, 4, 8, 9]


def test_replace_pairs_words_one_by_one():
  result = alignment.replace(TOKENIZER, 'a cat on a mat', 'a dog on a mat')
  assert (result.matrix == np.eye(77)).all()
  assert (result.has_source == 1).all()


def test_a_longer_new_word_shares_the_attention():
  result = alignment.replace(TOKENIZER, 'a burger on grass', f'a {LONG} on grass')
  assert result.matrix[2, 2:6].tolist() == [0.25] * 4
  assert result.matrix[3, 6] == result.matrix[4, 7] == result.matrix[5, 8] == 1  # on, grass, end
  assert result.matrix[:6].sum() == 6  # nothing is lost
  assert sources(result, 77)[9:] == list(range(9, 77))  # padding


def test_a_shorter_new_word_gets_all_the_attention():
  result = alignment.replace(TOKENIZER, f'a {LONG} on grass', 'a burger on grass')
  assert result.matrix[2:6, 2].tolist() == [1.0] * 4
  assert sources(result, 12)[3:] == [6, 7, 8, 9, 9, 9, 9, 10, 11]  # padding never reads a word


def test_replace_refuses_an_inserted_word():
  with pytest.raises(InputError, match='use refine'):
    alignment.replace(TOKENIZER, 'a cat', 'a black cat')


def test_refine_maps_common_tokens():
  result = alignment.refine(TOKENIZER, 'soup', 'pea soup with croutons')
  croutons = len(TOKENIZER.words('pea soup with croutons')[3][1])
  expected = [0, -1, 1, -1] + [-1] * croutons + [2]
  assert sources(result, len(expected)) == expected
  assert sources(result, 77)[len(expected) :] == list(range(len(expected), 77))


def test_refine_follows_the_original_rule_for_longer_captions():
  """The rule of seq_aligner in google/prompt-to-prompt, restated."""
  source, target = 'a photo of a house on a mountain', 'a photo of a house on a mountain at winter'
  ids, target_ids = TOKENIZER([source, target])
  length = len(TOKENIZER.words(source)) + 2
  result = sources(alignment.refine(TOKENIZER, source, target), 77)
  assert result[:9] == list(range(9))
  assert result[9:11] == [-1, -1]
  assert result[11] == length - 1  # end to end
  common = [j for j, i in enumerate(result) if i >= 0]
  assert (target_ids[common] == ids[[result[j] for j in common]]).all()


@pytest.mark.parametrize(
  ('target', 'kind'),
  [
    ('A lion in the snow, at night', 'replace'),
    ('an x-ray in the snow, at night', 'replace'),  # more tokens, with signs
    ("a cat's in the snow, at night", 'refine'),  # grew
    ('a cat in the snow at night', 'refine'),  # a sign less
    ('a cat sleeping in the snow, at night', 'refine'),
    ('the snow, a cat in at night', 'refine'),  # as many words, but in another order
  ],
)
def test_the_kind_of_control_follows_from_the_captions(target, kind):
  assert alignment.align(TOKENIZER, 'a cat in the snow, at night', target)[0] == kind


def test_places_ignore_case_and_signs():
  text = f'A {LONG}, and a Cat. a cat'
  assert alignment.places(TOKENIZER, text, LONG.upper()) == [2, 3, 4, 5]
  assert alignment.places(TOKENIZER, text, 'cat') == [9, 12]
  assert alignment.places(TOKENIZER, text, 'a cat') == [8, 9, 11, 12]
  with pytest.raises(InputError, match="'dog' is not in"):
    alignment.places(TOKENIZER, text, 'dog')


def test_all_tokens_of_a_word_get_its_weight():
  weights = alignment.equalizer(TOKENIZER, f'a {LONG} cat', {LONG: 3.0, 'cat': -1.0})
  assert weights[:9].tolist() == [1, 1, 3, 3, 3, 3, -1, 1, 1]


def test_words_can_have_their_own_steps():
  windows = alignment.windows(TOKENIZER, 'a lion', 50, 0.8, {'lion': (0.1, 0.4)})
  assert windows[:, 0].tolist() == [0, 40]
  assert windows[:, 2].tolist() == [5, 20]


@pytest.mark.parametrize('span', [1.5, (0.5, 0.2), (-0.1, 1.0)])
def test_a_window_outside_of_the_steps_is_refused(span):
  with pytest.raises(InputError, match='fractions'):
    alignment.step_window(span, 50)
