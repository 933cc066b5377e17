"""`ip2p captions write`."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm
from typer import Argument, Option

from ip2p_jax.cli import console
from ip2p_jax.defaults import MOST_TOKENS
from ip2p_jax.errors import InputError

# Options of only one of the two backends.
SERVER_OPTIONS = ('server_model', 'api', 'key_variable', 'examples', 'from_triplets', 'body',
             'concurrency', 'timeout', 'retries', 'prompt_price', 'completion_price',
             'yes')  # fmt: skip
MODEL_OPTIONS = ('slots', 'split_weights', 'dtype')
MOST_DOLLARS = 1e6  # per million tokens


def write(
  context: typer.Context,
  source: Annotated[
    str,
    Argument(
      metavar='CAPTIONS',
      help='A .jsonl, .csv or .parquet file, a folder of .parquet, or a .txt with one per line.',
    ),
  ],
  out: Annotated[str, Argument(metavar='OUT', help='A new folder, or one to continue in.')],
  model: Annotated[
    Path | None, Option(help='A transformers folder of a model trained on triplets.')
  ] = None,
  server: Annotated[
    str | None, Option(help="Instead: a server's URL, such as http://localhost:8000/v1.")
  ] = None,
  server_model: Annotated[str | None, Option(help="The model's name on the server.")] = None,
  column: Annotated[str, Option(help='Name of the column, if not caption, input, TEXT etc.')] = '',
  limit: Annotated[
    int | None, Option(min=1, help='Only the first captions; run again for more.')
  ] = None,
  attempts: Annotated[int, Option(min=1, help='Most answers to ask for until one is good.')] = 4,
  temperature: Annotated[float, Option(help='0 always takes the most likely token.')] = 0.7,
  top_p: Annotated[float, Option(help='Share of the probability to draw tokens from.')] = 1.0,
  frequency_penalty: Annotated[float, Option(help='Per earlier use of a token.')] = 0.1,
  max_tokens: Annotated[int, Option(min=1, max=MOST_TOKENS, help='Per answer.')] = 256,
  max_words: Annotated[int, Option(min=1, help='Per instruction.')] = 25,
  seed: Annotated[int, Option(min=0, help='Of the run.')] = 0,
  moderate: Annotated[
    str | None,
    Option(
      metavar='FILE.py:FUNCTION',
      help='Your Python function (text) -> bool, True for texts that must not be used.',
    ),
  ] = None,
  shard: Annotated[str, Option(help='i/n: this worker of n that share the captions.')] = '0/1',
  slots: Annotated[
    int | None,
    Option(
      min=1,
      max=MOST_TOKENS,
      help='With --model: captions at a time, on all devices; by default 64 per copy of the'
      ' weights.',
    ),
  ] = None,
  split_weights: Annotated[
    int | None,
    Option(
      min=1,
      help='With --model: devices that share one copy of the weights; by default the fewest that'
      ' keep half of their memory free.',
    ),
  ] = None,
  dtype: Annotated[
    str | None, Option(help='With --model: float32 or bfloat16; by default float32 on a CPU only.')
  ] = None,
  api: Annotated[str, Option(help='With --server: chat, or completions.')] = 'chat',
  key_variable: Annotated[
    str | None, Option(metavar='NAME', help='With --server: environment variable with the key.')
  ] = None,
  examples: Annotated[
    int, Option(min=0, help='With --server: triplets to show; 0 for a model trained on them.')
  ] = 8,
  from_triplets: Annotated[
    Path | None, Option('--triplets', help='With --server: triplets to show; by default ours.')
  ] = None,
  body: Annotated[
    str, Option(help='With --server: more keys of the request, as JSON; null removes a key.')
  ] = '{}',
  concurrency: Annotated[
    int, Option(min=1, max=1024, help='With --server: requests at a time.')
  ] = 16,
  timeout: Annotated[float, Option(min=0.1, help='With --server: seconds per answer.')] = 120.0,
  retries: Annotated[int, Option(min=0, help='With --server: per request that fails.')] = 8,
  prompt_price: Annotated[
    float | None,
    Option(min=0, max=MOST_DOLLARS, help='With --server: dollars per million tokens of requests.'),
  ] = None,
  completion_price: Annotated[
    float | None,
    Option(min=0, max=MOST_DOLLARS, help='With --server: dollars per million tokens of answers.'),
  ] = None,
  yes: Annotated[bool, Option('--yes', '-y', help='With --server: do not ask first.')] = False,
) -> None:
  """Writes an instruction and an edited caption for each caption, ready for `ip2p pairs`.

  ip2p captions write captions.parquet edits --model writer

  ip2p captions write captions.txt edits --model writer --shard 3/8

  ip2p captions write captions.jsonl edits --server http://localhost:8000/v1 --server-model qwen
  --limit 100

  ip2p captions write captions.jsonl edits --server https://api.example.com/v1 --server-model NAME
  --key-variable API_KEY --prompt-price 0.15 --completion-price 0.6

  After a kill, run it again to continue. OUT/prompts.jsonl is the result of all workers.
  """
  from ip2p_jax import storage
  from ip2p_jax.captions.judge import Writing
  from ip2p_jax.captions.server import Usage
  from ip2p_jax.captions.write import write_all
  from ip2p_jax.data.shard_writing import parse_shard

  writing = Writing(
    seed, attempts, temperature, top_p, frequency_penalty, max_tokens, max_words
  )  # refuses wrong values before reading
  number = parse_shard(shard)
  if (model is None) == (server is None):
    raise InputError('give either --model FOLDER or --server URL.')
  _check_options(context, *((SERVER_OPTIONS, '--server') if model else (MODEL_OPTIONS, '--model')))
  if temperature == 0:
    _check_greedy(context, bool(model), attempts)
  folder, is_flagged = storage.local_folder(out), moderate and _hook(moderate)
  endpoint = None
  if server is not None:
    endpoint = _server(
      server, server_model, api, key_variable, from_triplets, examples, body, concurrency, timeout,
      retries,
    )  # fmt: skip
    _check_taken_out(context, endpoint)
  captions = _read(source, column)
  usage, to_ask = Usage(), []
  if endpoint:
    identity = _identity(endpoint)
    from ip2p_jax.captions.client import server_backend

    complete = server_backend(endpoint, writing, usage, _once(tqdm.write))
  else:
    complete, identity = _local(model, dtype, split_weights, writing, slots)

  def confirm(texts):
    to_ask.extend(texts)
    if endpoint:
      _confirm(endpoint, writing, texts, prompt_price, completion_price, yes)

  with tqdm(unit='caption', dynamic_ncols=True, disable=None) as bar:
    is_complete = write_all(
      captions, folder, complete, writing, identity | {'moderate': moderate}, number, limit,
      is_flagged, _progress(bar), confirm,
    )  # fmt: skip
  if endpoint and to_ask:
    _report_usage(usage, prompt_price, completion_price)
  _report(folder, is_complete)


def _read(source, column):
  """The captions of a file or folder; says how many were left out, and why."""
  from ip2p_jax import storage
  from ip2p_jax.captions.read import read_captions

  path = Path(storage.local_path(source)).expanduser()
  captions = read_captions(path, column)
  left_out = ', '.join(f'{count:,} {reason}' for reason, count in captions.left_out.items())
  tqdm.write(
    f'{path}: {console.counted(len(captions.kept), "caption")}; left out: {left_out or "none"}'
  )
  return captions.kept


def _progress(bar) -> Callable[[int, int], None]:
  """Moves the bar. Captions of earlier runs do not count for its speed."""

  def progress(done, total):
    if bar.total is None:
      bar.reset(total)
      bar.initial = bar.n = done
    bar.update(done - bar.n)

  return progress


def _check_greedy(context, is_local: bool, attempts: int) -> None:
  """Raises InputError for an option without effect if the most likely token is taken."""
  idle = {'top_p'} | ({'seed', 'attempts'} if is_local else set())
  for name, flag in console.changed_options(context).items():
    if name in idle and (name, attempts) != ('attempts', 1):
      raise InputError(
        f'{flag} would do nothing: --temperature 0 takes the most likely token; leave it out.'
      )


def _server(url, model, api, key_variable, from_triplets, examples, body, *limits):
  """The settings of a server. Raises InputError for options that contradict each other."""
  from ip2p_jax.captions import triplets
  from ip2p_jax.captions.server import Server, read_key

  if not model:
    raise InputError("--server-model is missing: the model's name on the server.")
  if from_triplets and not examples:
    raise InputError('--triplets are not shown with --examples 0; leave one of them out.')
  shown = triplets.read(from_triplets or triplets.bundled_file()) if examples else []
  key = read_key(key_variable) if key_variable else None
  return Server(url, model, api, key, shown, examples, _json(body), *limits)


def _identity(server) -> dict:
  """The settings that answers depend on, as far as they may be stored."""
  identity = {'model': server.model, 'api': server.api, 'shown': server.shown}
  identity |= {'examples': _digest(server.examples), 'body': _digest(server.body)}  # no secrets
  return identity | ({'taken_out': server.taken_out} if server.taken_out else {})


def _check_options(context, names, backend) -> None:
  """Raises InputError for an option of the other backend."""
  for name, flag in console.changed_options(context).items():
    if name in names:
      raise InputError(f'{flag} goes with {backend}; leave it out.')


def _check_taken_out(context, server) -> None:
  """Raises InputError for an option that --body removes from the request."""
  for name, flag in console.changed_options(context).items():
    if name in server.taken_out and not (name == 'seed' and server.shown):  # it also draws examples
      raise InputError(f'{flag} would do nothing: --body removes it; leave one of them out.')


def _local(folder, dtype, split, writing, slots):
  """The backend of a model on this machine, and the model's identity."""
  from ip2p_jax.captions.generate import Language
  from ip2p_jax.captions.local import local_backend
  from ip2p_jax.pipeline.networks import bytes_digest, default_dtype, weights_digest
  from ip2p_jax.weights.language_folder import read_language

  console.cache_compilations()
  dtype = dtype or default_dtype()
  checkpoint = read_language(folder)
  identity = {
    'model': folder.resolve().name,
    'dtype': dtype,
    'weights': weights_digest(checkpoint.tensors),
    'bytes': bytes_digest(checkpoint.tensors),
    'tokenizer': hashlib.blake2b(checkpoint.tokenizer, digest_size=8).hexdigest(),
  }
  model = Language.of(checkpoint, dtype, split)
  identity['config'] = _digest(dataclasses.asdict(model.config))
  return local_backend(model, writing, slots), identity


