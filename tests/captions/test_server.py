"""Captions by HTTP, from a fake server with every kind of failure."""

import contextlib
import email.utils
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from fake_server import (
  answer_to,
  caption_of,
  drip,
  half,
  half_in_chunks,
  hang,
  hang_up,
  running,
  status,
  text_for,
)

from ip2p_jax.captions import write
from ip2p_jax.captions.answers import answers_file, read_answers
from ip2p_jax.captions.client import PROBE, server_backend
from ip2p_jax.captions.judge import Writing
from ip2p_jax.captions.read import Caption
from ip2p_jax.captions.server import Server, Usage, estimate, read_key, request
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.captions.write import write_all
from ip2p_jax.errors import InputError

KEY = 'sk-do-not-tell'
EXAMPLES = [Triplet(f'caption {i}', f'edit {i}', f'edited {i}') for i in range(20)]
WRITING = Writing(seed=3)
TROUBLES = {
  '500': status(500), '503': status(503), '429': status(429), '408': status(408),
  'half': half, 'half in chunks': half_in_chunks, 'hangs up': hang_up,
  'no JSON': status(200, b'<html>'), 'empty': status(200, b''), 'a list': status(200, b'[]'),
  'no choices': status(200, b'{"choices": []}'),
  'no text': status(200, b'{"choices": [{"message": {"content": 3}}]}'),
}  # fmt: skip


@pytest.fixture
def ask(fake):
  """Asks for captions: their texts in order."""

  def run(texts, seeds=None, say=lambda line: None, usage=None, **options):
    options = {'examples': EXAMPLES, 'shown': 2, 'timeout': 30.0} | options
    complete = server_backend(Server(fake.url, 'tiny', **options), WRITING, usage, say)
    result = dict(complete(texts, seeds or range(len(texts))))
    return [result[i] for i in range(len(texts))]

  return run


# Requests.


def test_a_chat_is_shown_triplets_and_then_asked(fake, ask):
  (text,) = ask(['a cat'], [7])
  assert text == text_for('a cat', 7) + '\nEND'
  (body,) = fake.asked
  roles = [message['role'] for message in body['messages']]
  assert roles == ['system', *['user', 'assistant'] * 2, 'user']
  number = body['messages'][1]['content'].split()[1]
  assert body['messages'][2]['content'] == f'edit {number}\n%%\nedited {number}'
  assert (body['seed'], body['temperature'], body['frequency_penalty']) == (7, 0.7, 0.1)
  assert body['stop'] == ['\nEND'] and 'Authorization' not in fake.headers[0]


def test_completions_are_asked_in_the_format_of_training(fake, ask):
  assert ask(['a cat'], [7], api='completions') == [text_for('a cat', 7) + '\nEND']
  examples, _, rest = fake.asked[0]['prompt'].rpartition('END\n\n')
  assert rest == 'a cat\n##\n' and examples.count('\n%%\n') == 2


def test_a_trained_model_gets_no_examples(fake, ask):
  ask(['a cat'], api='completions', shown=0)
  assert fake.asked[0]['prompt'] == 'a cat\n##\n'


def test_examples_are_drawn_by_the_seed_alone():
  server = Server('http://here/v1', 'tiny', examples=EXAMPLES, shown=3)
  shown = lambda seed: tuple(
    message['content'] for message in request(server, WRITING, 'a', seed)['messages'][1:-1]
  )
  assert shown(5) == shown(5)
  assert len({shown(seed) for seed in range(50)}) > 45
  assert {example for seed in range(50) for example in shown(seed)[::2]} >= {
    triplet.caption for triplet in EXAMPLES
  }


def test_the_body_can_be_changed():
  server = Server('http://here', 'tiny', examples=EXAMPLES, body={'seed': None, 'min_p': 0.1})
  body = request(server, WRITING, 'a cat', 1)
  assert 'seed' not in body and body['min_p'] == 0.1


def test_requests_under_way_are_bounded(fake, ask):
  fake.delay = 0.1
  ask([f'caption {i}' for i in range(12)], concurrency=3)
  assert fake.most == 3


