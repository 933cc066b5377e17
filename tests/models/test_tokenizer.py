"""The tokenizer: the ids of transformers' CLIPTokenizer, and damaged files."""

import json
import random

import numpy as np
import peers
import pytest
import torch_models as reference

from ip2p_jax.errors import InputError
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.weights import clip_tokenizer, learned_tokens, tokenizer_files

transformers = peers.module('transformers')

TEXTS = [
  '', 'make it winter', 'Turn HIM into a  cyborg!!! in 1984', "it's the dog's \n\t bone, isn't it?",
  'é à ü naïve', '日本語 emoji 😀 — “quotes”', 'x <|endoftext|> y', 'word ' * 100,
]  # fmt: skip


def their_tokenizer(files, folder):
  """transformers' tokenizer of these files, which are written to `folder`."""
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)
  return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('pad_token', [None, '!'])
def test_ids_are_those_of_transformers(pad_token, tmp_path):
  files = clip_tokenizer(pad_token)
  theirs = their_tokenizer(files, tmp_path)
  expected = theirs(TEXTS, padding='max_length', truncation=True, max_length=77)['input_ids']
  assert (ClipTokenizer(files)(TEXTS) == np.array(expected)).all()


def test_cut_off_text_is_returned():
  tokenizer = ClipTokenizer(clip_tokenizer())
  assert tokenizer.cut_off('x ' * 75) == ''
  assert tokenizer.cut_off('x ' * 75 + 'and the rest').strip() == 'and the rest'


def test_the_one_file_of_transformers_5_is_read_too(tmp_path):
  files = reference.tokenizer_files()
  their_tokenizer(files, tmp_path).save_pretrained(tmp_path / 'new')
  new = {path.name: path.read_bytes() for path in (tmp_path / 'new').iterdir()}
  assert 'merges.txt' not in new
  assert (ClipTokenizer(new)(TEXTS) == ClipTokenizer(files)(TEXTS)).all()


LEARNED = [
  '<cat-toy>', 'S*', 'sks', 'Sks Dog', transformers.AddedToken('<sp>', lstrip=True, rstrip=True),
  transformers.AddedToken('word1', single_word=True),
]  # fmt: skip
WITH_LEARNED = [
  'a <cat-toy> on', 'a<cat-toy>b', 'A <CAT-TOY> x', 'S* s* (S*)', 'sks sksy SKS', 'x!<cat-toy>, y',
  'sks dog Sks Dog', 'word1 word12 aword1 word1.', 'a  <sp>  b', '<special> <Special>',
  ' <cat-toy>', '<cat-toy><cat-toy>', "S*'s", 'e\u0301 S*\u0301', '\u00a0<sp>\u3000x',
  '<cat-toy> ' * 90,
]  # fmt: skip


@pytest.fixture(scope='module')
def learned(tmp_path_factory):
  """The folder of a tokenizer with learned tokens, saved by transformers 5."""
  folder = tmp_path_factory.mktemp('learned')
  tokenizer = their_tokenizer(clip_tokenizer(), folder)
  assert tokenizer.add_tokens(LEARNED) == 6
  tokenizer.add_special_tokens({'additional_special_tokens': ['<Special>']})
  tokenizer.save_pretrained(folder / 'new')
  return folder / 'new'


def in_layout(layout, files):
  """The files as versions of transformers write them: 5, from 4.34 on, and before 4.34."""
  if layout == 'tokenizer.json':
    return files
  content = json.loads(files['tokenizer.json'])
  noted = {x['content']: x for x in content['added_tokens'] if x['id'] > 49407}
  old = clip_tokenizer() | {
    'added_tokens.json': json.dumps({name: x['id'] for name, x in noted.items()}).encode(),
  }
  if layout == 'added_tokens.json':
    return old
  config = json.loads(old['tokenizer_config.json'])
  notes = {str(x.pop('id')): x for x in noted.values()}
  return old | {
    'tokenizer_config.json': json.dumps(config | {'added_tokens_decoder': notes}).encode()
  }


