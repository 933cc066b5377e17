"""Requests to a server that writes captions: many at a time, each with a time limit and retries.

Requests that fail are sent again, with growing waits. A mistake in the request stops the run; a
request for another caption shows whether the request or its caption is to blame. The key goes only
into the header of the requests: no text and no message repeats it.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import json
import queue
import random
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2
import tenacity

from ip2p_jax.captions import triplets
from ip2p_jax.captions.judge import Writing
from ip2p_jax.captions.server import Server, Usage, request
from ip2p_jax.captions.write import Complete
from ip2p_jax.errors import InputError

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
# A filter of the server refuses the caption, or the caption is too long.
UNWELCOME = (400, 413, 422, 451)
MOST_LOST = 7  # captions in a row without an answer, before PROBE shows whether they are to blame
PROBE = 'a cat on a mat'
FINISHED = ('stop', 'stop_sequence', 'eos_token')  # not 'length', nor 'content_filter'
THOUGHTS = re.compile(r'\s*<think>.*?</think>\s*', re.DOTALL)
WAITS = 1.0, 60.0  # seconds: the first wait between two tries, and the longest
LONGEST_WAIT = 600.0  # seconds, whatever Retry-After says
LARGEST_ANSWER = 2**23  # bytes
LONGEST_MESSAGE = 300  # characters of a server's message
HEADERS = {
  'Content-Type': 'application/json',
  'User-Agent': 'ip2p-jax',
  'Accept-Encoding': 'identity',
  # Each request has its own connection: if a server closes an idle one, it looks like a failure.
  'Connection': 'close',
}


class Lost(NamedTuple):
  """Why a request has no text; `is_final` if the server will never take its caption."""

  problem: str
  is_final: bool


class Answer(NamedTuple):
  index: int  # of the request
  text: str | Lost
  counts: Any  # of tokens, by the server


class Trouble(Exception):
  """A failure that may pass; `wait` has the seconds until then, if the server gives them."""

  def __init__(self, message: str, wait: float = 0.0):
    super().__init__(message)
    self.wait = wait


def server_backend(
  server: Server,
  writing: Writing,
  usage: Usage | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> Complete:
  """Asks the server for each caption. `say` gets a line for each failure."""
  usage = usage or Usage()

  def check_another(problem):
    probe = [request(server, writing, PROBE, 0)]
    with contextlib.closing(ask(dataclasses.replace(server, retries=0), probe)) as answers:
      if isinstance(next(answers).text, Lost):
        raise InputError(problem)

  def complete(captions: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[int, str | None]]:
    requests = (request(server, writing, *task) for task in zip(captions, seeds, strict=True))
    lost = []  # they are refused only after another caption got an answer
    with contextlib.closing(ask(server, requests, say)) as answers:
      for index, text, counts in answers:
        is_lost = isinstance(text, Lost)
        if is_lost:
          lost.append((index, None if text.is_final else ''))
          problem = text.problem
          if len(lost) <= MOST_LOST:
            continue
          check_another(problem)
        usage.add(counts)
        yield from lost
        lost.clear()
        if not is_lost:
          yield index, text
    if lost:
      check_another(problem)
    yield from lost

  return complete


def ask(
  server: Server,
  requests: Iterable[Mapping[str, Any]],
  say: Callable[[str], None] = lambda line: None,
) -> Iterator[Answer]:
  """Yields answers as they come; InputError for a problem that is not the caption's.

  Answers cost money, and those that the caller has not taken are lost if the process dies. So at
  most twice `server.concurrency` requests are ahead of the answers that the caller took. The
  requests run in an event loop in a thread, so that answers come in while the caller writes others.
  """
  answers: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()
  loop, room = asyncio.new_event_loop(), asyncio.Semaphore(2 * server.concurrency)
  asking = loop.create_task(_ask_each(server, requests, say, room, answers.put))

  def run():
    end = None
    try:
      loop.run_until_complete(asking)
    except BaseExceptionGroup as group:
      end = group.exceptions[0]  # it has cancelled the other tasks
    except BaseException as error:
      end = error
    loop.run_until_complete(loop.shutdown_asyncgens())
    answers.put(end)

  # A daemon: Python may end before this generator is closed.
  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  try:
    while isinstance(answer := answers.get(), Answer):
      loop.call_soon_threadsafe(room.release)
      yield answer
    if answer is not None:
      raise answer
  finally:
    if not sys.is_finalizing():  # while Python ends, the thread does not run
      loop.call_soon_threadsafe(asking.cancel)
      thread.join()
      loop.close()


async def _ask_each(server, requests, say, room, put):
  turns = asyncio.Semaphore(server.concurrency)
  async with _http(server) as http, asyncio.TaskGroup() as tasks:
    client = Client(server, http, say)

    async def answer(index, body):
      async with turns:
        put(Answer(index, *await client.ask(body)))

    for index, body in enumerate(requests):
      await room.acquire()
      tasks.create_task(answer(index, body))


def _http(server) -> httpx2.AsyncClient:
  """Follows no redirect, which would send the key elsewhere. `Client` has the time limit."""
  key = {'Authorization': f'Bearer {server.key}'} if server.key else {}
  limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
  try:
    return httpx2.AsyncClient(headers=HEADERS | key, limits=limits, timeout=None)
  except (ValueError, ImportError, httpx2.InvalidURL) as error:
    raise InputError(
      'HTTP_PROXY, HTTPS_PROXY or ALL_PROXY in the environment names a proxy that cannot be used'
      f' ({type(error).__name__}); correct it, or unset it.'
    ) from None


class Client(NamedTuple):
  """Sends one request and reads its answer."""

  server: Server
  http: httpx2.AsyncClient
  say: Callable[[str], None]

  async def ask(self, body: Mapping[str, Any]) -> tuple[str | Lost, Any]:
    """The text of the answer, and the server's count of tokens."""
    address, tries = self.server.address, self.server.retries + 1
    retrying = tenacity.AsyncRetrying(
      retry=tenacity.retry_if_exception_type(Trouble),
      stop=tenacity.stop_after_attempt(tries),
      wait=seconds_before_next,
      before_sleep=lambda state: self.say(f'{address}: {state.outcome.exception()}; trying again'),
      reraise=True,
    )
    try:
      return await retrying(self._try, json.dumps(body).encode())
    except Trouble as trouble:
      problem = (
        f'{address}: {trouble}, {tries} times in a row; the answers so far are saved, so run the'
        ' same command later to go on.'
      )
      return Lost(problem, is_final=False), None

  async def _try(self, content):
    response, content = await self._send(content)
    return self._read(content) if response.is_success else (self._refused(response, content), None)

  async def _send(self, content: bytes) -> tuple[httpx2.Response, bytes]:
    """The response and its content. Of an error response, the part that came in time is enough."""
    response, received, trouble = None, b'', None
    sending = self.http.stream('POST', self.server.address, content=content)
    try:
      async with asyncio.timeout(self.server.timeout), sending as response:
        async for part in response.aiter_bytes():
          received += part
          if len(received) > LARGEST_ANSWER:
            trouble = 'an endless answer'
            break
    except TimeoutError:
      trouble = f'no answer in {self.server.timeout:g} s'
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL) as error:
      trouble = what_failed(error, response)
    if trouble and (response is None or response.is_success):
      raise Trouble(trouble)
    return response, received

  def _refused(self, response: httpx2.Response, content: bytes) -> Lost:
    """Why the server refuses the caption; Trouble or InputError if the caption is not to blame."""
    status, server = response.status_code, self.server
    if status in TRANSIENT:
      raise Trouble(f'status {status}', retry_after(response.headers.get('Retry-After')))
    if status in (401, 403) and not server.key:
      raise InputError(
        f'{server.address}: needs a key (status {status}); export it, and give the name of the'
        ' environment variable with --key-variable.'
      )
    if status in (401, 403):
      raise InputError(
        f'{server.address}: refuses the key (status {status}); with --key-variable, give the name'
        ' of the environment variable that holds the right key.'
      )
    if 300 <= status < 400:
      raise InputError(f'{server.address}: redirects to another URL; give that URL.')
    message = self._message(content)
    problem = (
      f'{server.address}: refuses the request for model {server.model!r} (status {status}'
      f'{": " + message if message else ""})'
    )
    if status not in UNWELCOME:
      raise InputError(f'{problem}.')
    self.say(f'{problem}; its caption gets no answer')
    return Lost(f'{problem}.', is_final=True)

  def _read(self, content: bytes) -> tuple[str, Any]:
    """(text, counts of tokens) of an answer."""
    try:
      answer = json.loads(content)
      if isinstance(answer, dict) and isinstance(answer.get('error'), str | dict):
        raise Trouble(f'an error ({self._message(content)})')
      choice = answer['choices'][0]
      text = choice['message']['content'] if 'message' in choice else choice['text']
      ending = choice.get('finish_reason')
      if not isinstance(text, str | None):
        raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
      raise Trouble('an answer that does not follow the protocol') from None
    text = triplets.clean(text or '')
    if thoughts := THOUGHTS.match(text):
      text = text[thoughts.end() :]
    if text and ending in FINISHED and triplets.STOP not in text:
      text += triplets.STOP
    return self._without_key(text), answer.get('usage')

  def _message(self, content: bytes) -> str:
    """The server's message in the body of an error, on one line."""
    try:
      error = json.loads(content)
      error = error.get('error', error)
      message = error if isinstance(error, str) else str(error['message'])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
      message = content.decode(errors='replace')
    return ' '.join(self._without_key(message).split())[:LONGEST_MESSAGE]

  def _without_key(self, text: str) -> str:
    return text.replace(self.server.key, '***') if self.server.key else text


