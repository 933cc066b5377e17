"""A server with OpenAI's protocol that fails in the requested ways."""

import collections
import contextlib
import http.server
import json
import threading
import time


class Fake(http.server.ThreadingHTTPServer):
  """Answers each request with the next of `troubles`, and correctly when there are none left."""

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.troubles = collections.deque()
    self.always = lambda body: None  # the trouble of a request, or None
    self.asked, self.times, self.headers = [], [], []  # of all requests: JSON, time, headers
    self.delay, self.now, self.most = 0.0, 0, 0  # seconds; current requests, and their maximum
    self.lock = threading.Lock()
    self.url = f'http://127.0.0.1:{self.server_port}/v1'

  def handle_error(self, *args):
    pass  # clients hang up here


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *args):
    pass

  def do_GET(self):
    self.do_POST()

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers.get('Content-Length', 0))) or '{}')
    with server.lock:
      server.asked.append(body)
      server.times.append(time.monotonic())
      server.headers.append(dict(self.headers))
      server.now += 1
      server.most = max(server.most, server.now)
      trouble = server.troubles.popleft() if server.troubles else server.always(body)
    time.sleep(server.delay)
    with server.lock:
      server.now -= 1
    self.close_connection = True
    (trouble or answer)(self, body)

  def say(self, status, content, **headers):
    self.send_response(status)
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    for name, value in ({'Content-Length': str(len(content))} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)


def caption_of(body):
  if 'prompt' in body:
    return body['prompt'].removesuffix('\n##\n').split('\n')[-1]
  return body['messages'][-1]['content']


def text_for(caption, seed):
  return f'make it {seed}\n%%\n{caption} {seed}'


def answer_to(body, text=None, ending='stop'):
  text = text_for(caption_of(body), body['seed']) if text is None else text
  choice = {'text': text} if 'prompt' in body else {'message': {'content': text}}
  usage = {'prompt_tokens': 100, 'completion_tokens': 10}
  return json.dumps({'choices': [choice | {'finish_reason': ending}], 'usage': usage}).encode()


def answer(handler, body):
  handler.say(200, answer_to(body))


def status(code, content=b'no', **headers):
  return lambda handler, body: handler.say(code, content, **headers)


def hang(handler, body):
  time.sleep(2.0)
  answer(handler, body)


def drip(handler, body):
  content = answer_to(body)
  handler.say(200, content[:10], Content_Length=str(len(content)))
  for i in range(10, len(content)):
    time.sleep(0.02)
    handler.wfile.write(content[i : i + 1])
    handler.wfile.flush()


def half(handler, body):
  content = answer_to(body)
  handler.say(200, content[: len(content) // 2], Content_Length=str(len(content)))


def half_in_chunks(handler, body):
  handler.send_response(200)
  handler.send_header('Transfer-Encoding', 'chunked')
  handler.end_headers()
  handler.wfile.write(b'%x\r\n' % 1000 + answer_to(body))


def hang_up(handler, body):
  handler.connection.close()


@contextlib.contextmanager
def running():
  with Fake() as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()