def test_requests_stay_close_to_the_answers_taken(fake):
  server = Server(fake.url, 'tiny', examples=EXAMPLES, shown=2, concurrency=2)
  answers = server_backend(server, WRITING)([f'caption {i}' for i in range(40)], range(40))
  for taken in range(1, 6):
    next(answers)
    time.sleep(0.3)  # a slow disk
    assert len(fake.asked) <= taken + 2 * 2
  assert len(list(answers)) == 35


def test_the_servers_count_of_tokens_is_added_up(ask):
  usage = Usage()
  ask(['a', 'b', 'c'], usage=usage)
  assert (usage.prompt_tokens, usage.completion_tokens) == (300, 30)


def test_the_estimate_is_of_characters():
  server = Server('http://here', 'tiny', api='completions', examples=EXAMPLES[:10], shown=0)
  result = estimate(server, WRITING, ['a' * 36] * 1000)
  assert result == (1000, 10_000, round(len('edit 1\n%%\nedited 1\nEND') / 4 * 1000))


# Failures.


@pytest.mark.parametrize('trouble', TROUBLES.values(), ids=TROUBLES)
def test_a_failed_request_is_tried_again(fake, ask, trouble):
  fake.troubles.extend([trouble, trouble])
  messages = []
  assert ask(['a cat'], [7], messages.append) == [text_for('a cat', 7) + '\nEND']
  assert len(fake.asked) == 3 and fake.asked[0] == fake.asked[2]
  assert len(messages) == 2 and all('trying again' in line for line in messages)


@pytest.mark.parametrize(
  ('trouble', 'what'),
  [
    (half, 'half an answer'),
    (half_in_chunks, 'the connection failed (IncompleteRead)'),
    (status(529), 'status 529'),
    (status(200, b'{"error": 1}'), 'an answer that does not follow the protocol'),
  ],
)
def test_failures_have_short_messages(fake, ask, trouble, what):
  fake.troubles.append(trouble)
  messages = []
  ask(['a cat'], say=messages.append)
  assert messages == [f'{fake.url}/chat/completions: {what}; trying again']


@pytest.mark.parametrize('trouble', [hang, drip])
def test_an_answer_has_a_time_limit(fake, ask, trouble):
  fake.troubles.append(trouble)
  messages = []
  assert ask(['a cat'], [7], messages.append, timeout=0.5) == [text_for('a cat', 7) + '\nEND']
  assert len(fake.asked) >= 2 and 'no answer in 0.5 s; trying again' in messages[0]


@pytest.mark.parametrize('kind', ['seconds', 'date'])
def test_retry_after_is_respected(fake, ask, kind):
  after = '1' if kind == 'seconds' else email.utils.formatdate(time.time() + 2, usegmt=True)
  fake.troubles.append(status(429, Retry_After=after))
  ask(['a cat'])
  assert fake.times[1] - fake.times[0] >= 0.9


LATE = 'Mon, 01 Jan 2026 00:00:00 +99999999999999999999'


@pytest.mark.parametrize('after', ['soon', 'nan', '-3', 'inf', '', LATE])
def test_a_strange_retry_after_is_ignored(fake, ask, after, monkeypatch):
  monkeypatch.setattr('ip2p_jax.captions.client.LONGEST_WAIT', 0.05)
  fake.troubles.append(status(503, Retry_After=after))
  assert ask(['a cat'])


def test_lasting_failures_stop_the_run(fake, ask):
  fake.always = lambda body: status(500)
  with pytest.raises(InputError, match=r'status 500, 3 times in a row; the answers so far'):
    ask(['a cat'], retries=2)
  assert len(fake.asked) == 3 + 1  # the last shows that the caption is not to blame


def test_a_missing_server_is_reported(ask):
  complete = server_backend(Server('http://127.0.0.1:9/v1', 'tiny', shown=0, retries=1), WRITING)
  with pytest.raises(InputError, match='the connection failed'):
    list(complete(['a cat'], [1]))