@pytest.mark.parametrize('layout', ['tokenizer.json', 'tokenizer_config.json', 'added_tokens.json'])
def test_learned_tokens_are_one_id_each_as_in_transformers(learned, layout, tmp_path):
  files = in_layout(layout, {path.name: path.read_bytes() for path in learned.iterdir()})
  theirs = their_tokenizer(files, tmp_path)
  rng = random.Random(0)
  pieces = [
    *map(str, LEARNED),
    '<Special>',
    ' ',
    '  ',
    'a',
    'cat',
    ',',
    '.',
    'É',
    '1',
    'S',
    '*',
    '<',
  ]
  texts = TEXTS + WITH_LEARNED
  texts += [''.join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(500)]
  expected = theirs(texts, padding='max_length', truncation=True, max_length=77)['input_ids']
  assert (ClipTokenizer(files)(texts) == np.array(expected)).all()
  assert len(theirs) == 49415
  # Transformers 4 and 5 read the written files, and give the same ids.
  written = tokenizer_files.read(tmp_path)
  assert 'tokenizer.json' not in written
  assert learned_tokens(written) == learned_tokens(files)
  assert {'added_tokens.json', 'tokenizer_config.json'} <= written.keys()
  again = their_tokenizer(written, tmp_path / 'written')
  assert again(texts)['input_ids'] == theirs(texts)['input_ids']


def test_a_learned_token_of_several_vectors_becomes_several_tokens():
  added = {'<cat>': 49408, '<cat>_1': 49409, '<cat>_2': 49410, '<dog>': 49411}
  tokenizer = ClipTokenizer(clip_tokenizer() | {'added_tokens.json': json.dumps(added).encode()})
  ids = tokenizer(['a <cat> and <dog>'])[0]
  assert ids[:8].tolist() == [49406, 320, 49408, 49409, 49410, 537, 49411, 49407]
  assert [word for word, _ in tokenizer.words('a <cat> sits')][-1] == 'sits'


def test_without_learned_gives_clips_tokenizer(learned):
  files = tokenizer_files.read(learned)
  plain = tokenizer_files.without_learned(files)
  assert learned_tokens(plain) == [] and 'added_tokens.json' not in plain
  assert (ClipTokenizer(plain)(WITH_LEARNED) == ClipTokenizer(clip_tokenizer())(WITH_LEARNED)).all()


@pytest.mark.parametrize(
  ('added', 'message'),
  [
    ('{"<cat>": 49408}', 'has 49408 rows, none for the learned tokens <cat>'),
    ('{"<cat>": 17}', 'have the same id, 17'),
    ('{"make</w>": 49408}', 'is 49408 among the added ones'),
    ('{"<cat>": "x"}', 'cannot be read'),
    ('[]', 'cannot be read'),
  ],
)
def test_learned_tokens_that_do_not_fit_are_named(added, message):
  with pytest.raises(InputError, match=message):
    ClipTokenizer(clip_tokenizer() | {'added_tokens.json': added.encode()}, 77, 49408)


def changed(files, name, change):
  return files | {name: change(files[name].decode()).encode()}


def with_id(text, token, value):
  return json.dumps(json.loads(text) | {token: value})


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('merges.txt', lambda text: text[: len(text) // 2], 'merges.txt'),  # within a line
    ('merges.txt', lambda text: '\n'.join(text.split('\n')[:20_000]), 'cut short'),
    ('merges.txt', lambda text: text.replace('\nt h\n', '\nt h e\n'), 'merges.txt'),
    ('vocab.json', lambda text: text[:1000], 'cannot be read'),
    ('vocab.json', lambda text: with_id(text, 'make</w>', 999_999), 'no rows for'),
    ('vocab.json', lambda text: with_id(text, 'make</w>', 'seven'), 'no rows for'),
    ('vocab.json', lambda text: text.replace('"<|endoftext|>"', '"<|end|>"'), 'endoftext'),
    ('vocab.json', lambda _: '[]', 'not a list of tokens and ids'),
  ],
)
def test_damaged_files_are_refused(name, change, message):
  with pytest.raises(InputError, match=message):
    ClipTokenizer(changed(clip_tokenizer(), name, change), 77, 49408)
