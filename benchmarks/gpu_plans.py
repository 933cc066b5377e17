"""The tables of docs/gpu.md: what `ip2p plan` says of each GPU; needs no GPU.

  python benchmarks/gpu_plans.py --out gpu_plans.jsonl          (2.5 to 10 minutes a row, 30 rows)
  python benchmarks/gpu_plans.py --out gpu_plans.jsonl --show   (the rows so far, as Markdown)

Each row is a call of the command, and its table as a JSON object. Rows that the file has are not
made again. Batches should be the largest powers of two that fit; a row's verdict tells.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

LARGEST = {  # at a time on one GPU
  'train 256 px': {
    'a100-40': 128, 'a100-80': 256, 'a6000': 128, 'h100': 256, 'h200': 512, 'b200': 1024,
  },
  'LoRA 256 px': {
    'a100-40': 256, 'a100-80': 512, 'a6000': 256, 'h100': 512, 'h200': 1024, 'b200': 1024,
  },
  'train 512 px': {
    'a100-40': 32, 'a100-80': 64, 'a6000': 32, 'h100': 64, 'h200': 128, 'b200': 256,
  },
}  # fmt: skip
SETTINGS = {
  'train 256 px': (),
  'LoRA 256 px': ('--set', 'lora.rank=16'),
  'train 512 px': ('--set', 'resolution=512'),
}
GPUS = tuple(LARGEST['train 256 px'])


def calls() -> list[tuple[str, str, list[str]]]:
  """(work, GPU, arguments of `ip2p plan`), in the order in which they are made."""
  training = [
    (work, gpu, ['--device-batch', str(batch), *SETTINGS[work]])
    for work, by_gpu in LARGEST.items()
    for gpu, batch in by_gpu.items()
  ]
  sampling = [
    (made, gpu, ['--of', made, '--batch-size', str(batch)])
    for made, batch in (('edits', 4), ('pairs', 8))
    for gpu in GPUS
  ]
  return [(work, gpu, ['--topology', gpu, *rest]) for work, gpu, rest in training + sampling]


def parsed(text: str) -> dict[str, str]:
  """A report as {'verdict': ..., label: value}."""
  first, *lines = text.strip().splitlines()
  pairs = [re.match(r'  (\S+(?: \S+)*)  +(\S.*)', line) for line in lines]
  return {'verdict': first.split(': ', 1)[1]} | {found[1]: found[2] for found in pairs if found}


def show(rows: list[dict[str, str]]) -> None:
  labels = ('memory in all', 'FLOPs', 'bytes moved', 'time at best', 'kernels called')
  for row in rows:
    print('|', ' | '.join([row['command'], row['verdict'], *(row.get(x, '') for x in labels)]), '|')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--show', action='store_true')
  given = parser.parse_args()
  lines = given.out.read_text().splitlines() if given.out.exists() else []
  rows = [json.loads(line) for line in lines]
  if given.show:
    return show(rows)
  done = {row['command'] for row in rows}
  for work, gpu, arguments in calls():
    command = ' '.join(arguments)
    if command in done:
      continue
    found = subprocess.run(
      [sys.executable, '-m', 'ip2p_jax.cli', 'plan', *arguments], stdout=subprocess.PIPE, text=True
    )
    if not found.stdout:  # refused; the command has said why
      sys.exit(found.returncode)
    row = {'command': command, 'work': work, 'gpu': gpu} | parsed(found.stdout)
    with given.out.open('a') as file:
      file.write(json.dumps(row) + '\n')
    show([row])


if __name__ == '__main__':
  main()
