"""Files of triplets, the formats of prompts and completions, and the check of a file."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from ip2p_jax.captions import rules, triplets
from ip2p_jax.captions.check import NEAR, check_triplets, diversity, jaccard, repeated
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.errors import InputError

CAT = Triplet('a cat on a mat', 'make it a lion', 'a lion on a mat')


def write(file, *rows):
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return file


def check(file):
  """(triplets, lines)"""
  lines = []
  read, count = check_triplets(file, lines.append, lambda done, total: None)
  assert count == len(lines)
  return read, lines


# Formats.


def test_formats_are_the_originals():
  assert triplets.prompt(CAT.caption) == 'a cat on a mat\n##\n'
  assert triplets.completion(CAT) == 'make it a lion\n%%\na lion on a mat\nEND'


def test_a_completion_is_parsed_with_its_end_or_without():
  complete = triplets.completion(CAT)
  assert triplets.parse(complete) == ('make it a lion', 'a lion on a mat')
  assert triplets.parse(complete + ' and more') == triplets.parse(complete.removesuffix('\nEND'))


@pytest.mark.parametrize(
  'completion',
  ['', 'make it a lion', 'a\n%%\nb\n%%\nc', '\n%%\na lion', 'make it\n%%\n\nEND', 'a %% b'],
)
def test_anything_but_two_parts_is_no_answer(completion):
  assert triplets.parse(completion) is None


# Files.


@pytest.mark.parametrize(
  'names',
  [
    ('input', 'edit', 'output'),  # as the original wrote them by hand
    ('caption', 'edit', 'output'),  # as it generated them
    ('input_caption', 'instruction', 'output_caption'),
    ('original_prompt', 'edit_prompt', 'edited_prompt'),
    ('caption', 'instruction', 'edited_caption'),
    ('caption', 'instruction', 'edited'),
  ],
)
def test_columns_may_be_called_as_in_known_data_sets(tmp_path, names):
  row = dict(zip(names, CAT, strict=True)) | {'url': 'http://here'}
  assert triplets.read(write(tmp_path / 'some.jsonl', row)) == [CAT]


def test_csv_and_parquet_give_the_same_triplets(tmp_path):
  (tmp_path / 'some.csv').write_text(
    'edit,input,output\nmake it a lion,a cat on a mat,"a lion on a mat"'
  )
  table = pyarrow.table({'input': [CAT.caption], 'edit': [CAT.instruction], 'output': [CAT.edited]})
  parquet.write_table(table, tmp_path / 'some.parquet')
  assert triplets.read(tmp_path / 'some.csv') == triplets.read(tmp_path / 'some.parquet') == [CAT]
  assert triplets.read(tmp_path) == [CAT]  # a folder of Parquet files


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([{'input': 'a cat', 'edit': ' ', 'output': 'b'}], 'line 1 has no instruction'),
    ([{'input': 'a cat', 'output': 'b'}], 'no column has a known name for the instruction'),
    ([CAT._asdict(), {'caption': 3, 'instruction': 'x', 'edited': 'y'}], 'line 2 has no caption'),
    ([{'input': 'a\n##\nb', 'edit': 'x', 'output': 'y'}], "has a line '##' in its caption"),
    (
      [{'input': 'a', 'edit': 'x', 'output': 'b\nEND'}],
      'has a line that begins with END in its edited',
    ),
    ([{'input': 'a', 'edit': 'x', 'output': 'ENDless'}], 'has a line that begins with END in its'),
  ],
)
def test_a_bad_row_is_refused_with_its_place(tmp_path, rows, message):
  with pytest.raises(InputError, match=message):
    triplets.read(write(tmp_path / 'some.jsonl', *rows))


@pytest.mark.parametrize(
  ('name', 'message'),
  [('none.jsonl', 'no such file'), ('odd.xml', 'of unknown kind'), ('empty.jsonl', 'is empty')],
)
def test_a_missing_odd_or_empty_file_is_refused(tmp_path, name, message):
  (tmp_path / 'odd.xml').touch()
  (tmp_path / 'empty.jsonl').touch()
  with pytest.raises(InputError, match=message):
    triplets.read(tmp_path / name)


# The bundled triplets.


def test_the_bundled_triplets_have_no_findings():
  read, lines = check(triplets.bundled_file())
  assert len(read) >= 120 and not lines


def test_the_bundled_triplets_are_varied():
  read = triplets.read(triplets.bundled_file())
  firsts = {triplet.instruction.split()[0] for triplet in read}
  assert len(firsts) >= 50
  assert len({triplet.instruction for triplet in read}) == len(read)


# Checking.


@pytest.mark.parametrize(
  ('triplet', 'finding'),
  [
    (CAT._replace(edited='A cat on a mat.'), 'the edited caption is the caption'),
    (CAT._replace(edited='stock market report 2020'), 'little to do with'),
    (CAT._replace(instruction='move the cat to the sofa'), "of places \\('move'\\)"),
    (CAT._replace(instruction='put it on the left'), "of places \\('left'\\)"),
    (CAT._replace(instruction='swap their places'), 'of places'),
    (CAT._replace(instruction='add two dogs'), "of numbers \\('two'\\)"),
    (CAT._replace(instruction='zoom out'), 'of the camera'),
    (CAT._replace(instruction='view it from above'), 'of the camera'),
    (CAT._replace(instruction='make ' * 26), 'the instruction has 26 words'),
    (CAT._replace(caption='a cat on a mat ' * 20), 'the caption is longer than the 77 tokens'),
    (CAT._replace(instruction=''), 'has no instruction'),
    (CAT._replace(edited=''), 'has no edited caption'),
    (CAT._replace(instruction='put the dog in front of the cat'), 'of places'),
    (CAT._replace(instruction='add a sun at the bottom'), 'of places'),
    (CAT._replace(instruction='enlarge the cat'), 'of places'),
    (CAT._replace(instruction='make the cat bigger'), 'of places'),
    (CAT._replace(instruction='turn it upside-down'), 'of places'),
    (CAT._replace(instruction='a drone shot of it'), 'of the camera'),
    (CAT._replace(instruction='a bird’s eye view'), 'of the camera'),
    (CAT._replace(instruction='add 100 balloons'), 'of numbers'),
    (CAT._replace(instruction='add several balloons'), 'of numbers'),
    (CAT._replace(instruction='make it\na lion'), 'the instruction has more than one line'),
    (CAT._replace(edited='a lion on a \ufffd mat'), 'the edited caption has control characters'),
    (CAT._replace(instruction=CAT.edited), 'the instruction is one of the captions'),
    (CAT._replace(instruction='centre the cat'), 'of places'),
    (CAT._replace(instruction='lower the camera'), 'of the camera'),
    (CAT._replace(instruction='a\n%%\nb'), "has a line '%%'"),
  ],
)
def test_each_finding_names_its_line(tmp_path, triplet, finding):
  other = Triplet('tulips in a vase', 'make them roses', 'roses in a vase')
  file = write(tmp_path / 'some.jsonl', other._asdict(), triplet._asdict())
  _, lines = check(file)
  assert len(lines) == 1 and lines[0].startswith(f'{file}: line 2')
  with pytest.raises(AssertionError, match=finding):
    raise AssertionError(lines[0])


@pytest.mark.parametrize(
  'instruction',
  [
    'turn it into a lion', 'add a cat behind the house', 'swap the cat for a lion',
    'make it look like the 1920s', 'give him flip-flops', 'put it at the bottom of the sea',
    'add a camera', 'set it in the Middle Ages', 'give her a flip phone', 'add left-over pizza',
    'shift the colours to blue', 'swap out the cat with a lion', 'make it 5 pm',
    'put on a three piece suit', 'add a Formula 1 car', 'make him 20 years older',
    'a two-tone coat', 'give him a camera', 'make it bright red',
  ],
)  # fmt: skip
def test_possible_edits_are_no_finding(instruction):
  assert not list(rules.problems(CAT._replace(instruction=instruction)))


def test_one_thing_may_become_another():
  assert not rules.is_unrelated('A dog', 'A fox')
  assert rules.is_unrelated('a dog on a mat', 'a stock market report')


def test_an_unreadable_row_is_a_finding(tmp_path):
  file = write(tmp_path / 'some.jsonl', CAT._asdict())
  file.write_text(file.read_text() + '{"caption": \n' + json.dumps(['a']) + '\n')
  read, lines = check(file)
  assert read == [CAT]
  assert [line.startswith(f'{file}: line {i}') for i, line in zip((2, 3), lines, strict=True)]


def test_repeated_captions_are_found_exact_and_near(rng):
  captions = [
    'a red fox in the snow of the north', 'A red fox in the snow of the north.',
    'a red fox in the snow of the far north', 'a blue jay',
  ]  # fmt: skip
  assert list(repeated(captions)) == [(1, 0, True), (2, 0, False)]


def test_captions_without_a_word_are_repeated_too():
  assert list(repeated(['!!!', '???', '!!!'])) == [(2, 0, True)]


def test_no_near_caption_is_missed(rng):
  """Against a comparison of all pairs."""
  captions = [
    ' '.join(f'w{j}' for j in rng.choice(9, rng.integers(3, 9), False)) for _ in range(200)
  ]
  sets = [rules.words(caption) for caption in captions]
  expected = [
    i for i, own in enumerate(sets) if any(jaccard(own, other) >= NEAR for other in sets[:i])
  ]
  # One that is the same as an earlier one stands for it.
  assert [later for later, _, _ in repeated(captions)] == expected


def test_diversity_counts_first_words_and_lengths():
  lines = list(diversity(['Make it red', 'make it red', 'add a big red hat']))
  assert lines == [
    'instructions: 2 different of 3',
    'first words: 2 different; make 67%, add 33%',
    'words of an instruction: 1 to 3 67%, 4 to 6 33%, 7 to 9 0%, '
    '10 to 12 0%, 13 to 16 0%, 17 to 25 0%',
  ]
  either = [list(diversity(texts)) for texts in (['turn red', 'make it'], ['make it', 'turn red'])]
  assert either[0] == either[1]
