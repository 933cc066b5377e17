"""The tokenizer: the ids of transformers' CLIPTokenizer, and damage noticed."""

import json

import numpy as np
import peers
import pytest
import torch_models as reference

from ip2p_jax.errors import InputError
from ip2p_jax.text import ClipTokenizer
from ip2p_jax.weights import clip_tokenizer

CLIPTokenizer = peers.module('transformers').CLIPTokenizer

TEXTS = [
  '', 'make it winter', 'Turn HIM into a  cyborg!!! in 1984', "it's the dog's \n\t bone, isn't it?",
  'é à ü naïve', '日本語 emoji 😀 — “quotes”', 'x <|endoftext|> y', 'word ' * 100,
]  # fmt: skip


@pytest.mark.parametrize('pad_token', [None, '!'])
def test_ids_are_those_of_transformers(pad_token, tmp_path):
  files = clip_tokenizer(pad_token)
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  theirs = CLIPTokenizer.from_pretrained(tmp_path)
  expected = theirs(TEXTS, padding='max_length', truncation=True, max_length=77)['input_ids']
  assert (ClipTokenizer(files)(TEXTS) == np.array(expected)).all()


def test_what_is_cut_off_is_told():
  tokenizer = ClipTokenizer(clip_tokenizer())
  assert tokenizer.cut_off('x ' * 75) == ''
  assert tokenizer.cut_off('x ' * 75 + 'and the rest').strip() == 'and the rest'


def test_the_one_file_of_transformers_5_is_read_too(tmp_path):
  files = reference.tokenizer_files()
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / 'new')
  new = {path.name: path.read_bytes() for path in (tmp_path / 'new').iterdir()}
  assert 'merges.txt' not in new
  assert (ClipTokenizer(new)(TEXTS) == ClipTokenizer(files)(TEXTS)).all()


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
def test_damaged_files_are_noticed(name, change, message):
  with pytest.raises(InputError, match=message):
    ClipTokenizer(changed(clip_tokenizer(), name, change), 77, 49408)