@pytest.mark.parametrize(
  ('code', 'message'),
  [
    (401, 'refuses the key'),
    (403, 'refuses the key'),
    (404, r"model 'tiny' \(status 404: no such model\)"),
    (402, 'status 402'),
  ],
)
def test_a_mistake_stops_the_run_at_once(fake, ask, code, message):
  content = json.dumps({'error': {'message': 'no such model'}}).encode()
  fake.always = lambda body: status(code, content)
  with pytest.raises(InputError, match=message):
    ask([f'caption {i}' for i in range(50)], concurrency=4, key=KEY)
  assert len(fake.asked) <= 8


def test_a_redirect_is_not_followed_with_the_key(fake, ask):
  with running() as target:
    fake.always = lambda body: status(302, Location=target.url)
    with pytest.raises(InputError, match='redirects to another URL'):
      ask(['a cat'], key=KEY)
    assert not target.asked


def test_a_refused_caption_gets_no_answer(fake, ask):
  fake.always = lambda body: status(400, b'{"error": "filtered"}') if body['seed'] == 1 else None
  messages = []
  assert ask(['a', 'b', 'c'], say=messages.append)[1] is None
  assert len(messages) == 1 and 'status 400: filtered' in messages[0]


def test_a_failing_caption_gets_no_answer_if_another_one_does(fake, ask):
  fake.always = lambda body: status(500) if body['seed'] == 1 else None
  assert ask(['a', 'b', 'c'], retries=1)[1] == ''
  result = [(caption_of(body), body['seed']) for body in fake.asked]
  assert result.count(('b', 1)) == 2


def test_a_caption_is_to_blame_if_another_is_accepted(fake, ask):
  fake.always = lambda body: status(400) if caption_of(body) == 'bad' else None
  assert ask(['bad', 'bad']) == [None, None]
  assert [caption_of(body) for body in fake.asked][-1] == PROBE


def test_many_captions_in_a_row_may_be_to_blame(fake, ask):
  fake.always = lambda body: status(400) if caption_of(body).startswith('bad') else None
  write = [f'bad {i}' for i in range(40)] + ['good']
  assert ask(write)[:40] == [None] * 40


@pytest.mark.parametrize('count', [1, 3, 50])
def test_no_caption_is_lost_by_a_mistake_in_the_request(fake, count):
  fake.always = lambda body: status(400, b'{"error": "no such parameter"}')
  server = Server(fake.url, 'tiny', shown=0, concurrency=2)
  answered = []
  with pytest.raises(InputError, match=r'status 400: no such parameter\)\.$'):
    answered.extend(
      server_backend(server, WRITING)([f'caption {i}' for i in range(count)], range(count))
    )
  assert answered == []


def test_a_request_that_is_always_refused_stops_the_run(fake, ask):
  fake.always = lambda body: status(422, f'unknown field, dear {KEY}'.encode())
  with pytest.raises(InputError, match=r'status 422: unknown field, dear \*\*\*'):
    ask([f'caption {i}' for i in range(50)], key=KEY)


@pytest.mark.parametrize(
  ('text', 'ending', 'expected'),
  [
    *(
      ('make it', ending, 'make it') for ending in ('length', 'content_filter', 'tool_calls', None)
    ),
    ('<think>\nA lion?\n</think>\n\nmake it\n%%\na lion', 'stop', 'make it\n%%\na lion\nEND'),
    ('a \ud83d b', 'stop', 'a ? b\nEND'),  # half of a character
  ],
)
def test_answers_are_cleaned_and_only_complete_ones_get_an_end(fake, ask, text, ending, expected):
  fake.troubles.append(lambda handler, body: handler.say(200, answer_to(body, text, ending)))
  assert ask(['a cat']) == [expected]


def test_an_error_in_an_answer_is_reported(fake, ask):
  fake.troubles.append(status(200, b'{"error": {"message": "no credits"}}'))
  messages = []
  ask(['a cat'], say=messages.append)
  assert messages == [f'{fake.url}/chat/completions: an error (no credits); trying again']


