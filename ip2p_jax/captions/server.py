"""Captions written by a server that speaks OpenAI's protocol: vLLM, llama.cpp, a hosted one.

A model that was not trained on triplets is shown some of them with every request, drawn by the
request's seed. Requests that fail are sent again, later and later; mistakes in the request stop the
run. Whether they or a caption are to blame, a request for another caption shows. The key goes into
the header of the requests and nowhere else.
"""

import contextlib
import dataclasses
import datetime
import email.utils
import http.client
import json
import os
import queue
import random
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ip2p_jax.captions import triplets
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.captions.write import Complete, Writing
from ip2p_jax.errors import InputError

APIS = {'chat': 'chat/completions', 'completions': 'completions'}
TASK = (
  'You write edits of pictures. For the caption of a picture you answer with exactly three lines:'
  ' an instruction that changes the picture, a line with only %%, and the caption of the changed'
  ' picture. The new caption keeps the words of the old one but for what the instruction changes.'
  ' Vary the instructions. Change things, materials, colours, styles, seasons, weather, places and'
  ' times; never move, count, mirror or zoom. Nothing offensive. No explanations.'
)
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
# Where a server filters what it is asked, or a caption is too long for it.
UNWELCOME = (400, 413, 422, 451)
MOST_LOST = 7  # captions in a row without an answer, before PROBE shows whether they are to blame
PROBE = 'a cat on a mat'
FINISHED = ('stop', 'stop_sequence', 'eos_token')  # not 'length', nor 'content_filter'
THOUGHTS = re.compile(r'\s*<think>.*?</think>\s*', re.DOTALL)
WAITS = 1.0, 60.0  # seconds: the first wait between two tries, and the longest
LONGEST_WAIT = 600.0  # seconds, whatever Retry-After says
LARGEST_ANSWER = 2**23  # bytes
CHARACTERS = 4  # of English text per token, about
LONGEST_TIME = 86_400.0  # seconds for an answer
FIXED = ('model', 'messages', 'prompt', 'stream', 'n', 'stop')  # of a request
# Of a request, too: written into every line of the prompts. They may be taken out, not changed.
RECORDED = ('temperature', 'top_p', 'frequency_penalty', 'max_tokens', 'seed')


@dataclasses.dataclass(frozen=True)
class Server:
  """Where to ask, and how.

  Attributes:
    url: up to the version: 'http://localhost:8000/v1'.
    model: its name there.
    api: 'chat', or 'completions' for models that were not trained to chat.
    key: sent as a bearer token; see `read_key`.
    examples: drawn from for each request.
    shown: how many examples a request shows; 0 for a model that was trained on triplets.
    body: more keys of the request, but for FIXED and RECORDED; None takes one out.
    concurrency: requests at the same time.
    timeout: seconds that an answer may take.
    retries: of a request that failed, before its caption goes without.
  """

  url: str
  model: str
  api: str = 'chat'
  key: str | None = dataclasses.field(default=None, repr=False)
  examples: Sequence[Triplet] = dataclasses.field(default=(), repr=False)
  shown: int = 8
  body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  concurrency: int = 16
  timeout: float = 120.0
  retries: int = 8

  def __post_init__(self):
    try:
      parts = urllib.parse.urlsplit(self.url)
      is_web = parts.scheme in ('http', 'https') and bool(parts.hostname) and parts.port != 0
      parts.hostname and parts.hostname.encode('idna')
    except ValueError:  # UnicodeError is one
      is_web = False
    if not is_web or not self.url.isascii() or not self.url.isprintable() or ' ' in self.url:
      raise InputError('the URL of the server must be like http://localhost:8000/v1.')
    if '@' in parts.netloc or parts.query or parts.fragment:
      raise InputError(
        'the URL of the server may hold no name, password or parameters; a key goes into an'
        ' environment variable.'
      )
    if self.api not in APIS:
      raise InputError(f'the api is {self.api!r}; use one of {", ".join(APIS)}.')
    if not 0 < self.timeout <= LONGEST_TIME:
      raise InputError(f'the timeout is {self.timeout} s; use up to {LONGEST_TIME:.0f}.')
    if fixed := [name for name in FIXED if name in self.body]:
      raise InputError(f'the body may not hold {fixed[0]!r}, which is written for each request.')
    if told := [name for name in RECORDED if self.body.get(name) is not None]:
      raise InputError(
        f'the body may not change {told[0]!r}, which has an option of its own; null takes it out.'
      )
    if self.shown > len(self.examples):
      raise InputError(
        f'{self.shown} examples to show, and only {len(self.examples)} to draw from.'
      )

  @property
  def taken_out(self) -> list[str]:
    """Of RECORDED, what the server is not told, and decides itself."""
    return [name for name in RECORDED if name in self.body]

  @property
  def address(self) -> str:
    return f'{self.url.rstrip("/")}/{APIS[self.api]}'


