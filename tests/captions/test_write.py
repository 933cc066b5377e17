"""Edits for many captions: reading, judging and writing, and resumed runs."""

import collections
import datetime
import itertools
import json
import random
import re

import pyarrow
import pytest
from pyarrow import parquet

from ip2p_jax.captions import answers, merge, rules, triplets, write
from ip2p_jax.captions.answers import answers_file, read_answers
from ip2p_jax.captions.judge import REASONS, Writing, judge
from ip2p_jax.captions.read import Caption, read_captions
from ip2p_jax.captions.write import write_all
from ip2p_jax.errors import InputError
from ip2p_jax.pairs import prompts

WRITING = Writing(seed=1)
IDENTITY = {'model': 'tiny'}
MINE = [Caption(2 * i, f'a cat on mat {i}', f'http://here/{i}') for i in range(60)]
GOOD = 'make it {}\n%%\n{} in {}\nEND'


class Stop(Exception):
  pass


class Model:
  """A backend: caption and seed decide an answer; each call has another order."""

  def __init__(self, stop_after: int | None = None):
    self.asked, self.left, self.calls = [], stop_after, []

  def __call__(self, texts, seeds):
    self.calls.append(len(texts))
    order = list(range(len(texts)))
    random.Random(len(self.asked)).shuffle(order)
    for i in order:
      self.asked.append((texts[i], seeds[i]))
      yield i, self.answer(texts[i], seeds[i])
      if self.left is not None:
        self.left -= 1
        if self.left < 0:
          raise Stop

  @staticmethod
  def answer(text, seed):
    bad = (
      'make it red\nEND',
      f'make it red\n%%\n{text.upper()}.\nEND',
      'make it red\n%%\na red',
      '',
    )
    kind = seed % 8
    return bad[kind] if kind < len(bad) else GOOD.format(seed, text, seed)


def lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def contents(folder):
  """The files that do not depend on how a run went."""
  return {file.name: file.read_bytes() for file in folder.iterdir()
          if not file.name.startswith(('.', 'answers'))}  # fmt: skip


@pytest.fixture(scope='module')
def full_run(tmp_path_factory):
  """A run that nobody stopped."""
  folder = tmp_path_factory.mktemp('whole')
  assert write_all(MINE, folder, Model(), WRITING, IDENTITY)
  return folder


# Reading captions.


def write_captions(file, rows):
  if file.suffix == '.txt':
    file.write_text('\n'.join(row['TEXT'] for row in rows))
  elif file.suffix == '.csv':
    file.write_text('caption,url\n' + ''.join(f'"{row["TEXT"]}",{row["URL"]}\n' for row in rows))
  elif file.suffix == '.jsonl':
    same = ({'input': row['TEXT'], 'url': row['URL'], 'edit': 'x'} for row in rows)
    file.write_text(''.join(json.dumps(row) + '\n' for row in same))
  else:
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file


@pytest.mark.parametrize('kind', ['.txt', '.csv', '.jsonl', '.parquet'])
def test_captions_are_read_from_any_table_or_text(tmp_path, kind):
  rows = [{'TEXT': f'a cat, {name}', 'URL': f'http://{name}'} for name in ('one', 'two')]
  result = read_captions(write_captions(tmp_path / f'some{kind}', rows))
  url = lambda name: '' if kind == '.txt' else f'http://{name}'
  assert result.kept == [Caption(0, 'a cat, one', url('one')), Caption(1, 'a cat, two', url('two'))]
  if kind == '.parquet':
    assert read_captions(tmp_path).kept == result.kept  # a folder of them


def test_a_caption_is_written_for_once(tmp_path):
  rows = [
    {'TEXT': 'A cat', 'URL': 'http://1'},
    {'TEXT': ' a  CAT. ', 'URL': 'http://2'},  # the same but for case, space and stop
    {'TEXT': 'a dog', 'URL': 'http://1'},  # of the same image
    {'TEXT': '', 'URL': 'http://4'},
    {'TEXT': None, 'URL': 'http://5'},
    {'TEXT': 'very ' * 80, 'URL': 'http://6'},
    {'TEXT': 'a\ndog', 'URL': None},
    {'TEXT': 'a bird', 'URL': None},
  ]
  file = write_captions(tmp_path / 'some.parquet', rows)
  result = read_captions(file)
  assert [(caption.row, caption.text) for caption in result.kept] == [
    (0, 'A cat'), (6, 'a dog'), (7, 'a bird')
  ]  # fmt: skip
  assert result.left_out == {'duplicate': 2, 'empty': 2, 'long': 1}


