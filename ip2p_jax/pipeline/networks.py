"""From a checkpoint to networks: configurations, module definitions, and parameters.

Nothing here runs a network; a network runs where jitted code calls `nnx.merge(unet_def,
params['unet'])`.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from ip2p_jax.diffusion.noise import Schedule
from ip2p_jax.errors import InputError
from ip2p_jax.models.attention import Attention, attend
from ip2p_jax.models.clip import TextEncoder
from ip2p_jax.models.configs import TextConfig, UNetConfig, VAEConfig
from ip2p_jax.models.layers import Params, abstract
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.models.unet import UNet
from ip2p_jax.models.vae import VAE
from ip2p_jax.weights import Checkpoint, names
from ip2p_jax.weights.tensors import COMPONENTS


class Networks(NamedTuple):
  """The static half of a checkpoint.

  Attributes:
    shapes: a tree of ShapeDtypeStructs per component.
    attention: of the UNet; `_replace(attention=attention.dispatch(...))` fits it to the devices.
  """

  unet_config: UNetConfig
  vae_config: VAEConfig
  text_config: TextConfig
  schedule: Schedule
  unet_def: nnx.GraphDef
  vae_def: nnx.GraphDef
  text_encoder_def: nnx.GraphDef
  shapes: dict[str, Params]
  attention: Attention = attend

  @property
  def resolution(self) -> int:
    """Side in pixels of the square images that the UNet was trained for."""
    return self.unet_config.sample_size * self.vae_config.factor


def networks_of(checkpoint: Checkpoint) -> Networks:
  """Reads the checkpoint's configurations; InputError names a key that is not supported."""
  configs, where = checkpoint.configs, checkpoint.source
  unet_config = UNetConfig.from_json(configs['unet'], f'{where}: unet config')
  vae_config = VAEConfig.from_json(configs['vae'], f'{where}: vae config')
  text_config = TextConfig.from_json(configs['text_encoder'], f'{where}: text_encoder config')
  schedule = Schedule.from_json(configs['scheduler'], f'{where}: scheduler config')
  return networks_of_configs(unet_config, vae_config, text_config, schedule)


def networks_of_configs(
  unet_config: UNetConfig, vae_config: VAEConfig, text_config: TextConfig, schedule: Schedule
) -> Networks:
  """The networks of an architecture; no checkpoint is needed."""
  unet_def, unet = abstract(lambda keys: UNet(unet_config, rngs=keys))
  vae_def, vae = abstract(lambda keys: VAE(vae_config, rngs=keys))
  text_def, text = abstract(lambda keys: TextEncoder(text_config, rngs=keys))
  shapes = dict(zip(COMPONENTS, (unet, vae, text), strict=True))
  return Networks(
    unet_config, vae_config, text_config, schedule, unet_def, vae_def, text_def, shapes
  )


def is_editor(networks: Networks) -> bool:
  """Whether the UNet takes an image's latents beside the noisy ones."""
  return networks.unet_config.in_channels == 2 * networks.vae_config.latent_channels


def check_is_editor(networks: Networks, source: str) -> None:
  """Raises InputError, with the reason, if the checkpoint cannot edit."""
  if is_editor(networks):
    return
  channels, latents = networks.unet_config.in_channels, networks.vae_config.latent_channels
  kind = 'not an InstructPix2Pix model'
  if channels == latents:
    kind = 'a text-to-image model, which cannot see the image to edit'
  raise InputError(
    f'{source}: the UNet has {channels} input channels where an edit needs {2 * latents} (latents'
    f' and image): this is {kind}; use an InstructPix2Pix checkpoint.'
  )


def check_is_text_to_image(networks: Networks, source: str) -> None:
  """Raises InputError if the checkpoint cannot draw from a caption alone."""
  channels, latents = networks.unet_config.in_channels, networks.vae_config.latent_channels
  if channels != latents:
    raise InputError(
      f'{source}: the UNet has {channels} input channels where a text-to-image model has {latents};'
      ' this needs a text-to-image checkpoint.'
    )


def fingerprint(checkpoint: Checkpoint, tokenizer: ClipTokenizer) -> str:
  """A digest of VAE encoder and tokenizer, the same for any file format: 16 hexadecimal digits."""
  tensors = checkpoint.tensors['vae']
  text = ' '.join(['a photo, 2', *tokenizer.learned])
  digest = hashlib.blake2b(tokenizer([text]).tobytes(), digest_size=8)
  for name in sorted(tensors):
    if name.startswith(('encoder.', 'quant_conv.')):
      digest.update(name.encode() + np.asarray(tensors[name]).astype(np.float16).tobytes())
  return digest.hexdigest()


def weights_digest(tensors: Mapping[str, np.ndarray]) -> str:
  """A digest of trained weights, of a few numbers of each tensor: 16 hexadecimal digits."""
  digest = hashlib.blake2b(digest_size=8)
  for name in sorted(tensors):
    few = np.asarray(tensors[name]).reshape(-1)[:64]
    digest.update(name.encode() + few.astype(np.float16).tobytes())
  return digest.hexdigest()


def bytes_digest(*parts: Mapping[str, np.ndarray]) -> str:
  """A digest of every byte of every tensor: 16 hexadecimal digits.

  It does not depend on the file format. 1.6 GB take two seconds of one core.
  """

  def tensor_digest(tensors, name):
    array = np.asarray(tensors[name], order='C')
    digest = hashlib.blake2b(f'{name} {array.dtype} {array.shape}'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.digest()

  tensors, names = zip(*((part, name) for part in parts for name in sorted(part)), strict=True)
  with ThreadPoolExecutor() as pool:
    digests = b''.join(pool.map(tensor_digest, tensors, names))
  return hashlib.blake2b(digests, digest_size=8).hexdigest()


def tokenizer_of(checkpoint: Checkpoint, networks: Networks) -> ClipTokenizer:
  """The checkpoint's tokenizer; InputError if it is damaged or does not fit the text encoder."""
  text = networks.text_config
  return ClipTokenizer(
    checkpoint.tokenizer, text.max_position_embeddings, text.vocab_size, checkpoint.source
  )


def default_dtype() -> str:
  """The default dtype of weights and arithmetic."""
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def params_of(checkpoint: Checkpoint, networks: Networks, dtype: Any) -> dict[str, Params]:
  """The parameters of every component in `dtype`, on the default device.

  Raises InputError that names tensors that are missing, unknown, of another shape or not finite.
  """
  params = {}
  for component in COMPONENTS:
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), networks.shapes[component]
    )
    tensors, source = checkpoint.tensors[component], checkpoint.source
    params[component] = names.to_params(tensors, target, component, source=source, place=_put)
  return params


def _put(view, leaf):
  del leaf
  # Waits, so that at most one array is in memory twice.
  return jax.block_until_ready(jax.device_put(np.asarray(view, order='C')))
