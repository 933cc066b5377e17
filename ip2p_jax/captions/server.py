"""A server with OpenAI's protocol (vLLM, llama.cpp, a hosted one) that writes captions.

If a model was not trained on triplets, every request shows it some as examples, drawn by the
request's seed. `client` sends the requests.
"""

import dataclasses
import os
import random
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ip2p_jax.captions import triplets
from ip2p_jax.captions.judge import Writing
from ip2p_jax.captions.triplets import Triplet
from ip2p_jax.errors import InputError, check_choice

APIS = {'chat': 'chat/completions', 'completions': 'completions'}
TASK = (
  'You write edits of pictures. For the caption of a picture you answer with exactly three lines:'
  ' an instruction that changes the picture, a line with only %%, and the caption of the changed'
  ' picture. The new caption keeps the words of the old one but for what the instruction changes.'
  ' Vary the instructions. Change things, materials, colours, styles, seasons, weather, places and'
  ' times; never move, count, mirror or zoom. Nothing offensive. No explanations.'
)
CHARACTERS = 4  # of English text per token, about
SAMPLE = 200  # an estimate reads at most so many captions
LONGEST_TIME = 86_400.0  # seconds for an answer
FIXED = ('model', 'messages', 'prompt', 'stream', 'n', 'stop')  # keys of a request
# Keys of a request that every line of the prompts records. They may be removed, not changed.
RECORDED = ('temperature', 'top_p', 'frequency_penalty', 'max_tokens', 'seed')


@dataclasses.dataclass(frozen=True)
class Server:
  """The address of a server, and how to ask it.

  Attributes:
    url: up to the version: 'http://localhost:8000/v1'.
    model: its name on the server.
    api: 'chat', or 'completions' for models that were not trained to chat.
    key: sent as a bearer token; see `read_key`.
    examples: the triplets that each request draws from.
    shown: how many examples a request shows; 0 for a model that was trained on triplets.
    body: more keys of the request, except FIXED and RECORDED; None removes a key.
    concurrency: requests at the same time.
    timeout: seconds that an answer may take.
    retries: of a request that failed, before its caption gets no answer.
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
        'the URL of the server may not hold a name, password or parameters; put the key into an'
        ' environment variable.'
      )
    check_choice('the api', self.api, APIS)
    if not 0 < self.timeout <= LONGEST_TIME:
      raise InputError(f'the timeout is {self.timeout} s; use up to {LONGEST_TIME:.0f}.')
    if fixed := [name for name in FIXED if name in self.body]:
      raise InputError(f'the body may not hold {fixed[0]!r}, which each request sets itself.')
    if changed := [name for name in RECORDED if self.body.get(name) is not None]:
      raise InputError(
        f'the body may not change {changed[0]!r}, which has its own option; null removes it.'
      )
    if self.shown > len(self.examples):
      raise InputError(
        f'{self.shown} examples to show, and only {len(self.examples)} to draw from.'
      )

  @property
  def taken_out(self) -> list[str]:
    """The keys of RECORDED that no request has; the server chooses their values."""
    return [name for name in RECORDED if name in self.body]

  @property
  def address(self) -> str:
    return f'{self.url.rstrip("/")}/{APIS[self.api]}'


class Estimate(NamedTuple):
  """The size of a run if every first answer is kept; tokens are estimated from characters."""

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
  """The key in an environment variable. No message repeats the key, or a name that may be one."""
  key = os.environ.get(variable, '').strip()
  if not key:
    raise InputError(
      '--key-variable names no environment variable that is set; give its name, not the key, and'
      ' export the key with that name.'
    )
  if not (key.isascii() and key.isprintable()) or ' ' in key:
    raise InputError(f'the key in {variable} has spaces or odd characters; export it again.')
  return key


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
    content = {'messages': [*messages, {'role': 'user', 'content': last}]}
  else:
    before = ''.join(
      triplets.prompt(example.caption) + triplets.completion(example) + '\n\n' for example in shown
    )
    content = {'prompt': before + triplets.prompt(caption)}
  body = {
    'model': server.model, **content, 'temperature': writing.temperature, 'top_p': writing.top_p,
    'frequency_penalty': writing.frequency_penalty, 'max_tokens': writing.max_tokens,
    'stop': [triplets.STOP], 'seed': seed, **server.body,
  }  # fmt: skip
  return {name: value for name, value in body.items() if value is not None}


def estimate(server: Server, writing: Writing, captions: Sequence[str]) -> Estimate:
  """The tokens of a first answer to each caption, estimated from requests for some of them."""
  if not captions:
    return Estimate(0, 0, 0)
  sample = captions[:: -(-len(captions) // SAMPLE)]
  lengths = [
    _length(request(server, writing, caption, seed)) for seed, caption in enumerate(sample)
  ]
  answers = [len(triplets.completion(example)) for example in server.examples]
  answer = sum(answers) / len(answers) if answers else 2 * sum(map(len, sample)) / len(sample)
  tokens = lambda characters: round(characters / CHARACTERS * len(captions))
  return Estimate(len(captions), tokens(sum(lengths) / len(lengths)), tokens(answer))


def _length(body) -> int:
  texts = [message['content'] for message in body.get('messages', ())]
  return sum(map(len, texts)) + len(body.get('prompt', ''))


def _draw(examples, count, seed) -> list[Triplet]:
  """Draws with `random.random` only: Python promises that its numbers stay the same."""
  numbers = random.Random(seed)
  order = sorted((numbers.random(), i) for i in range(len(examples)))
  return [examples[i] for _, i in order[:count]]