def test_the_column_can_be_named(tmp_path):
  file = tmp_path / 'some.jsonl'
  file.write_text('{"caption": "a", "alt": "b"}')
  assert read_captions(file, 'alt').kept[0].text == 'b'
  with pytest.raises(InputError, match='has no column other; the columns are caption, alt'):
    read_captions(file, 'other')


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('some.jsonl', '{"words": "a"}', 'no column caption; the columns are words'),
    ('some.jsonl', '{"caption": "a"}\n{', 'line 2: cannot be read'),
    ('some.jsonl', '{"caption": \n{"caption": "a"', 'line 1: cannot be read'),
    ('some.csv', 'caption,caption\na,b', "two columns 'caption'"),
    ('some.txt', '\n\n', 'has no usable caption'),
    ('some.txt', b'\xff\xfe', 'is not UTF-8'),
    ('none.txt', None, 'No such file'),
    ('none.csv', None, 'no such file'),
  ],
)
def test_a_bad_file_of_captions_is_refused(tmp_path, name, content, message):
  file = tmp_path / name
  if content is not None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(InputError, match=message):
    read_captions(file)


def test_a_text_may_begin_with_a_byte_order_mark(tmp_path):
  (tmp_path / 'some.txt').write_bytes('\ufeffa cat\n'.encode())
  assert read_captions(tmp_path / 'some.txt').kept == [Caption(0, 'a cat')]


def test_captions_with_marks_of_the_formats_are_left_out(tmp_path):
  (tmp_path / 'some.txt').write_text('ENDless summer\n##\nThe END\n')
  result = read_captions(tmp_path / 'some.txt')
  assert [caption.text for caption in result.kept] == ['The END']
  assert result.left_out == {'like a mark of the formats': 2}


@pytest.mark.parametrize(
  ('one', 'other', 'is_same'),
  [
    ('A cat', ' a  CAT .', True),
    ('a cat?!', 'a cat', True),
    ('...and a cat', 'and a cat', False),
    ('!!!', '!!!', True),
    ('!!!', '???', False),
  ],
)
def test_case_spaces_and_final_punctuation_make_no_difference(one, other, is_same):
  assert (rules.plain(one) == rules.plain(other)) == is_same


# Judging.


@pytest.mark.parametrize(
  ('answer', 'reason'),
  [
    ('make it red\n%%\na red cat\nEND', ''),
    ('make it red\n%%\na red cat\nEND\nand so on', ''),
    ('make it red\r\n%%\r\na red cat\r\nEND', ''),
    ('make it\u2028red\n%%\na red\u00a0cat\nEND', ''),
    ('make it\x00 red\n%%\na red cat\nEND', 'parts'),
    ('make it red\n%%\na red \ufffd\nEND', 'parts'),
    ('a red cat\n%%\nA red cat.\nEND', 'parts'),
    ('', 'empty'),
    ('make it red\n%%\na red cat', 'unfinished'),
    ('make it red\nEND', 'parts'),
    ('make it red\n%%\na red cat\n%%\na dog\nEND', 'parts'),
    ('make it red\n%%\n\nEND', 'parts'),
    ('Sure!\nmake it red\n%%\na red cat\nEND', 'parts'),
    ('make it red\n%%\nA Cat!\nEND', 'unchanged'),
    ('make ' * 26 + '\n%%\na red cat\nEND', 'long'),
    ('make it red\n%%\na' + ' red' * 80 + ' cat\nEND', 'long'),
    ('make it rude\n%%\na red cat\nEND', 'flagged'),
    ('make it red\n%%\na rude cat\nEND', 'flagged'),
    ('A cat\n%%\na red cat\nEND', 'parts'),
    ('##\n%%\na red cat\nEND', 'parts'),
    ('make it bigger\n%%\na red cat\nEND', 'undrawable'),
    ('add two dogs\n%%\na cat and two dogs\nEND', 'undrawable'),
    ('zoom out\n%%\na red cat\nEND', 'undrawable'),
  ],
)
def test_an_answer_is_refused_for_a_reason(answer, reason):
  refused, parts = judge('a cat', answer, WRITING, lambda text: 'rude' in text)
  assert refused == reason and (reason == '' or reason in REASONS)
  assert parts == (None if reason else ('make it red', 'a red cat'))


