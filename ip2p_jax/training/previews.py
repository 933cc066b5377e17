"""Previews: images of a few validation examples, made at every checkpoint, to watch a run learn.

B examples, R side of the images, h w latent sides, L text tokens. An example is a dict of
'instruction' (or caption), 'edited' and, unless for text-to-image, 'input': uint8 [R, R, 3].
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from PIL import Image

from ip2p_jax.data.rows import LatentRow
from ip2p_jax.editing.editor import Editor
from ip2p_jax.images import image_grid
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline import parts
from ip2p_jax.pipeline.networks import Networks, is_editor
from ip2p_jax.pipeline.sampling import Sampling
from ip2p_jax.pipeline.text_to_image import TextToImage
from ip2p_jax.xla_alarms import quietly

Example = dict[str, Any]


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
  """Returns `preview(params)`, an image with one row per example, under its instruction.

  A row is input, target and edit; for a text-to-image model, which ignores `image_guidance`, it is
  target and sample. `params` has trees for 'unet', 'vae' and 'text_encoder'; their dtype is that of
  the arithmetic. Only the first call compiles. Noise depends on `seed` and the example's place
  only, so previews of different steps can be compared. The devices of `mesh`, which hold the
  parameters, share the examples. In a run of several processes, all must call it.
  """
  instructions = [example['instruction'] for example in examples]
  if is_editor(networks):
    columns, labels = ('input', 'edited'), ['input', 'target', 'edit']
    model = Editor(networks, networks.shapes, tokenizer, 'previews', mesh)
    inputs = np.stack([example['input'] for example in examples])
    scales = {'text_guidance': text_guidance, 'image_guidance': image_guidance}
    run = lambda model: model.edit_arrays(
      inputs, instructions, Sampling(steps), seeds=seed, **scales
    )
  else:
    columns, labels = ('edited',), ['target', 'sample']
    model = TextToImage(networks, networks.shapes, tokenizer, 'previews', mesh)
    size = examples[0]['edited'].shape[:2]
    run = lambda model: model.draw_arrays(
      instructions, Sampling(steps), size=size, seeds=seed, text_guidance=text_guidance
    )

  def preview(params) -> Image.Image:
    current = copy.copy(model)  # shares the compiled program, and does not keep the parameters
    current.params = params
    results = _on_host(run(current).images)
    rows = [
      [Image.fromarray(image) for image in (*(example[column] for column in columns), result)]
      for example, result in zip(examples, results, strict=True)
    ]
    return _sheet(rows, instructions, labels)

  return preview


def latent_examples(
  networks: Networks, vae_params: Any, tokenizer: ClipTokenizer, rows: Sequence[LatentRow]
) -> list[Example]:
  """Examples from rows of latents: the decoded first pair of each row, and its first instruction.

  The VAE decodes the images; instructions come back in lower case.
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
    examples = [e | {'input': image} for e, image in zip(examples, inputs, strict=True)]
  return examples


def decode(networks: Networks, vae_params: Any, latents: np.ndarray) -> np.ndarray:
  """Unscaled latents [B, h, w, 4], such as posterior means, as uint8 images [B, R, R, 3]."""

  def to_images(vae_params, latents):
    return parts.to_uint8(nnx.merge(networks.vae_def, vae_params).decode(latents))

  return _on_host(quietly(jax.jit(to_images), vae_params, np.asarray(latents, np.float32)))


def _on_host(array: Array) -> np.ndarray:
  if not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def _sheet(rows, instructions, labels) -> Image.Image:
  """One image of all rows, one below the other, each under its instruction."""
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
