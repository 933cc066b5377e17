"""Tokens per second of the batched sampler, beside transformers' `generate` with its cache.

  python benchmarks/language.py --small --out language.jsonl     (minutes on two CPU cores)
  python benchmarks/language.py --rows 64     (a model of 360M weights; wants an accelerator)

The same random weights and the same prompts on both sides. Every contender lives in a process of
its own, and they take turns within one run. Two loads: `even`, one batch in which all rows get
equally many tokens; `ragged`, three batches' worth of prompts whose texts end by chance, after 40
tokens on average, as captions do. Then a slot is free for the next prompt at once, where `generate`
goes on until the longest text of its batch is done. Only tokens that belong to a text are counted.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_turns import results, whole

SMALL = {
  'vocab_size': 8192,
  'hidden_size': 384,
  'intermediate_size': 1024,
  'num_hidden_layers': 6,
  'num_attention_heads': 6,
  'num_key_value_heads': 3,
}
SMOLLM2_360M = {
  'vocab_size': 49152,
  'hidden_size': 960,
  'intermediate_size': 2560,
  'num_hidden_layers': 32,
  'num_attention_heads': 15,
  'num_key_value_heads': 5,
}
MEAN_LENGTH = 40
SPAWN = multiprocessing.get_context('spawn')


class Load(NamedTuple):
  """Prompts, as numbers of words; at most `tokens` more for each; `ends` tokens end a text."""

  prompts: tuple[int, ...]
  tokens: int
  rows: int
  ends: tuple[int, ...]
  temperature: float

  def texts(self) -> list[str]:
    return [' '.join(f'w{7 * i + n}' for n in range(count)) for i, count in enumerate(self.prompts)]


def loads(rows: int, tokens: int, vocabulary: int) -> dict[str, Load]:
  lengths = np.random.default_rng(0).integers(8, 49, 3 * rows).tolist()
  # Random weights say nearly the same of every token, so that so many end a text so often.
  ends = tuple(range(vocabulary - vocabulary // MEAN_LENGTH, vocabulary))
  return {
    'even': Load(tuple(lengths[:rows]), tokens, rows, (), 0.7),
    'ragged': Load(tuple(lengths), 4 * MEAN_LENGTH, rows, ends, 1.0),
  }


def write_model(folder: Path, sizes: dict[str, int]):
  """A folder that both sides read; its tokens are words w0, w1, ..."""
  import torch
  import transformers
  from tokenizers import Tokenizer, models, pre_tokenizers

  transformers.logging.disable_progress_bar()
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    **sizes, tie_word_embeddings=True, max_position_embeddings=2048,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
  )  # fmt: skip
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  words = {f'w{i}': i for i in range(sizes['vocab_size'])}
  tokenizer = Tokenizer(models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))


class Jax:
  def __init__(self, folder: Path, device: str):
    import jax

    from ip2p_jax.captions.generate import Language

    dtype = 'float32' if device == 'cpu' else 'bfloat16'
    self.model = Language.load(folder, dtype)
    self.facts = {'device': jax.devices()[0].device_kind, 'dtype': dtype, 'jax': jax.__version__}

  def write(self, load: Load) -> list[tuple[int, ...]]:
    from ip2p_jax.captions import generate

    config = dataclasses.replace(self.model.config, eos_token_id=load.ends)
    texts = load.texts()
    found = generate.write(
      self.model._replace(config=config), texts, seeds=range(len(texts)), stop=None,
      temperature=load.temperature, max_tokens=load.tokens, slots=load.rows,
    )  # fmt: skip
    return [completion.tokens for completion in sorted(found)]


class Transformers:
  def __init__(self, folder: Path, device: str):
    import torch
    import transformers
    from tokenizers import Tokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    self.torch, self.device = torch, 'cpu' if device == 'cpu' else 'cuda'
    dtype = torch.float32 if device == 'cpu' else torch.bfloat16
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    self.model = model.to(self.device).eval()
    self.tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    self.facts = {'torch': torch.__version__, 'transformers': transformers.__version__}

  def write(self, load: Load) -> list[tuple[int, ...]]:
    texts = load.texts()
    batches = [texts[i : i + load.rows] for i in range(0, len(texts), load.rows)]
    return [tokens for batch in batches for tokens in self._batch(batch, load)]

  def _batch(self, texts, load):
    rows = [self.tokenizer.encode(text).ids for text in texts]
    longest = max(map(len, rows))
    pad = lambda row, fill: [fill] * (longest - len(row)) + row
    on_device = lambda values: self.torch.tensor(values, device=self.device)
    how = {'do_sample': False}
    if load.temperature:
      how = {'do_sample': True, 'temperature': load.temperature, 'top_k': 0, 'top_p': 1.0}
    with self.torch.inference_mode():
      out = self.model.generate(
        on_device([pad(row, 0) for row in rows]),
        attention_mask=on_device([pad([1] * len(row), 0) for row in rows]),
        max_new_tokens=load.tokens, eos_token_id=list(load.ends) or None, pad_token_id=0, **how,
      )  # fmt: skip
    return [self._until_end(row, load.ends) for row in out[:, longest:].tolist()]

  def _until_end(self, row, ends):
    length = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
    return tuple(row[:length])


CONTENDERS = {
  'jax': (Jax, ''),
  'jax, no YNN': (Jax, '--xla_cpu_experimental_ynn_fusion_type='),
  'transformers': (Transformers, ''),
}


def serve(pipe, name: str, folder: Path, device: str, threads: int | None):
  """Runs one contender: answers a Load with its tokens, seconds, and seconds of all cores."""
  kind, flags = CONTENDERS[name]
  if flags:
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  if threads:
    os.environ['OMP_NUM_THREADS'] = str(threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  contender = kind(folder, device)
  pipe.send(contender.facts)
  while (load := pipe.recv()) is not None:
    began, busy = time.perf_counter(), time.process_time()
    tokens = contender.write(load)
    pipe.send((tokens, time.perf_counter() - began, time.process_time() - busy))


class Process:
  """A contender as seen from outside, and its row of the table."""

  def __init__(self, name: str, folder: Path, args):
    self.name, self.rates, self.core_rates = name, {}, {}
    self.pipe, theirs = SPAWN.Pipe()
    arguments = (theirs, name, folder, args.device, args.threads)
    self.process = SPAWN.Process(target=serve, args=arguments, daemon=True)
    self.process.start()
    theirs.close()
    self.facts = self.pipe.recv()

  def write(self, load: Load):
    self.pipe.send(load)
    return self.pipe.recv()

  def stop(self):
    self.pipe.send(None)
    self.process.join()


def agreement(processes, load: Load) -> float:
  """The share of equal tokens in greedy texts of the first and the last contender."""
  greedy = load._replace(temperature=0.0, prompts=load.prompts[: load.rows], tokens=8)
  ours, theirs = (np.concatenate(p.write(greedy)[0]) for p in (processes[0], processes[-1]))
  return float((ours == theirs).mean()) if ours.shape == theirs.shape else 0.0


def main():
  args = arguments()
  sizes = SMALL if args.small else SMOLLM2_360M
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    maker = SPAWN.Process(target=write_model, args=(folder, sizes))  # torch stays out of here
    maker.start()
    maker.join()
    names = [name for name in CONTENDERS if args.device == 'cpu' or 'YNN' not in name]
    processes = [Process(name, folder, args) for name in names]
    kinds = loads(args.rows, args.tokens, sizes['vocab_size'])
    same = agreement(processes, kinds['even'])
    if same < 0.9:
      sys.exit(f'only {same:.0%} of the greedy tokens are the same; nothing was timed.')
    for kind, load in kinds.items():
      for process in processes:
        process.write(load)  # compiles
        process.rates[kind], process.core_rates[kind] = [], []
      for repeat in range(args.repeats):
        for process in processes if repeat % 2 else reversed(processes):
          tokens, seconds, busy = process.write(load)
          count = sum(map(len, tokens))
          process.rates[kind].append(count / seconds)
          process.core_rates[kind].append(count / busy)
          say(f'{kind}, round {repeat + 1} of {args.repeats}: {process.name} {count / seconds:.0f} '
              f'tokens/s, {count / busy:.0f} per core-second')  # fmt: skip
    for process in processes:
      process.stop()
  report(args, sizes, processes, same)


def report(args, sizes, processes, same):
  facts = {key: value for process in processes for key, value in process.facts.items()}
  print(', '.join(f'{key} {value}' for key, value in facts.items()))
  print(f'{args.rows} rows, {args.repeats} rounds; load {os.getloadavg()[0]:.1f}; '
        f'{same:.0%} of greedy tokens the same')  # fmt: skip
  last = processes[-1]
  print(row_of('', 'tokens/s', 'range', 'x theirs', 'per core-second', 'x theirs'))
  for kind in last.rates:
    theirs, theirs_per_core = (
      statistics.median(rates[kind]) for rates in (last.rates, last.core_rates)
    )
    for process in processes:
      rates = process.rates[kind]
      middle, core = statistics.median(rates), statistics.median(process.core_rates[kind])
      print(row_of(
        f'{kind}: {process.name}', f'{middle:.0f}', f'{min(rates):.0f}-{max(rates):.0f}',
        f'{middle / theirs:.2f}', f'{core:.0f}', f'{core / theirs_per_core:.2f}',
      ))  # fmt: skip
  if args.out:
    line = {
      'benchmark': 'language',
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      **facts,
      'sizes': sizes,
      'rows': args.rows,
      'tokens': args.tokens,
      'load': os.getloadavg()[0],
      'agreement': same,
      'tokens_per_second': {process.name: process.rates for process in processes},
      'tokens_per_core_second': {process.name: process.core_rates for process in processes},
    }
    with args.out.open('a', encoding='utf-8') as file:
      file.write(json.dumps(line) + '\n')


def say(text: str):
  print(text, file=sys.stderr, flush=True)


def row_of(*cells) -> str:
  widths = (-24, 9, 13, 9, 16, 9)
  return ''.join(
    f'{cell:>{w}}' if w > 0 else f'{cell:<{-w}}' for cell, w in zip(cells, widths, strict=True)
  )


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--small', action='store_true', help='6 layers of 384, 8192 tokens')
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--threads', type=whole, default=2, help='on a CPU')
  parser.add_argument('--rows', type=whole, default=32, help='at a time')
  parser.add_argument('--tokens', type=whole, default=64, help='of each row of the even load')
  parser.add_argument('--repeats', type=whole, default=5)
  parser.add_argument('--out', type=results, help='a line of JSON is appended')
  args = parser.parse_args()
  if args.device != 'cpu':
    args.threads = None
  return args


if __name__ == '__main__':
  main()