def test_an_answer_without_findings_is_kept():
  caption = 'a cat on a mat'
  texts = (
    'make it a lion', 'a lion on a mat', 'A cat on a mat.', 'END', '%%', 'put it on the left',
    'stock market report 2020', 'make ' * 26, 'a cat ' * 40, 'view it from above',
  )  # fmt: skip
  reasons = collections.Counter()
  for parts in itertools.product(texts, texts):
    refused, kept = judge(caption, f'{parts[0]}\n%%\n{parts[1]}\nEND', WRITING, None)
    clean = tuple(' '.join(part.split()) for part in parts)
    result = list(rules.problems(triplets.Triplet(caption, *clean)))
    assert bool(refused) == bool(result) and kept == (None if result else clean)
    reasons[refused] += 1
  assert {*reasons} == {'', 'parts', 'unchanged', 'long', 'unrelated', 'undrawable'}


def test_captions_that_a_check_refuses_are_not_asked_for(tmp_path):
  (tmp_path / 'some.txt').write_text('a caf\ufffd\na cat\x07\na dog\n')
  result = read_captions(tmp_path / 'some.txt')
  assert result.kept == [Caption(2, 'a dog')] and result.left_out == {'garbled': 2}


def test_wrong_settings_are_refused():
  for wrong in (
    {'attempts': 0}, {'temperature': -1}, {'top_p': 1.5}, {'top_p': 0.0}, {'max_words': 0},
    {'max_tokens': 2**15}, {'temperature': float('nan')},
  ):  # fmt: skip
    with pytest.raises(InputError, match=next(iter(wrong))):
      Writing(**wrong)


# Writing.


def test_written_prompts_are_read_by_pairs(full_run):
  result = prompts.read_prompts(full_run / write.PROMPTS)
  assert 40 < len(result) <= len(MINE)
  for prompt, line in zip(result, lines(full_run / write.PROMPTS), strict=True):
    assert prompt.edited_caption == f'{prompt.caption} in {line["seed"]}'
    assert line['edit'] == f'make it {line["seed"]}'


def test_every_line_has_its_source(full_run):
  by_row = {caption.row: caption for caption in MINE}
  for line in lines(full_run / write.PROMPTS):
    caption = by_row[line['row']]
    assert (line['caption'], line['url']) == (caption.text, caption.url)
    assert line['seed'] == WRITING.seed_of(caption.text, line['attempt'])
    assert line['model'] == 'tiny' and line['temperature'] == 0.7 and line['max_tokens'] == 256


def test_a_refused_answer_is_asked_for_again_with_another_seed(tmp_path):
  model = Model()
  write_all(MINE, tmp_path, model, WRITING, IDENTITY)
  assert len(set(model.asked)) == len(model.asked)
  kept = {line['caption'] for line in lines(tmp_path / write.PROMPTS)}
  for caption in MINE:
    seeds = [seed for text, seed in model.asked if text == caption.text]
    assert seeds == [WRITING.seed_of(caption.text, i) for i in range(len(seeds))]
    good = [seed % 8 >= 4 for seed in seeds]
    assert not any(good[:-1]) and (caption.text in kept) == good[-1]
    assert good[-1] or len(seeds) == WRITING.attempts


def test_seeds_differ_between_captions_attempts_and_runs():
  seeds = {Writing(seed=run).seed_of(f'caption {i}', attempt)
           for run in range(3) for i in range(100) for attempt in range(4)}  # fmt: skip
  assert len(seeds) == 1200 and max(seeds) < 2**31


def test_refused_answers_fill_up_the_next_calls(tmp_path, full_run, monkeypatch):
  monkeypatch.setattr(write, 'CHUNK', 16)
  model = Model()
  write_all(MINE, tmp_path, model, WRITING, IDENTITY)
  assert set(model.calls[:4]) == {16}
  assert contents(tmp_path) == contents(full_run)


def test_two_workers_write_what_one_does(tmp_path, full_run):
  assert not write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (1, 2))
  assert not (tmp_path / write.PROMPTS).exists()
  assert write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (0, 2))
  name = write.PROMPTS
  assert (tmp_path / name).read_bytes() == (full_run / name).read_bytes()
  rows = [{line['row'] for line in read_answers(answers_file(tmp_path, (i, 2)))}
          for i in range(2)]  # fmt: skip
  assert rows == [{caption.row for caption in MINE[i::2]} for i in range(2)]


