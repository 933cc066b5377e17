"""Pictures of a few validation examples, made at every checkpoint, to watch a run learn.

B examples, R side of the pictures, h w latent sides, L text tokens. An example is a dict of
'instruction' (or caption), 'edited' and, unless for text-to-image, 'input': uint8 [R, R, 3].
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from ip2p_jax import sharding
from ip2p_jax.data.rows import LatentRow
from ip2p_jax.diffusion import guidance, noise, samplers
from ip2p_jax.diffusion.denoiser import denoiser
from ip2p_jax.editing.editor import Editor, Sampling
from ip2p_jax.images import image_grid
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline.networks import Networks, is_editor
from ip2p_jax.sharding import ROWS, WHOLE
from ip2p_jax.xla_alarms import quietly

Example = dict[str, Any]
Run = Callable[[Any], Array]  # parameters -> uint8 [B, R, R, 3]
SAMPLER = 'euler_ancestral'


def make_preview(
  networks: Networks,
  tokenizer: ClipTokenizer,
  examples: Sequence[Example],
  *,
  steps: int = 20,
  seed: int = 0,
  text_guidance: float = 7.5,
  image_guidance: float = 1.5,
  mesh: Mesh | None = None,
) -> Callable[[Any], Image.Image]:
  """Returns `preview(params)`, a picture with one row per example, under its instruction.

  A row is input, target and edit; for a text-to-image model, which `image_guidance` does not
  concern, target and sample. `params` has trees for 'unet', 'vae' and 'text_encoder', of any dtype,
  which is that of the arithmetic. The first call compiles, later ones do not. Noise depends on
  `seed` and the example's place only, so that previews of different steps can be compared. The
  devices of `mesh`, where the parameters lie, share the examples. In a run of several processes all
  of them must call it.
  """
  instructions = [example['instruction'] for example in examples]
  if is_editor(networks):
    columns = ('input', 'edited')
    inputs = np.stack([example['input'] for example in examples])
    scales = {'text_guidance': text_guidance, 'image_guidance': image_guidance}
    run = _editing(networks, tokenizer, inputs, instructions, steps, seed, scales, mesh)
    labels = ['input', 'target', 'edit']
  else:
    columns = ('edited',)
    size = examples[0]['edited'].shape[:2]
    run = _sampling(networks, tokenizer, size, instructions, steps, seed, text_guidance, mesh)
    labels = ['target', 'sample']

  def preview(params) -> Image.Image:
    made = _on_host(run(params))
    rows = [
      [Image.fromarray(picture) for picture in (*(example[column] for column in columns), result)]
      for example, result in zip(examples, made, strict=True)
    ]
    return _sheet(rows, instructions, labels)

  return preview


def latent_examples(
  networks: Networks, vae_params: Any, tokenizer: ClipTokenizer, rows: Sequence[LatentRow]
) -> list[Example]:
  """Examples from rows that hold no pixels: the first pair of each decoded, its first instruction.

  Pictures are what the VAE makes of their latents, and instructions come back in lower case.
  """
  means = [row.edited_mean[0, 0] for row in rows]
  means += [row.input_mean[0, 0] for row in rows if row.input_mean is not None]
  decoded = decode(networks, vae_params, np.stack(means))
  examples = [
    {'instruction': tokenizer.decode(row.token_ids[0]), 'edited': edited}
    for row, edited in zip(rows, decoded, strict=False)
  ]
  inputs = decoded[len(rows) :]  # none for text-to-image
  if len(inputs):
    examples = [e | {'input': picture} for e, picture in zip(examples, inputs, strict=True)]
  return examples


def decode(networks: Networks, vae_params: Any, latents: np.ndarray) -> np.ndarray:
  """Unscaled latents [B, h, w, 4], such as posterior means, as uint8 pictures [B, R, R, 3]."""
  to_pixels = jax.jit(functools.partial(_pixels, networks))
  return _on_host(quietly(to_pixels, vae_params, np.asarray(latents, np.float32)))


def sample_program(
  networks: Networks,
  size: tuple[int, int],
  params: Any,
  token_ids: Array,
  null_ids: Array,
  indices: Array,
  grid: samplers.Grid,
  text_guidance: Array,
  seed: Array,
) -> Array:
  """Text to picture with classifier-free guidance (Ho and Salimans 2022): uint8 [B, *size, 3].

  `token_ids` [B, L], `null_ids` [1, L] of the empty text, `indices` uint32 [B] of each one's noise;
  all but the networks and the size is traced.
  """
  text_encoder = nnx.merge(networks.text_encoder_def, params['text_encoder'])
  context = text_encoder(jnp.concatenate([token_ids, null_ids]))  # [B + 1, L, C]
  batch, factor = len(context) - 1, networks.vae_config.factor
  null_context = jnp.broadcast_to(context[-1:], context[:-1].shape)
  contexts = jnp.concatenate([context[:-1], null_context])
  unet = nnx.merge(networks.unet_def, params['unet'])
  branches = (guidance.TEXT_AND_IMAGE, guidance.UNCONDITIONAL)

  def predict(x, timestep):
    predictions = unet(jnp.concatenate([x, x]), timestep, contexts, networks.attention)
    predictions = predictions.reshape(2, *x.shape)
    # With equal scales the branch between the two, which here does not exist, has no weight.
    return guidance.combine(predictions, branches, text_guidance, text_guidance)

  shape = (size[0] // factor, size[1] // factor, networks.vae_config.latent_channels)
  keys = noise.image_keys(jnp.full(batch, seed, jnp.uint32), indices)
  latents = samplers.sample(
    SAMPLER,
    denoiser(predict, networks.schedule),
    grid,
    noise.initial_noise(keys, shape),
    lambda i: noise.step_noise(keys, i, shape),
  )
  return _pixels(networks, params['vae'], latents / networks.vae_config.scaling_factor)


def _editing(networks, tokenizer, inputs, instructions, steps, seed, scales, mesh) -> Run:
  editor = Editor(networks, networks.shapes, tokenizer, 'previews', mesh)

  def run(params):
    current = copy.copy(editor)  # shares the compiled program, and lets go of the parameters
    current.params = params
    return current.edit_arrays(inputs, instructions, Sampling(steps), seeds=seed, **scales).images

  return run


def _sampling(networks, tokenizer, size, instructions, steps, seed, text_guidance, mesh) -> Run:
  specs = (WHOLE, ROWS, WHOLE, ROWS, WHOLE, WHOLE, WHOLE)
  program = functools.partial(sample_program, networks, size)
  program = jax.jit(sharding.each_its_rows(program, mesh, specs, ROWS))
  count = len(instructions)
  rows = tokenizer(instructions), np.arange(count, dtype=np.uint32)
  if mesh is not None:
    rows = sharding.padded_rows(mesh, (ROWS, ROWS), rows, count)
  grid = samplers.noise_levels(networks.schedule, SAMPLER, steps)
  others = tokenizer(['']), rows[1], grid, np.float32(text_guidance), np.uint32(seed)
  return lambda params: quietly(program, params, rows[0], *others)[:count]


def _pixels(networks, vae_params, latents):
  decoded = nnx.merge(networks.vae_def, vae_params).decode(latents)
  return jnp.round(jnp.clip(decoded * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def _on_host(array: Array) -> np.ndarray:
  if not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def _sheet(rows, instructions, labels) -> Image.Image:
  """All rows below each other; instructions above the rows, where they have room."""
  parts = [
    image_grid([row], [''], labels, instruction)
    for row, instruction in zip(rows, instructions, strict=True)
  ]
  sheet = Image.new('RGB', (parts[0].width, sum(part.height for part in parts)), 'white')
  top = 0
  for part in parts:
    sheet.paste(part, (0, top))
    top += part.height
  return sheet