def test_no_response_reveals_the_key(fake, ask):
  long = json.dumps({'error': {'message': 'x' * 290 + KEY}}).encode()
  fake.always = lambda body: status(404, long)
  with pytest.raises(InputError) as stop:
    ask(['a cat'], key=KEY)
  assert KEY[:6] not in str(stop.value)
  fake.always = lambda body: status(200, long)
  with pytest.raises(InputError, match='an error') as stop:
    ask(['a cat'], key=KEY, retries=0)
  assert KEY[:6] not in str(stop.value)
  fake.always = lambda body: lambda handler, body: handler.say(200, answer_to(body, f'a {KEY}'))
  assert ask(['a cat'], key=KEY) == ['a ***\nEND']


@pytest.mark.parametrize(
  'begin', [b'HTTP/1.1 200 OK', b'HTTP/1.1 400 Bad\r\nContent-Length: 900\r\n\r\n']
)
def test_an_endless_response_times_out(begin):
  def drip():
    opened, _ = listener.accept()
    with opened, contextlib.suppress(OSError):
      opened.sendall(begin)
      while True:
        opened.sendall(b'x')
        time.sleep(0.05)

  with socket.create_server(('127.0.0.1', 0)) as listener:
    thread = threading.Thread(target=drip)
    thread.start()
    url = f'http://127.0.0.1:{listener.getsockname()[1]}/v1'
    complete = server_backend(Server(url, 'tiny', shown=0, retries=0, timeout=0.5), WRITING)
    began = time.monotonic()
    with pytest.raises(InputError, match=r'no answer in 0\.5 s|status 400'):
      list(complete(['a cat'], [1]))
    assert time.monotonic() - began < 5
    thread.join(5)


def test_requests_under_way_end_with_the_run(fake):
  fake.always = lambda body: hang if body['seed'] else None
  server = Server(fake.url, 'tiny', shown=0, concurrency=3)
  answers = server_backend(server, WRITING)(['a', 'b', 'c', 'd'], range(4))
  assert next(answers)[0] == 0
  began = time.monotonic()
  answers.close()
  assert time.monotonic() - began < 1


HANGING = """
import sys
from ip2p_jax.captions.client import ask
from ip2p_jax.captions.server import Server
answers = ask(Server(sys.argv[1], 'tiny', shown=0, timeout=600.0), [{'seed': i} for i in range(4)])
next(answers)
1 / 0
"""


def test_python_ends_while_the_server_hangs(fake):
  fake.always = lambda body: (
    (lambda *_: time.sleep(30))
    if body['seed']
    else lambda handler, body: handler.say(
      200, answer_to({'messages': [{'content': 'a'}]}, 'hello')
    )
  )
  words = [sys.executable, '-c', HANGING, fake.url]
  process = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=25)
  assert process.returncode == 1 and 'ZeroDivisionError' in process.stderr
  assert 'Exception ignored' not in process.stderr


def test_waiting_for_a_slow_disk_is_no_timeout(fake, ask):
  server = Server(fake.url, 'tiny', shown=0, concurrency=2, timeout=0.4)
  messages = []
  answers = server_backend(server, WRITING, say=messages.append)(
    [f'caption {i}' for i in range(6)], range(6)
  )
  for _ in range(6):
    next(answers)
    time.sleep(0.5)
  assert len(fake.asked) == 6 and not messages


def test_a_wrong_proxy_is_one_sentence(fake, ask, monkeypatch):
  monkeypatch.setenv('ALL_PROXY', f'socks5://me:{KEY}@127.0.0.1:1')
  monkeypatch.setenv('NO_PROXY', '')
  with pytest.raises(InputError, match='names a proxy that cannot be used') as stop:
    ask(['a cat'])
  assert KEY not in str(stop.value)


# Mistakes.