@pytest.mark.parametrize('seed', range(4))
def test_a_stopped_run_ends_with_the_same_prompts(tmp_path, full_run, seed):
  draw, asked = random.Random(seed), []
  file = answers_file(tmp_path, (0, 1))
  while True:
    model = Model(draw.randrange(30))
    try:
      assert write_all(MINE, tmp_path, model, WRITING, IDENTITY)
      break
    except Stop:
      if draw.random() < 0.5:  # as a kill in the middle of a line leaves it
        file.write_bytes(file.read_bytes()[: -draw.randrange(1, 12)])
    finally:
      asked += model.asked
  assert contents(tmp_path) == contents(full_run)
  result = [(line['row'], line['attempt']) for line in read_answers(file)]
  assert len(result) == len(set(result))
  assert set(asked) == {(c.text, WRITING.seed_of(c.text, attempt)) for row, attempt in result
                        for c in MINE if c.row == row}  # fmt: skip


def test_a_run_that_is_done_asks_for_nothing(tmp_path, full_run):
  write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)
  model, calls = Model(), []
  assert write_all(MINE, tmp_path, model, WRITING, IDENTITY, progress=lambda *n: calls.append(n))
  assert not model.asked and calls == [(60, 60)]
  assert contents(tmp_path) == contents(full_run)


def test_a_limited_run_can_continue_with_more_captions(tmp_path, full_run):
  first, second = Model(), Model()
  assert write_all(MINE, tmp_path, first, WRITING, IDENTITY, limit=10)
  assert {text for text, _ in first.asked} == {caption.text for caption in MINE[:10]}
  assert {line['row'] for line in lines(tmp_path / write.PROMPTS)} <= set(range(0, 20, 2))
  with pytest.raises(Stop):
    write_all(MINE, tmp_path, Model(stop_after=5), WRITING, IDENTITY)
  assert not (tmp_path / write.PROMPTS).exists()  # which would look whole, and is not
  assert write_all(MINE, tmp_path, second, WRITING, IDENTITY)
  assert not {*first.asked} & {*second.asked}
  assert contents(tmp_path) == contents(full_run)


def test_prompts_are_written_when_all_workers_are_done(tmp_path, full_run):
  assert not write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (0, 2), limit=10)
  assert write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (1, 2), limit=10)
  assert not write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (0, 2))
  assert not (tmp_path / write.PROMPTS).exists()  # worker 1 has done ten, and no more
  assert write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (1, 2))
  name = write.PROMPTS
  assert (tmp_path / name).read_bytes() == (full_run / name).read_bytes()


def test_a_run_of_fewer_captions_changes_nothing(tmp_path, full_run):
  write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)
  assert write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, limit=10)
  assert contents(tmp_path) == contents(full_run)


def test_a_local_model_is_identified_by_its_weights(tmp_path):
  here = {'model': 'writer', 'weights': '1'}
  write_all(MINE, tmp_path, Model(), WRITING, here)
  assert write_all(MINE, tmp_path, Model(), WRITING, here | {'model': 'renamed'})
  with pytest.raises(InputError, match="begun with weights '1', not '2'"):
    write_all(MINE, tmp_path, Model(), WRITING, here | {'weights': '2'})


def test_prompts_have_the_finished_captions_of_all_workers(tmp_path, full_run):
  run = lambda i, limit: write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, (i, 2), limit=limit)
  assert not run(0, 21)
  assert run(1, 20)  # the 21st caption is of worker 0, which has done it
  first = [line for line in lines(full_run / write.PROMPTS) if line['row'] <= MINE[20].row]
  assert lines(tmp_path / write.PROMPTS) == first
  assert run(1, 21) and run(0, 21)
  assert not run(0, 60) and not run(0, 60)  # worker 1 has not
  assert run(1, 60)


def test_a_run_is_confirmed_before_anything_is_written(tmp_path):
  def confirm(texts):
    assert texts == [caption.text for caption in MINE] and not (tmp_path / 'new').exists()
    raise Stop

  with pytest.raises(Stop):
    write_all(MINE, tmp_path / 'new', Model(), WRITING, IDENTITY, confirm=confirm)
  assert not (tmp_path / 'new').exists()


