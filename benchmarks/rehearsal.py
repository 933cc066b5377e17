"""The data factory at full size, once through: every network as large as the real one, one pair.

  python benchmarks/rehearsal.py out/rehearsal        (16 GB of memory, 9 GB of disk)

Weights are random, so what is written and drawn means nothing; it shows that every command of
docs/data-factory.md but the last takes such networks, and what the one before has left. Needs
transformers. Tells seconds and the largest memory of each command.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench_turns import machine

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'examples' / 'miniature')]
TRIPLETS = ROOT / 'assets' / 'triplets.jsonl'
ROWS = 2  # prompts


def make_checkpoints(out: Path) -> None:
  """Stable Diffusion 1.5 with 4 input channels, CLIP ViT-L/14, and a Llama as SmolLM2-360M."""
  import dataclasses

  import random_checkpoint
  import start_writer
  from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

  from ip2p_jax import weights
  from ip2p_jax.models.configs import TextConfig, VisionConfig

  unet, *others = random_checkpoint.SIZES['sd15']
  random_checkpoint.SIZES['sd15'] = (dataclasses.replace(unet, in_channels=4), *others)
  weights.write(random_checkpoint.random_checkpoint('sd15'), out / 'sd15', overwrite=True)

  towers = {
    'text_config': TextConfig().to_json(),
    'vision_config': dataclasses.asdict(VisionConfig()),
  }
  for tower in towers.values():
    tower.pop('model_type', None)
  CLIPModel(CLIPConfig(**towers, projection_dim=768)).save_pretrained(out / 'clip')
  for name, content in weights.clip_tokenizer().items():
    (out / 'clip' / name).write_bytes(content)

  texts = TRIPLETS.read_text().splitlines()
  tokenizer = start_writer.tokenizer_of(texts)
  end = tokenizer.token_to_id(start_writer.END)
  config = LlamaConfig(
    vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
    num_attention_heads=15, num_key_value_heads=5, tie_word_embeddings=True,
    bos_token_id=end, eos_token_id=end, max_position_embeddings=2048,
  )  # fmt: skip
  LlamaForCausalLM(config).save_pretrained(out / 'writer-start')
  tokenizer.save(str(out / 'writer-start' / 'tokenizer.json'))


def commands(out: Path) -> dict[str, list]:
  ip2p = lambda *args: [sys.executable, '-m', 'ip2p_jax.cli', *map(str, args)]
  rows = [json.loads(line) for line in TRIPLETS.read_text().splitlines()[:ROWS]]
  (out / 'prompts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (out / 'captions.txt').write_text(''.join(row['input'] + '\n' for row in rows))
  every = ('--image', -1, '--caption', -1, '--direction', -1)
  return {
    'captions train, LoRA, 1 step': ip2p(
      *('captions', 'train', '--workdir', out / 'writer-run', '--config.lora.rank=4'),
      *(f'--config.checkpoint={out / "writer-start"}', f'--config.data.path={TRIPLETS}'),
      *('--config.steps=1', '--config.batch_size=2', '--config.optimizer.warmup_steps=0'),
    ),
    'convert the writer': ip2p('convert', out / 'writer-run', out / 'writer', '--overwrite'),
    'captions write, 2 captions': ip2p(
      *('captions', 'write', out / 'captions.txt', out / 'edits', '--model', out / 'writer'),
      *('--attempts', 1, '--max-tokens', 16),
    ),
    'pairs, 2 of 512 px, 2 steps': ip2p(
      *('pairs', out / 'prompts.jsonl', out / 'raw', '--ckpt', out / 'sd15'),
      *('--clip', out / 'clip', '--samples', 1, '--steps', 2, '--batch-size', 1),
    ),
    'filter': ip2p('filter', out / 'raw', out / 'pairs', *every),
    'pack --latents': ip2p(
      *('pack', out / 'pairs', out / 'latents', '--latents', '--ckpt', out / 'sd15'),
      *('--batch-size', 1),
    ),
  }  # fmt: skip


def main(out: Path) -> None:
  shutil.rmtree(out, ignore_errors=True)
  out.mkdir(parents=True)
  # In a process of its own: what a process has held counts as held by those that it starts.
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    pool.apply(make_checkpoints, (out,))
  print(f'{machine()}\n\n| command | seconds | memory |\n|---|---|---|', flush=True)
  for name, command in commands(out).items():
    began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    told = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    # Random weights write nothing that can be used, and the writer says so.
    if code and not name.startswith('captions write'):
      sys.exit(f'{name}: status {code}\n{told.decode()[-3000:]}')
    seconds, memory = time.time() - began, used.ru_maxrss * 1024
    print(f'| {name} | {seconds:.0f} | {memory / 2**30:.1f} GiB |', flush=True)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=Path)
  main(parser.parse_args().out.absolute())
