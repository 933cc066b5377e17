"""`ip2p captions`, from files to files, with a model of this machine and with a server."""

import functools
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from fake_server import answer_to, caption_of, status
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ip2p_jax.captions import write
from ip2p_jax.captions.answers import answers_file, read_answers
from ip2p_jax.pairs import prompts

KEY = 'sk-do-not-tell'
# The texts that may follow a text in the model below, with their logits.
CHAIN = {
  '\n##\n': {'make it ': 20},
  'make it ': {'red': 20, 'blue': 20, 'gold': 20},
  'red': {'\n%%\n': 20, '\nEND': 19},
  'blue': {'\n%%\n': 20},
  'gold': {'\n%%\n': 20},
  '\n%%\n': {'a red cat': 20, 'a blue cat': 20, 'a golden house': 20},
  'a red cat': {'\nEND': 20, '\n%%\n': 19},
  'a blue cat': {'\nEND': 20},
  'a golden house': {'\nEND': 20},
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A language model that writes random edits by a table of tokens that may follow each other.

  Its single layer adds nothing, its embeddings are one-hot, and its head is the table.
  """
  folder = tmp_path_factory.mktemp('model')
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  words = sorted({word for key, row in CHAIN.items() for word in (key, *row)})
  tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
  tokenizer.save(str(folder / 'tokenizer.json'))
  vocabulary = tokenizer.get_vocab_size()
  width = vocabulary + vocabulary % 2
  head = np.zeros((vocabulary, width), np.float32)
  for word, row in CHAIN.items():
    for follower, logit in row.items():
      place = tokenizer.token_to_id(follower), tokenizer.token_to_id(word)
      head[place] = logit / width**0.5  # the norm gives one-hot rows this length
  zeros = {'self_attn.q_proj': (width, width), 'self_attn.k_proj': (width, width),
           'self_attn.v_proj': (width, width), 'self_attn.o_proj': (width, width),
           'mlp.gate_proj': (8, width), 'mlp.up_proj': (8, width), 'mlp.down_proj': (width, 8),
           'input_layernorm': (width,), 'post_attention_layernorm': (width,)}  # fmt: skip
  tensors = {f'model.layers.0.{name}.weight': np.zeros(shape, np.float32)
             for name, shape in zeros.items()}  # fmt: skip
  tensors['model.embed_tokens.weight'] = np.eye(vocabulary, width, dtype=np.float32)
  tensors['model.norm.weight'] = np.ones(width, np.float32)
  save_file(tensors | {'lm_head.weight': head}, folder / 'model.safetensors')
  config = {
    'model_type': 'llama', 'vocab_size': vocabulary, 'hidden_size': width, 'intermediate_size': 8,
    'num_hidden_layers': 1, 'num_attention_heads': 1, 'num_key_value_heads': 1,
    'max_position_embeddings': 256, 'rms_norm_eps': 1e-6, 'hidden_act': 'silu',
    'rope_theta': 10000.0, 'tie_word_embeddings': False,
  }  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture
def ip2p(ip2p):
  """Runs `ip2p captions` with these words: (status, output)."""
  return functools.partial(ip2p, 'captions')


@pytest.fixture
def source(tmp_path):
  file = tmp_path / 'captions.txt'
  file.write_text(''.join(f'a cat on mat {i}\n' for i in range(20)))
  return file


def asking(fake, source, out, *more):
  return ('write', source, out, '--server', fake.url, '--server-model', 'tiny', *more)


# A local model.


def test_a_local_model_writes_edits(ip2p, model, source, tmp_path):
  words = ('--model', model, '--slots', 4)
  code, output = ip2p('write', source, tmp_path / 'one', *words)
  assert code == 0 and 'captions with an edit: ' in output and 'first words: 1 different' in output
  assert len(prompts.read_prompts(tmp_path / 'one' / write.PROMPTS)) > 15
  answers = list(read_answers(answers_file(tmp_path / 'one', (0, 1))))
  good = [line for line in answers if 'edit' in line]
  assert {line['edit'] for line in good} == {'make it red', 'make it blue', 'make it gold'}
  assert {line['output'] for line in good} <= set(CHAIN)
  assert {line['refused'] for line in answers if 'refused' in line} == {'parts', 'unrelated'}

  for i in (1, 0):  # other slots and two workers give the same bytes
    defaults = ('--api', 'chat', '--top-p', 1)  # a script may repeat defaults
    words = ('--model', model, '--shard', f'{i}/2')
    code, output = ip2p('write', source, tmp_path / 'two', *words, *defaults)
    assert code == 0 and ('other shards are still missing' in output) == (i == 1)
  name = write.PROMPTS
  assert (tmp_path / 'two' / name).read_bytes() == (tmp_path / 'one' / name).read_bytes()

  code, output = ip2p('check', tmp_path / 'one' / name)
  assert code == 0 and 'has little to do with' not in output  # 'a golden house' of a cat is refused

  words = ('--model', model, '--slots', 4)
  code, output = ip2p('write', source, tmp_path / 'one', *words, '--temperature', 0, '--top-p', 1)
  assert code == 2 and 'begun with temperature 0.7, not 0.0' in output

  other = shutil.copytree(model, tmp_path / 'renamed')
  assert ip2p('write', source, tmp_path / 'one', '--model', other)[0] == 0
  config = json.loads((other / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps(config | {'rms_norm_eps': 0.1}))
  code, output = ip2p('write', source, tmp_path / 'one', '--model', other)
  assert code == 2 and 'was begun with config ' in output


@pytest.mark.slow
def test_a_killed_model_continues(ip2p, model, tmp_path):
  source = tmp_path / 'captions.txt'
  source.write_text(''.join(f'a cat on mat {i}\n' for i in range(400)))
  words = ('write', source, tmp_path / 'whole', '--model', model, '--slots', 2)
  assert ip2p(*words)[0] == 0
  answers = answers_file(tmp_path / 'parts', (0, 1))
  draw, kills = random.Random(0), 0
  command = ('-c', 'from ip2p_jax.cli.main import main; main()', 'captions', 'write', source,
             tmp_path / 'parts', *words[3:])  # fmt: skip
  while not (tmp_path / 'parts' / write.PROMPTS).exists():
    size = answers.stat().st_size if answers.exists() else 0
    until = size + draw.randrange(200, 5000)  # bytes
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL) as run:
      while kills < 2 and run.poll() is None:
        if answers.exists() and answers.stat().st_size >= until:
          run.send_signal(signal.SIGKILL)
          kills += 1
          break
        time.sleep(0.001)
      assert run.wait() in (0, -signal.SIGKILL)
  assert kills == 2
  for name in (write.PROMPTS, write.SETTINGS):
    assert (tmp_path / 'parts' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
  attempts = [(line['row'], line['attempt']) for line in read_answers(answers)]
  assert len(attempts) == len(set(attempts))


def test_a_caption_too_long_for_the_model_is_skipped(ip2p, model, tmp_path):
  source = tmp_path / 'captions.txt'
  source.write_text(f'a cat\n{"word " * 60}\n')
  words = ('write', source, tmp_path / 'out', '--model', model)
  code, output = ip2p(*words)
  assert code == 0 and 'captions refused by the model: 1 of 2' in output


# A server.


def test_a_server_writes_edits_and_the_key_stays_secret(ip2p, fake, source, tmp_path, monkeypatch):
  monkeypatch.setenv('SOME_KEY', KEY)
  out = tmp_path / 'edits'
  prices = ('--prompt-price', 2, '--completion-price', 10)
  code, output = ip2p(*asking(fake, source, out, '--key-variable', 'SOME_KEY', '--yes', *prices))
  assert code == 0 and len(prompts.read_prompts(out / write.PROMPTS)) == 20
  assert all(headers['Authorization'] == f'Bearer {KEY}' for headers in fake.headers)
  assert 'the server counted 2,000 tokens of requests and 200 of answers ($0.01)' in output
  assert 'captions with an edit: 20 of 20 (100.0%)' in output
  written = b''.join(file.read_bytes() for file in out.iterdir())
  assert KEY not in output and KEY.encode() not in written


def test_a_key_removed_by_the_body_is_null_in_the_prompts(ip2p, fake, source, tmp_path):
  words = ('--yes', '--body', '{"top_p": null}', '--seed', 1)
  assert ip2p(*asking(fake, source, tmp_path / 'edits', *words))[0] == 0
  assert not any('top_p' in body for body in fake.asked)
  for line in (tmp_path / 'edits' / write.PROMPTS).read_text().splitlines():
    assert json.loads(line)['top_p'] is None and json.loads(line)['temperature'] == 0.7


def test_the_cost_is_printed_before_the_first_request(ip2p, fake, source, tmp_path):
  code, output = ip2p(*asking(fake, source, tmp_path / 'edits', '--prompt-price', 1000))
  assert code == 2 and 'say --yes' in output and not fake.asked
  assert '20 captions for tiny at http' in output and 'up to 4 times as much' in output
  tokens = int(output.split('about ')[1].split(' tokens')[0].replace(',', ''))
  assert f'(${tokens / 1000:,.2f})' in output


@pytest.mark.parametrize(('answer', 'code'), [('y', 0), ('n', 130)])
def test_a_person_is_asked_whether_to_start(
  ip2p, fake, source, tmp_path, monkeypatch, answer, code
):
  terminal = io.StringIO(f'{answer}\n')
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, 'stdin', terminal)
  monkeypatch.setattr(os, '_exit', sys.exit)
  assert ip2p(*asking(fake, source, tmp_path / 'edits'))[0] == code
  assert bool(fake.asked) == (code == 0)


def test_a_wrong_key_is_one_line_and_status_2(ip2p, fake, source, tmp_path, monkeypatch):
  monkeypatch.setenv('SOME_KEY', KEY)
  fake.always = lambda body: status(401, KEY.encode())
  words = asking(fake, source, tmp_path / 'edits', '--yes')
  assert 'needs a key (status 401)' in ip2p(*words)[1]
  code, output = ip2p(*words, '--key-variable', 'SOME_KEY')
  assert code == 2 and output.strip().splitlines()[-1].startswith('ip2p: error: http')
  assert 'refuses the key (status 401)' in output and 'Traceback' not in output


def test_a_users_function_moderates_texts(ip2p, fake, source, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'house_rules.py').write_text('def is_rude(text):\n  return "mat 7" in text\n')
  words = asking(fake, source, tmp_path / 'edits', '--yes', '--moderate')
  code, output = ip2p(*words, 'house_rules:is_rude')
  assert code == 0 and 'captions flagged by moderation: 1 of 20' in output
  assert 'a cat on mat 7' not in {caption_of(body) for body in fake.asked}
  code, output = ip2p(*words, 'house_rules:nothing')
  assert code == 2 and '--moderate house_rules:nothing: cannot be imported' in output
  (tmp_path / 'broken_rules.py').write_text('def is_rude(text):\n  return 1 / 0\n')
  words = asking(fake, source, tmp_path / 'others', '--yes', '--moderate')
  code, output = ip2p(*words, 'broken_rules:is_rude')
  assert code == 2 and "failed on 'a cat on mat 0' (ZeroDivisionError" in output


def test_the_users_triplets_are_shown(ip2p, fake, source, tmp_path):
  mine = tmp_path / 'mine.jsonl'
  mine.write_text('{"input": "my caption", "edit": "my edit", "output": "my output"}')
  code, _ = ip2p(
    *asking(fake, source, tmp_path / 'edits', '--yes', '--triplets', mine, '--examples', 1)
  )
  assert code == 0 and fake.asked[0]['messages'][1]['content'] == 'my caption'


def test_a_run_without_a_good_answer_is_an_error(ip2p, fake, source, tmp_path):
  fake.always = lambda body: lambda handler, body: handler.say(200, answer_to(body, 'I am sorry.'))
  code, output = ip2p(*asking(fake, source, tmp_path / 'edits', '--yes', '--attempts', 2))
  assert code == 2 and 'captions with an edit: 0 of 20' in output and 'no answer was kept' in output
  assert not (tmp_path / 'edits' / write.PROMPTS).exists()
  assert 'answers refused, not an instruction and a caption: 40 of 40' in output


def test_other_settings_are_refused_before_the_cost_is_asked(ip2p, fake, source, tmp_path):
  assert ip2p(*asking(fake, source, tmp_path / 'edits', '--yes'))[0] == 0
  code, output = ip2p(*asking(fake, source, tmp_path / 'edits', '--seed', 5, '--limit', 3))
  assert code == 2 and 'begun with seed 0, not 5' in output and '--yes' not in output


def test_captions_that_the_server_refuses_do_not_stop_a_run(ip2p, fake, source, tmp_path):
  bad = [f'a cat on mat {i}' for i in range(3, 14)]
  fake.always = lambda body: status(400) if caption_of(body) in bad else None
  words = asking(fake, source, tmp_path / 'edits', '--yes', '--concurrency', 2)
  code, output = ip2p(*words)
  assert code == 0 and 'captions refused by the model: 11 of 20 (55.0%)' in output
  requests = len(fake.asked)
  assert 20 <= requests <= 22  # one or two more captions test whether the server works
  assert ip2p(*words)[0] == 0 and len(fake.asked) == requests


def test_a_server_error_is_printed_once(ip2p, fake, source, tmp_path):
  fake.troubles.extend([status(503)] * 5)
  code, output = ip2p(*asking(fake, source, tmp_path / 'edits', '--yes'))
  assert code == 0 and output.count('status 503; trying again') == 1


# Mistakes.

HERE = ('--server', 'http://here', '--server-model', 'm')


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ((), 'give either --model FOLDER or --server URL'),
    (('--model', 'm', '--server', 'http://here'), 'give either'),
    (('--model', 'nowhere'), 'nowhere: no such folder'),
    (('--server', 'http://here'), '--server-model is missing'),
    (('--server', 'here', '--server-model', 'm'), 'must be like http://'),
    ((*HERE, '--body', '[]'), '--body is not a JSON object'),
    ((*HERE, '--api', 'x'), "the api is 'x'"),
    ((*HERE, '--key-variable', KEY), 'not the key'),
    ((*HERE, '--examples', '500'), '500 examples'),
    (('--model', 'm', '--shard', '2/2'), "shard is '2/2'"),
    (('--model', 'm', '--top-p', '2'), 'top_p is 2.0'),
    (('--model', 'm', '--temperature', 0, '--top-p', 0.9), '--top-p would do nothing'),
    (('--model', 'm', '--temperature', 0, '--seed', 1), '--seed would do nothing'),
    (('--model', 'm', '--temperature', 0, '--attempts', 2), '--attempts would do nothing'),
    (('--model', 'm', '--api', 'completions'), '--api goes with --server'),
    (('--model', 'm', '--yes'), '--yes goes with --server'),
    ((*HERE, '--slots', '4'), '--slots goes with --model'),
    ((*HERE, '--body', '{"top_p": null}', '--top-p', '0.5'), '--top-p would do nothing: --body'),
    ((*HERE, '--examples', '0', '--triplets', 'x'), '--triplets are not shown with --examples 0'),
    (('--model', 'm', '--shard', '0/100000000'), "shard is '0/100000000'"),
    ((*HERE, '--body', '{"min_p": NaN}'), '--body is not a JSON object'),
    ((*HERE, '--body', '{"messages": 3}'), "the body may not hold 'messages'"),
    ((*HERE, '--timeout', 'inf'), 'the timeout is inf s'),
    ((*HERE, '--timeout', 'nan'), '--timeout'),
    ((*HERE, '--prompt-price', 'inf'), '--prompt-price'),
    (('--model', 'm', '--column', 'x'), 'a text file without columns'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(ip2p, source, tmp_path, words, message):
  code, output = ip2p('write', source, tmp_path / 'edits', *words)
  assert code == 2 and message in output and KEY not in output
  assert output.startswith('ip2p: error: ') or 'left out: none' in output
  assert 'Traceback' not in output and not (tmp_path / 'edits').exists()


@pytest.mark.parametrize('status', [0, 143])  # 143: stopped by a signal
def test_training_gets_the_config_and_gives_its_status(ip2p, tmp_path, monkeypatch, status):
  calls = []

  def train_language(config, workdir):
    calls.append((config, workdir))
    return status

  monkeypatch.setattr('ip2p_jax.captions.train.train_language', train_language)
  words = ('--config.steps=7', '--config.lora.rank=4', '--config.data.path=my.jsonl')
  assert ip2p('train', '--workdir', tmp_path / 'W', *words)[0] == status
  ((config, workdir),) = calls
  assert workdir == str(tmp_path / 'W')
  assert (config.steps, config.lora.rank, config.data.path) == (7, 4, 'my.jsonl')


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (('--config', 'none.py'), 'none.py: no such file'),
    (('--config', 'configs/mini.py'), 'gives a LanguageConfig'),
    (('--config.stepz=3',), 'did you mean --config.steps?'),
    (('--config.steps', '3'), "does not know '--config.steps'"),
    (('--steps=3',), "does not know '--steps=3'"),
  ],
)
def test_a_wrong_training_setting_is_one_line(ip2p, tmp_path, words, message):
  config = tmp_path / 'captions.py'
  config.write_text(
    'from ip2p_jax.config import LanguageConfig\n\ndef get_config():\n  return LanguageConfig()\n'
  )
  code, output = ip2p('train', '--workdir', tmp_path / 'W', '--config', config, *words)
  assert code == 2 and message in output and 'Traceback' not in output
  assert not (tmp_path / 'W').exists()


def test_check_has_a_status(ip2p, tmp_path):
  good = {'input': 'a cat on a mat', 'edit': 'make it a dog', 'output': 'a dog on a mat'}
  file = tmp_path / 'some.jsonl'
  file.write_text(json.dumps(good) + '\n')
  code, output = ip2p('check', file)
  assert code == 0 and output.splitlines()[-1] == f'{file}: 1 triplet, 0 findings'
  file.write_text(file.read_text() + json.dumps(good | {'edit': 'add two dogs'}) + '\n')
  code, output = ip2p('check', file)
  assert code == 1 and output.splitlines()[:2] == [
    f"{file}: line 2: the instruction asks for a change of numbers ('two'), which pairs cannot"
    ' show',
    f'{file}: line 2: the same caption as line 1',
  ]
  code, output = ip2p('check', tmp_path / 'none.jsonl')
  assert code == 2 and output == f'ip2p: error: {tmp_path / "none.jsonl"}: no such file.\n'


def test_runs_are_merged(ip2p, tmp_path):
  for name in ('a', 'b'):
    line = {'caption': 'a cat', 'edit': f'make it {name}', 'output': name}
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(line) + '\n')
  sources = [tmp_path / 'a.jsonl', tmp_path / 'b.jsonl']
  code, output = ip2p('merge', *sources, tmp_path / 'all.jsonl')
  assert code == 0 and '1 prompt; 1 left out' in output
  assert (tmp_path / 'all.jsonl').read_bytes() == sources[0].read_bytes()
  assert ip2p('merge', sources[0])[0] == 2


@pytest.mark.parametrize('command', ['train', 'write', 'check', 'merge'])
def test_every_command_has_help_with_examples(ip2p, command):
  code, output = ip2p(command, '--help')
  assert code == 0 and f'ip2p captions {command} ' in output