def _digest(value) -> str:
  return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _hook(spec: str) -> Callable[[str], bool]:
  """The user's function; InputError also when it fails."""
  function = console.imported('--moderate', spec)

  def is_flagged(text):
    try:
      return bool(function(text))
    except Exception as error:
      raise InputError(
        f'--moderate {spec}: failed on {text[:80]!r} ({type(error).__name__}: {error}).'
      ) from error

  return is_flagged


def _json(text: str) -> dict:
  try:
    value = json.loads(text)
    json.dumps(value, allow_nan=False)  # NaN and infinity are not JSON
  except (ValueError, RecursionError):
    value = None
  if not isinstance(value, dict):
    raise InputError('--body is not a JSON object, such as \'{"seed": null, "min_p": 0.1}\'.')
  return value


def _confirm(server, writing, texts, prompt_price, completion_price, yes) -> None:
  """Prints the possible cost of a run, and asks whether to start."""
  from ip2p_jax.captions.server import estimate

  least = estimate(server, writing, texts)
  tqdm.write(
    f'{least.requests:,} captions for {server.model} at {server.url}: about'
    f' {least.prompt_tokens:,} tokens of requests and {least.completion_tokens:,} of answers'
    f'{_dollars(least, prompt_price, completion_price)} if every first answer is good, and up to'
    f' {writing.attempts} times as much'
  )
  if yes:
    return
  if not sys.stdin.isatty():
    raise InputError('there is no terminal to ask whether to start; say --yes.')
  typer.confirm('Start?', abort=True)