def seconds_before_next(state: tenacity.RetryCallState) -> float:
  """A wait that grows with the tries, or the server's if that is longer."""
  first, longest = WAITS
  growing = tenacity.wait_exponential(multiplier=first, max=longest)(state)
  requested = min(state.outcome.exception().wait, LONGEST_WAIT)
  return max(growing * random.uniform(0.5, 1), requested)


def what_failed(error: Exception, response: httpx2.Response | None) -> str:
  """Why a connection failed, in a few words."""
  if response is not None and isinstance(error, httpx2.RemoteProtocolError):
    is_counted = 'Content-Length' in response.headers
    return 'half an answer' if is_counted else 'the connection failed (IncompleteRead)'
  reason, cause = type(error).__name__, error
  while cause is not None:  # the system's message is at the end of the chain
    reason = getattr(cause, 'strerror', None) or reason
    several = getattr(cause, 'exceptions', None)
    cause = several[0] if several else cause.__cause__ or cause.__context__
  return f'the connection failed ({reason})'


def retry_after(header: str | None) -> float:
  """Seconds of the header, which has seconds or a date; 0 without a header."""
  try:
    seconds = float(header or 0)
  except ValueError:
    try:
      date = email.utils.parsedate_to_datetime(header)
    except (ValueError, OverflowError):
      return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
  return seconds if seconds > 0 else 0.0  # and not nan