class Estimate(NamedTuple):
  """Of a run, if every first answer is good; tokens are guessed from characters."""

  requests: int
  prompt_tokens: int
  completion_tokens: int


class Usage:
  """Tokens that the server counted."""

  def __init__(self):
    self.prompt_tokens = self.completion_tokens = 0

  def add(self, counts: Any) -> None:
    for name in vars(self):
      count = counts.get(name) if isinstance(counts, dict) else None
      setattr(self, name, getattr(self, name) + (count if isinstance(count, int) else 0))


def read_key(variable: str) -> str:
  """The key in an environment variable. No message repeats it, nor a name that may be a key."""
  key = os.environ.get(variable, '').strip()
  if not key:
    raise InputError(
      '--key-variable names no environment variable that is set; give its name, not the key, and'
      ' export the key under that name.'
    )
  if not (key.isascii() and key.isprintable()) or ' ' in key:
    raise InputError(f'the key in {variable} has spaces or odd signs in it; export it again.')
  return key


def server_backend(
  server: Server,
  writing: Writing,
  usage: Usage | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> Complete:
  """Asks the server, many at a time. `say` is told each kind of trouble once."""
  usage = usage or Usage()
  opener = urllib.request.build_opener(_NoRedirects, _Http, _Https)

  def complete(captions: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[int, str]]:
    numbers, lock = iter(range(len(captions))), threading.Lock()
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    # Answers that nobody has taken yet are lost with the process, and paid for: these are few.
    room = threading.Semaphore(2 * server.concurrency)
    client = _Client(server, opener, threading.Event(), say)

    def work():
      while True:
        room.acquire()
        if client.stop.is_set():
          return
        with lock:
          index = next(numbers, None)
        if index is None:
          return
        try:
          answers.put((index, client.ask(request(server, writing, captions[index], seeds[index]))))
        except BaseException as error:
          answers.put((index, error))  # before the others, who only stop
          client.stop.set()

    # Daemons, so that a run that stops does not wait for answers that nobody reads.
    for _ in range(min(server.concurrency, len(captions))):
      threading.Thread(target=work, daemon=True).start()
    try:
      lost = []  # told once another is answered: till then, it may be the server's fault, or ours

      def are_to_blame(problem):
        probe = client._replace(server=dataclasses.replace(server, retries=0))
        if isinstance(probe.ask(request(server, writing, PROBE, 0))[0], _Lost):
          raise InputError(problem)

      for _ in captions:
        index, answer = answers.get()
        room.release()
        if isinstance(answer, BaseException):
          raise answer
        text, counts = answer
        if isinstance(text, _Lost):
          lost.append((index, text))
          if len(lost) <= MOST_LOST:
            continue
          are_to_blame(text.problem)
        usage.add(counts)
        yield from ((one, None if reason.is_final else '') for one, reason in lost)
        lost.clear()
        if not isinstance(text, _Lost):
          yield index, text
      if lost:
        are_to_blame(lost[-1][1].problem)
      yield from ((one, None if reason.is_final else '') for one, reason in lost)
    finally:
      client.stop.set()
      room.release(server.concurrency)

  return complete


def request(server: Server, writing: Writing, caption: str, seed: int) -> dict[str, Any]:
  """The JSON of a request."""
  shown = _draw(server.examples, server.shown, seed)
  if server.api == 'chat':
    messages = [{'role': 'system', 'content': TASK}] if shown else []
    for example in shown:
      answer = triplets.completion(example).removesuffix(triplets.STOP)
      messages.append({'role': 'user', 'content': example.caption})
      messages.append({'role': 'assistant', 'content': answer})
    last = caption if shown else triplets.prompt(caption)
    asked = {'messages': [*messages, {'role': 'user', 'content': last}]}
  else:
    before = ''.join(
      triplets.prompt(example.caption) + triplets.completion(example) + '\n\n' for example in shown
    )
    asked = {'prompt': before + triplets.prompt(caption)}
  body = {
    'model': server.model, **asked, 'temperature': writing.temperature, 'top_p': writing.top_p,
    'frequency_penalty': writing.frequency_penalty, 'max_tokens': writing.max_tokens,
    'stop': [triplets.STOP], 'seed': seed, **server.body,
  }  # fmt: skip
  return {name: value for name, value in body.items() if value is not None}


def estimate(
  server: Server, writing: Writing, captions: Sequence[str], sample: int = 200
) -> Estimate:
  """What a first answer to each of the captions takes, from the requests of some of them."""
  if not captions:
    return Estimate(0, 0, 0)
  some = captions[:: -(-len(captions) // sample)]
  lengths = [_length(request(server, writing, caption, seed)) for seed, caption in enumerate(some)]
  answers = [len(triplets.completion(example)) for example in server.examples]
  answer = sum(answers) / len(answers) if answers else 2 * sum(map(len, some)) / len(some)
  tokens = lambda characters: round(characters / CHARACTERS * len(captions))
  return Estimate(len(captions), tokens(sum(lengths) / len(lengths)), tokens(answer))


def _length(body) -> int:
  texts = [message['content'] for message in body.get('messages', ())]
  return sum(map(len, texts)) + len(body.get('prompt', ''))


def _draw(examples, count, seed) -> list[Triplet]:
  """By `random.random` alone, of which Python promises that it will not change."""
  numbers = random.Random(seed)
  order = sorted((numbers.random(), i) for i in range(len(examples)))
  return [examples[i] for _, i in order[:count]]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """A redirect would carry the key to somewhere else."""

  def redirect_request(self, *args):
    return None


class _Again(Exception):
  """Trouble that may pass; the message is for people."""

  def __init__(self, message: str, wait: float | None = None):
    super().__init__(message)
    self.wait = wait  # seconds, as the server says


class _Lost(NamedTuple):
  """Instead of an answer; `is_final` if the server will never take this caption."""

  problem: str
  is_final: bool


class _Watched:
  """Connections of a request, of which the sockets are known, so that they can be shut."""

  def _do_open(self, kind, request, **more):
    class Connection(kind):
      def connect(self):
        super().connect()
        request.sockets.append(self.sock)

    return self.do_open(Connection, request, **more)


class _Http(_Watched, urllib.request.HTTPHandler):
  def http_open(self, request):
    return self._do_open(http.client.HTTPConnection, request)


class _Https(_Watched, urllib.request.HTTPSHandler):
  def https_open(self, request):
    return self._do_open(http.client.HTTPSConnection, request, context=self._context)


class _Client(NamedTuple):
  """One round of requests; `stop` ends the waits of all of them."""

  server: Server
  opener: urllib.request.OpenerDirector
  stop: threading.Event
  say: Callable[[str], None]

  def ask(self, body: dict[str, Any]) -> tuple[str | _Lost, Any]:
    """The text of the answer, and the server's count of tokens. Tries again as long as it helps."""
    encoded = json.dumps(body).encode()
    address, retries = self.server.address, self.server.retries
    for attempt in range(retries + 1):
      try:
        content = self._send(encoded)
        if isinstance(content, _Lost):
          return content, None
        text, counts = _read(content)
        return self._without_key(text), counts
      except _Again as error:
        trouble = self._without_key(str(error))
        first, longest = WAITS
        wait = min(first * 2 ** min(attempt, 16), longest) * random.uniform(0.5, 1)
        wait = max(wait, min(error.wait or 0, LONGEST_WAIT))
      if attempt < retries:
        self.say(f'{address}: {trouble}; trying again')
        if self.stop.wait(wait):
          break
    problem = (
      f'{address}: {trouble}, {attempt + 1} times in a row; what was written stays, so run the same'
      ' command later to go on.'
    )
    return _Lost(problem, is_final=False), None

  def _without_key(self, text: str) -> str:
    return text.replace(self.server.key, '***') if self.server.key else text

  def _send(self, encoded: bytes) -> bytes | _Lost:
    """The content of the answer; _Lost if the server will not take this caption."""
    headers = {'Content-Type': 'application/json', 'User-Agent': 'ip2p-jax'}
    if self.server.key:
      headers['Authorization'] = f'Bearer {self.server.key}'
    message = urllib.request.Request(self.server.address, encoded, headers)
    message.sockets = []
    is_late = threading.Event()

    def shut():  # whatever a server sends, and however slowly
      is_late.set()
      for opened in message.sockets:
        with contextlib.suppress(OSError):
          opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(self.server.timeout, shut)
    timer.daemon = True
    timer.start()
    try:
      with self.opener.open(message, timeout=self.server.timeout) as answer:
        found = _read_all(answer)
    except urllib.error.HTTPError as error:
      with error:
        found = self._meaning(error)
    except _Again as error:
      found = error
    except (OSError, http.client.HTTPException, ValueError) as error:
      found = _Again(_what_failed(error, self.server.timeout))
    finally:
      timer.cancel()
    if is_late.is_set() and isinstance(found, bytes | _Again):  # shut, it looks whole, or broken
      found = _Again(_what_failed(TimeoutError(), self.server.timeout))
    if isinstance(found, Exception):
      raise found from None
    return found

  def _meaning(self, error: urllib.error.HTTPError) -> Exception | _Lost:
    """Of an answer with an error status."""
    status, server = error.code, self.server
    if status in TRANSIENT:
      return _Again(f'status {status}', _retry_after(error.headers.get('Retry-After')))
    if status in (401, 403) and not server.key:
      return InputError(
        f'{server.address}: wants a key (status {status}); export it, and give the name of the'
        ' environment variable by --key-variable.'
      )
    if status in (401, 403):
      return InputError(
        f'{server.address}: refuses the key (status {status}); give the name of the environment'
        ' variable that holds the right one by --key-variable.'
      )
    if 300 <= status < 400:
      return InputError(f'{server.address}: redirects to somewhere else; give the URL it ends at.')
    try:
      said = _said(error.read(10_000))
    except (OSError, http.client.HTTPException, ValueError):
      said = ''
    said = ' '.join(self._without_key(said).split())[:300]
    problem = (
      f'{server.address}: refuses the request for model {server.model!r} (status {status}'
      f'{": " + said if said else ""})'
    )
    if status not in UNWELCOME:
      return InputError(f'{problem}.')
    self.say(f'{problem}; its caption goes without')
    return _Lost(f'{problem}.', is_final=True)


def _what_failed(error: Exception, timeout: float) -> str:
  reason = getattr(error, 'reason', None) or error
  if isinstance(reason, TimeoutError):
    return f'no answer in {timeout:g} s'
  return f'the connection failed ({getattr(reason, "strerror", None) or type(reason).__name__})'


def _read_all(answer) -> bytes:
  parts, size, expected = [], 0, answer.length or 0
  while part := answer.read1(2**16):
    size += len(part)
    parts.append(part)
    if size > LARGEST_ANSWER:
      raise _Again('an endless answer')
  if size < expected:  # `read1` does not mind
    raise _Again('half an answer')
  return b''.join(parts)


def _read(content: bytes) -> tuple[str, Any]:
  """(text, counts of tokens) of an answer."""
  try:
    answer = json.loads(content)
    if isinstance(answer, dict) and isinstance(answer.get('error'), str | dict):
      raise _Again(f'an error ({" ".join(_said(content).split())[:300]})')
    choice = answer['choices'][0]
    text = choice['message']['content'] if 'message' in choice else choice['text']
    ending = choice.get('finish_reason')
    if not isinstance(text, str | None):
      raise TypeError
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    raise _Again('an answer that is not as the protocol has it') from None
  text = triplets.clean(text or '')
  if found := THOUGHTS.match(text):
    text = text[found.end() :]
  if text and ending in FINISHED and triplets.STOP not in text:
    text += triplets.STOP
  return text, answer.get('usage')


def _said(content: bytes) -> str:
  """The message in the body of an error."""
  try:
    error = json.loads(content)
    error = error.get('error', error)
    return error if isinstance(error, str) else str(error['message'])
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    return content.decode(errors='replace')


def _retry_after(header: str | None) -> float | None:
  """Seconds; the header has those, or a date."""
  if not header:
    return None
  try:
    seconds = float(header)
  except ValueError:
    try:
      date = email.utils.parsedate_to_datetime(header)
    except (ValueError, OverflowError):
      return None
    date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
  return seconds if seconds > 0 else None  # and not nan
