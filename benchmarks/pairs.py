"""Pairs of one call of the program, beside one pair at a time.

  python benchmarks/pairs.py --small          (two minutes on two CPU cores)
  python benchmarks/pairs.py --batch 16       (SD 1.5 at 512 pixels; wants an accelerator)

The original draws one pair per call: a batch of four through the UNet. Ours draws many pairs at
once, each with its own threshold and scale. Random weights; the time does not depend on them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from bench_turns import results, whole

from ip2p_jax.diffusion import samplers
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from ip2p_jax.pairs.program import PairRequest, PairSpec, pair_program
from ip2p_jax.pairs.prompt_to_prompt import Control
from ip2p_jax.pipeline import workdir
from ip2p_jax.pipeline.networks import Networks, default_dtype, networks_of, networks_of_configs

MINIATURE = Path(__file__).parent.parent / 'assets' / 'miniature-base'


def architecture(is_small: bool) -> Networks:
  if is_small:
    return networks_of(workdir.load(MINIATURE))
  return networks_of_configs(UNetConfig(), VAEConfig(), TextConfig(), Schedule())


def random_params(networks: Networks, dtype: str):
  rng = np.random.default_rng(0)
  fill = lambda leaf: jax.numpy.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype)
  return jax.tree.map(fill, networks.shapes)


def request_of(networks: Networks, pairs: int, steps: int) -> PairRequest:
  length = networks.text_config.max_position_embeddings
  return PairRequest(
    token_ids=np.ones((2, pairs, length), np.int32),
    negative_ids=np.ones((1, length), np.int32),
    guidance=np.linspace(7.5, 15, pairs, dtype=np.float32),
    seeds=np.arange(pairs, dtype=np.uint32),
    grid=samplers.noise_levels(networks.schedule, 'euler_ancestral', steps),
    control=Control(np.linspace(0.1 * steps, 0.9 * steps, pairs).astype(np.int32)),
  )


def main(is_small: bool, batch: int, steps: int, rounds: int, out: Path | None) -> None:
  networks = architecture(is_small)
  dtype = default_dtype()
  params = random_params(networks, dtype)
  side = networks.unet_config.sample_size
  plan = PairSpec('euler_ancestral', side, side)
  program = jax.jit(lambda params, request: pair_program(networks, plan, params, request).images)
  sizes, times = (1, batch), {1: [], batch: []}
  requests = {size: request_of(networks, size, steps) for size in sizes}
  for size in sizes:
    jax.block_until_ready(program(params, requests[size]))  # compiles
  for _ in range(rounds):  # in turns, so that a busy machine slows both
    for size in sizes:
      began = time.perf_counter()
      jax.block_until_ready(program(params, requests[size]))
      times[size].append(time.perf_counter() - began)
  rates = {size: size / statistics.median(times[size]) for size in sizes}
  device = jax.devices()[0].device_kind
  print(f'{device}, {dtype}, {steps} steps, {side} x {side} latents, jax {jax.__version__}')
  for size in sizes:
    print(f'  {size:3d} pairs a call: {rates[size]:.3f} pairs/s')
  print(f'  ratio {rates[batch] / rates[1]:.2f}')
  if out:
    line = {'benchmark': 'pairs', 'device': device, 'dtype': dtype, 'steps': steps, 'side': side}
    with out.open('a') as file:
      file.write(json.dumps(line | {'pairs_per_second': rates}) + '\n')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--small', action='store_true', help="the miniature's sizes")
  parser.add_argument('--batch', type=whole, default=16)
  parser.add_argument('--steps', type=whole, default=20)
  parser.add_argument('--rounds', type=whole, default=5)
  parser.add_argument('--out', type=results, help='a file to append a JSON line to')
  arguments = parser.parse_args()
  main(arguments.small, arguments.batch, arguments.steps, arguments.rounds, arguments.out)