def _report_usage(usage, prompt_price, completion_price) -> None:
  if usage.prompt_tokens:
    tqdm.write(
      f'the server counted {usage.prompt_tokens:,} tokens of requests and'
      f' {usage.completion_tokens:,} of answers{_dollars(usage, prompt_price, completion_price)}'
    )


def _dollars(tokens, prompt_price, completion_price) -> str:
  if prompt_price is None and completion_price is None:
    return ''
  cost = tokens.prompt_tokens * (prompt_price or 0)
  cost += tokens.completion_tokens * (completion_price or 0)
  return f' (${cost / 1e6:,.2f})'


def _once(say):
  """A function that passes each line to `say` once."""
  lines = set()

  def say_once(line):
    if line not in lines:
      lines.add(line)
      say(line)

  return say_once


def _report(folder, is_complete) -> None:
  from ip2p_jax.captions.answers import describe, read_yield
  from ip2p_jax.captions.check import diversity
  from ip2p_jax.captions.write import PROMPTS

  counts = read_yield(folder)
  for line in describe(counts):
    tqdm.write(line)
  if not counts.instructions and is_complete:
    raise InputError(f'no answer was kept; {folder} has all answers and the reasons.')
  for line in diversity(counts.instructions):
    tqdm.write(line)
  if is_complete:
    file = folder / PROMPTS
    count = console.counted(file.read_bytes().count(b'\n'), 'prompt')
    tqdm.write(f'{file} has {count}; `ip2p pairs` draws images of them')
  else:
    tqdm.write(
      f'{folder}: other shards are still missing; it is complete when all workers are done'
    )
