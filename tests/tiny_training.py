"""A tiny training run in memory: networks, frozen parameters, batches, recipes.

The UNet has one level and examples are latents, because compilation takes most of the time.
"""

import functools

import jax
import numpy as np
import tiny_models
import torch_models as ref
from tiny_models import ONE_LEVEL

from ip2p_jax import parameters
from ip2p_jax.config import LoraConfig, OptimizerConfig, TrainConfig
from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.models import lora
from ip2p_jax.pipeline.networks import Networks, networks_of
from ip2p_jax.training import optimizer, step
from ip2p_jax.weights import names

SIDE, LATENT_SIDE = 32, 8  # the tiny VAE divides sides by four
NULL_IDS = np.int32([598] + 76 * [599])


@functools.cache
def checkpoint():
  return tiny_models.checkpoint(ONE_LEVEL)


@functools.cache
def models() -> dict:
  """The PyTorch models of these weights."""
  return ref.models_of(checkpoint())


@functools.cache
def networks(prediction_type: str = 'epsilon') -> Networks:
  schedule = Schedule(prediction_type=prediction_type)
  return networks_of(tiny_models.checkpoint(ONE_LEVEL, schedule))


@functools.cache
def params() -> dict:
  """The weights as our nested trees, by component."""
  return {
    name: names.to_params(tensors, networks().shapes[name], name)
    for name, tensors in checkpoint().tensors.items()
  }


def batch(size: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  normal = lambda scale: np.float16(scale * rng.normal(size=(size, LATENT_SIDE, LATENT_SIDE, 4)))
  words = rng.integers(0, 590, (size, 76))
  return {
    'input_mean': normal(5.5),
    'edited_mean': normal(5.5),
    'edited_log_variance': normal(1.0) - np.float16(8),
    'token_ids': np.int32(np.column_stack([np.full(size, 598), words])),
    'weight': np.ones(size, np.float32),
    'index': np.arange(size, dtype=np.int32),
  }


def start(config: TrainConfig):
  """(recipe, state on one device, frozen)."""
  unet = parameters.flatten(params()['unet'])
  if config.lora.rank:
    trained = lora.adapters(unet, config.lora, np.random.default_rng(0))
  else:
    names = optimizer.trainable(unet, config.optimizer.rates)
    trained = {name: unet[name] for name in unet if name in names}
  transform = optimizer.adamw(config.optimizer, trained, config.steps)
  recipe = step.Recipe(networks(), config, transform)
  frozen = {
    'unet': {name: value for name, value in unet.items() if name not in trained},
    'vae': params()['vae'],
    'text_encoder': params()['text_encoder'],
    'null_ids': NULL_IDS,
  }
  return recipe, step.initial_state(recipe, jax.device_put(trained)), frozen


def config(rank: int = 0, optim: dict | None = None, **settings) -> TrainConfig:
  defaults = {'resolution': SIDE, 'batch_size': 8, 'steps': 20, 'dtype': 'float32'}
  return TrainConfig(
    **defaults | settings, optimizer=OptimizerConfig(**optim or {}), lora=LoraConfig(rank=rank)
  )