def test_a_refused_caption_is_not_asked_for_again(tmp_path):
  def complete(texts, seeds):
    for i, answer in Model()(texts, seeds):
      yield i, None if 'mat 7' in texts[i] else answer

  assert write_all(MINE, tmp_path, complete, WRITING, IDENTITY)
  result, again = answers.read_yield(tmp_path), Model()
  assert result.hopeless == {answers.UNWELCOME_CAPTION: 1} and result.captions == 60
  assert 'captions refused by the model: 1 of 60 (1.7%)' in answers.describe(result)
  assert write_all(MINE, tmp_path, again, WRITING, IDENTITY) and not again.asked


def test_without_kept_answers_there_are_no_prompts(tmp_path):
  complete = lambda texts, seeds: ((i, '') for i in range(len(texts)))
  assert write_all(MINE, tmp_path, complete, WRITING, IDENTITY)
  assert not (tmp_path / write.PROMPTS).exists()


def test_answers_without_settings_are_refused(tmp_path):
  write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)
  (tmp_path / write.SETTINGS).write_text('[]')
  with pytest.raises(InputError, match=r'captions\.json: holds no settings'):
    write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)
  (tmp_path / write.SETTINGS).unlink()
  with pytest.raises(InputError, match=r'has answers, but no captions\.json'):
    write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)


def test_progress_counts_captions(tmp_path):
  calls = []
  write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, progress=lambda *n: calls.append(n))
  assert [done for done, _ in calls] == list(range(61)) and {total for _, total in calls} == {60}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'writing': Writing(seed=2)}, 'begun with seed 1, not 2'),
    ({'identity': {'model': 'other'}}, "begun with model 'tiny', not 'other'"),
    ({'captions': MINE[1:]}, 'begun with other captions'),
    ({'shard': (0, 2)}, 'begun with shards 1, not 2'),
  ],
)
def test_other_settings_need_another_folder(tmp_path, change, message):
  same = {'captions': MINE, 'writing': WRITING, 'identity': IDENTITY, 'shard': (0, 1)}
  write_all(out=tmp_path, complete=Model(), **same)
  before, model = contents(tmp_path), Model()
  with pytest.raises(InputError, match=message):
    write_all(out=tmp_path, complete=model, **same | change)
  assert not model.asked and contents(tmp_path) == before


def test_two_processes_cannot_be_the_same_worker(tmp_path):
  def complete(texts, seeds):
    with pytest.raises(InputError, match='another process writes it'):
      write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)
    yield from Model()(texts, seeds)

  assert write_all(MINE, tmp_path, complete, WRITING, IDENTITY)


@pytest.mark.parametrize('line', ['{"row": ', '{"row": "1", "attempt": 0, "refused": "long"}',
                                  '{"row": 1, "attempt": 0, "edit": "x"}', '[]',
                                  '[' * 100_000])  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line):
  write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)
  file = answers_file(tmp_path, (0, 1))
  damaged = file.read_bytes().splitlines(keepends=True)
  damaged[4] = line.encode() + b'\n'
  file.write_bytes(b''.join(damaged))
  with pytest.raises(InputError, match=rf'{re.escape(str(file))}: line 5 is damaged'):
    write_all(MINE, tmp_path, Model(), WRITING, IDENTITY)


@pytest.mark.parametrize('out', ['gs://bucket/edits', ''])
def test_a_bucket_or_no_name_is_refused(tmp_path, out):
  with pytest.raises(InputError, match=f'{out!r}: give a path of this machine'):
    write_all(MINE, out, Model(), WRITING, IDENTITY)
  with pytest.raises(InputError, match=f'{out!r}: give a path of this machine'):
    merge.merge_answers([], out)


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / 'out').touch()
  with pytest.raises(InputError, match='out: is a file; give a folder'):
    write_all(MINE, tmp_path / 'out', Model(), WRITING, IDENTITY)


# Moderation.


def test_a_flagged_caption_is_never_asked_for(tmp_path):
  model = Model()
  write_all(MINE, tmp_path, model, WRITING, IDENTITY, is_flagged=lambda text: 'mat 7' in text)
  assert len(model.asked) >= 59 and 'a cat on mat 7' not in {text for text, _ in model.asked}
  result = answers.read_yield(tmp_path)
  assert result.hopeless == {answers.FLAGGED_CAPTION: 1} and result.captions == 60
  again = Model()
  write_all(MINE, tmp_path, again, WRITING, IDENTITY, is_flagged=lambda text: 'mat 7' in text)
  assert not again.asked