@pytest.mark.parametrize(
  'url',
  ['localhost:8000', 'ftp://here', 'http://', 'http://me:pw@here', 'http://here?key=1',
   'http://here:port', 'http://he re', 'http://here/é', 'http://a..b/v1', f'http://{"a" * 64}/v1'],
)  # fmt: skip
def test_a_url_that_is_wrong_or_has_secrets_is_refused(url):
  with pytest.raises(InputError, match='the URL of the server') as stop:
    Server(url, 'tiny')
  assert 'pw' not in str(stop.value)


@pytest.mark.parametrize('name', ['temperature', 'seed'])
def test_the_body_cannot_change_recorded_settings(name):
  with pytest.raises(InputError, match=f"may not change '{name}', which has its own option"):
    Server('http://here', 'tiny', shown=0, body={name: 1})


def test_the_key_is_never_repeated(monkeypatch):
  monkeypatch.setenv('SOME_KEY', KEY)
  assert read_key('SOME_KEY') == KEY
  assert KEY not in repr(Server('http://here', 'tiny', shown=0, key=KEY))
  with pytest.raises(InputError, match='give its name, not the key') as stop:
    read_key(KEY)  # by mistake
  assert KEY not in str(stop.value)
  monkeypatch.setenv('SOME_KEY', f'{KEY}\nX-Other: 1')
  with pytest.raises(InputError, match='the key in SOME_KEY has spaces') as stop:
    read_key('SOME_KEY')
  assert KEY not in str(stop.value)


# Whole runs.

MINE = [Caption(i, f'caption number {i}') for i in range(40)]


def run(fake, out, **options):
  options = {'examples': EXAMPLES, 'shown': 2, 'timeout': 30.0, 'concurrency': 4} | options
  complete = server_backend(Server(fake.url, 'tiny', **options), WRITING)
  return write_all(MINE, out, complete, WRITING, {'model': 'tiny'})


def contents(folder):
  return {file.name: file.read_bytes() for file in folder.iterdir() if 'answers' not in file.name}


def test_a_failed_run_resumes(fake, tmp_path):
  assert run(fake, tmp_path / 'whole')
  fake.asked.clear()
  count = iter(range(1000))
  fake.always = lambda body: status(401) if next(count) >= 15 else None
  with pytest.raises(InputError, match='needs a key'):
    run(fake, tmp_path / 'parts')
  fake.always = lambda body: None
  assert run(fake, tmp_path / 'parts')
  assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')
  assert len(fake.asked) <= len(MINE) + 2 * 4


RUN = """
import sys
import threading
from ip2p_jax.captions.client import server_backend
from ip2p_jax.captions.server import Server
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.captions.judge import Writing
from ip2p_jax.captions.read import Caption
from ip2p_jax.captions.write import write_all
examples = [Triplet(f'caption {i}', f'edit {i}', f'edited {i}') for i in range(20)]
server = Server(sys.argv[1], 'tiny', examples=examples, shown=2, concurrency=4)
writing, mine = Writing(seed=3), [Caption(i, f'caption number {i}') for i in range(40)]
print('ready', flush=True)
write_all(mine, sys.argv[2], server_backend(server, writing), writing, {'model': 'tiny'})
"""


def test_a_killed_run_loses_and_repeats_no_answer(fake, tmp_path):
  assert run(fake, tmp_path / 'whole')
  fake.asked.clear()
  fake.delay = 0.05
  answers = answers_file(tmp_path / 'parts', (0, 1))
  draw, kills = random.Random(0), 0
  while not (tmp_path / 'parts' / write.PROMPTS).exists():
    words = [sys.executable, '-c', RUN, fake.url, str(tmp_path / 'parts')]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
      process.stdout.readline()
      if kills < 3:
        size = len(answers.read_bytes()) if answers.exists() else 0
        until = size + draw.randrange(100, 1200)  # bytes
        while process.poll() is None and (not answers.exists() or answers.stat().st_size < until):
          time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += 1
      else:
        assert process.wait(120) == 0
  assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')
  result = [(line['row'], line['attempt']) for line in read_answers(answers)]
  assert len(result) == len(set(result)) == len(MINE)
  assert len(fake.asked) < 2 * len(MINE)  # only what was under way is asked again