def test_flagged_answers_are_asked_for_again(tmp_path):
  odd = lambda text: text.startswith('make it') and int(text.split()[-1]) % 16 < 8
  write_all(MINE, tmp_path, Model(), WRITING, IDENTITY, is_flagged=odd)
  result = answers.read_yield(tmp_path)
  assert result.refused['flagged'] > 0
  assert all(not odd(line['edit']) for line in lines(tmp_path / write.PROMPTS))


# Yield and merging.


def test_the_yield_counts_what_was_kept_and_refused(full_run):
  model = Model()
  result = answers.read_yield(full_run)
  count = len(list(read_answers(answers_file(full_run, (0, 1)))))
  assert result.captions == 60 and result.answers == count
  assert set(result.refused) == {'parts', 'unchanged', 'unfinished', 'empty'}
  kept = len(lines(full_run / write.PROMPTS))
  assert len(result.instructions) == kept == count - sum(result.refused.values())
  texts = list(answers.describe(result))
  assert texts[0] == f'captions with an edit: {kept} of 60 ({100 * kept / 60:.1f}%)'
  assert any(line.startswith('answers refused, the caption unchanged: ') for line in texts)
  assert not model.asked


def test_merged_runs_have_each_caption_once(tmp_path, full_run):
  other = [Caption(0, 'A cat on mat 3.'), Caption(1, 'a bird'), Caption(2, 'x', MINE[5].url)]
  writing = Writing(seed=9, attempts=20)
  write_all(other, tmp_path / 'other', Model(), writing, IDENTITY)
  sources = [full_run / write.PROMPTS, tmp_path / 'other' / write.PROMPTS]
  count, duplicates = merge.merge_answers(sources, tmp_path / 'all.jsonl')
  first = lines(full_run / write.PROMPTS)
  shared = {line['caption'] for line in first} & {MINE[3].text, MINE[5].text}
  assert duplicates == len(shared) and count == len(first) + 3 - duplicates
  assert lines(tmp_path / 'all.jsonl')[: len(first)] == first
  assert len(prompts.read_prompts(tmp_path / 'all.jsonl')) == count
  for name in ('all.jsonl', 'new.csv', 'new'):
    with pytest.raises(InputError, match=f'{name}: exists, or does not end in'):
      merge.merge_answers(sources, tmp_path / name)


def test_the_later_of_two_merges_is_refused(tmp_path, full_run, monkeypatch):
  source, out = full_run / write.PROMPTS, tmp_path / 'all.jsonl'

  def create(file, content, real=merge.storage.create):
    out.write_text('of another merge')
    real(file, content)

  monkeypatch.setattr(merge.storage, 'create', create)
  with pytest.raises(InputError, match='exists'):
    merge.merge_answers([source], out)
  assert out.read_text() == 'of another merge'


def test_merged_triplets_have_the_same_column_names(tmp_path):
  one = {'input': 'a cat', 'edit': 'make it a dog', 'output': 'a dog', 'score': float('nan')}
  (tmp_path / 'one.jsonl').write_text(json.dumps(one) + '\n')
  when = datetime.datetime(2026, 1, 1)
  other = {'original_prompt': 'a bird', 'edit_prompt': 'x', 'edited_prompt': 'y', 'when': when}
  parquet.write_table(pyarrow.Table.from_pylist([other | {'row': 3}]), tmp_path / 'other.parquet')
  sources = [tmp_path / 'one.jsonl', tmp_path / 'other.parquet']
  assert merge.merge_answers(sources, tmp_path / 'all.jsonl') == (2, 0)
  assert lines(tmp_path / 'all.jsonl') == [
    {'caption': 'a cat', 'edit': 'make it a dog', 'output': 'a dog'},
    {'caption': 'a bird', 'edit': 'x', 'output': 'y', 'row': 3},
  ]
  (tmp_path / 'bad.jsonl').write_text(json.dumps({'caption': 'a', 'edit': 'b', 'output': ''}))
  with pytest.raises(InputError, match=r'bad\.jsonl: line 1 has no edited caption'):
    merge.merge_answers([tmp_path / 'bad.jsonl'], tmp_path / 'more.jsonl')
