"""CLIP's scores of a pair of images and their captions, by which data is filtered.

B pairs, H W pixels, L text tokens (77), P width of the space that images and texts share. The
towers are read from a folder of transformers' CLIPModel (the paper tuned its thresholds with
openai/clip-vit-large-patch14).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.layers import Params, abstract, cubic_weights
from ip2p_jax.models.tokenizer import ClipTokenizer
from ip2p_jax.pipeline.scores import Scores
from ip2p_jax.weights import names
from ip2p_jax.weights.files import read_tensors
from ip2p_jax.xla_alarms import quietly

MEAN = np.float32([[[(0.48145466, 0.4578275, 0.40821073)]]])  # of colours in 0..1
STD = np.float32([[[(0.26862954, 0.26130258, 0.27577711)]]])
TOKENIZER_FILES = ('.json', '.txt')
# The least length of a change, for embeddings of length 1. Measured with the miniature's CLIP:
# equal inputs in other rows of a batch are up to 3e-7 apart (bfloat16: 4e-3, half of its epsilon);
# images that differ by one level in every pixel are 1e-3 apart; captions with and without a full
# stop 2e-2.
LEAST_CHANGE = 1e-4


class Towers(NamedTuple):
  """CLIP's static half; its parameters are {'text': tree, 'vision': tree}."""

  text_def: nnx.GraphDef
  vision_def: nnx.GraphDef
  image_size: int

  def embed_texts(self, params, token_ids: Array) -> Array:
    """int [B, L] -> float32 [B, P] of length 1."""
    return _unit(nnx.merge(self.text_def, params['text']).embed(token_ids))

  def embed_images(self, params, images: Array) -> Array:
    """float [B, H, W, 3] in 0..1, any size -> float32 [B, P] of length 1."""
    small = resize(images.astype(jnp.float32), self.image_size)
    return _unit(nnx.merge(self.vision_def, params['vision'])((small - MEAN) / STD))

  def scores(self, params, images: Array, token_ids: Array) -> Scores:
    """Scores of images [2, B, H, W, 3] in 0..1 and their captions' tokens [2, B, L].

    The CLIP direction is the cosine of two differences: between the images' embeddings, and between
    the captions' embeddings (Gal et al. 2021). It is 0 if images (in 8 bits) or captions did not
    change, or changed so little that it may be rounding.
    """
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    levels = jnp.round(images * 255)
    image_embeddings = jnp.stack(jnp.split(self.embed_images(params, flat(images)), 2))
    text_embeddings = jnp.stack(jnp.split(self.embed_texts(params, flat(token_ids)), 2))
    is_still = _is_still(image_embeddings, levels, params['vision'])
    is_still |= _is_still(text_embeddings, token_ids, params['text'])
    direction = _cosine(
      image_embeddings[1] - image_embeddings[0], text_embeddings[1] - text_embeddings[0]
    )
    return Scores(
      _dot(image_embeddings[0], text_embeddings[0]),
      _dot(image_embeddings[1], text_embeddings[1]),
      jnp.where(is_still, 0.0, direction),
      _dot(image_embeddings[0], image_embeddings[1]),
    )


class Clip:
  """CLIP's two towers with their parameters and tokenizer."""

  def __init__(self, towers: Towers, params: dict[str, Params], tokenizer: ClipTokenizer):
    self.towers, self.params, self.tokenizer = towers, params, tokenizer
    self._texts, self._images, self._scores = (
      jax.jit(f) for f in (towers.embed_texts, towers.embed_images, towers.scores)
    )

  @classmethod
  def load(cls, path: str | os.PathLike, dtype: str = 'float32') -> Self:
    """Reads `config.json`, `model.safetensors` and the tokenizer; InputError if one is wrong."""
    folder = storage.folder(path)
    if not (folder / 'config.json').exists():
      raise InputError(f'{path}: no CLIP here; give the folder of a CLIPModel of transformers.')
    config = storage.read_json(folder / 'config.json')
    for key in ('text_config', 'vision_config'):
      if not isinstance(config.get(key), dict):
        raise InputError(f'{folder / "config.json"} lacks {key}; it is not a CLIPModel.')
    # A key that both towers need may be given once.
    shared = {key: config[key] for key in ('projection_dim',) if key in config}
    text = TextConfig.from_json(shared | config['text_config'], f'{folder}: text_config')
    vision = VisionConfig.from_json(shared | config['vision_config'], f'{folder}: vision_config')
    text_def, text_shapes = abstract(lambda keys: TextEncoder(text, has_projection=True, rngs=keys))
    vision_def, vision_shapes = abstract(lambda keys: VisionEncoder(vision, rngs=keys))
    with storage.fetched(folder / 'model.safetensors') as file:
      tensors, _ = read_tensors(file)
    params = {}
    for tower, shapes in (('text', text_shapes), ('vision', vision_shapes)):
      target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
      params[tower] = names.to_params(tensors, target, 'clip', tower, str(folder))
    files = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in TOKENIZER_FILES}
    tokenizer = ClipTokenizer(files, text.max_position_embeddings, text.vocab_size, str(folder))
    return cls(Towers(text_def, vision_def, vision.image_size), params, tokenizer)

  def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
    """float32 [B, P] of length 1."""
    return np.asarray(quietly(self._texts, self.params, self.tokenizer(texts)))

  def embed_images(self, images: np.ndarray) -> np.ndarray:
    """float32 [B, P] of length 1, from uint8 [B, H, W, 3]."""
    return np.asarray(quietly(self._images, self.params, np.float32(images) / 255))

  def scores(
    self,
    inputs: np.ndarray,
    edits: np.ndarray,
    captions: Sequence[str],
    edited_captions: Sequence[str],
  ) -> Scores:
    """Scores of uint8 images [B, H, W, 3] before and after, and their captions."""
    images = np.float32(np.stack([inputs, edits])) / 255
    tokens = np.stack([self.tokenizer(captions), self.tokenizer(edited_captions)])
    return Scores(*map(np.asarray, quietly(self._scores, self.params, images, tokens)))


def resize(images: Array, size: int) -> Array:
  """Bicubic to [B, size, size, 3], squashed and without antialiasing, as torch's `interpolate`.

  The thresholds of the released data were tuned so (clip_similarity.py of the original).
  """
  height, width = images.shape[1:3]
  if (height, width) == (size, size):
    return images
  rows, columns = cubic_weights(height, size), cubic_weights(width, size)
  return jnp.einsum('yh,bhwc,xw->byxc', rows, images, columns, precision='highest')


def _unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _dot(a, b):
  return (a * b).sum(-1)


def _is_still(embeddings, inputs, params):
  """bool [B]: whether inputs [2, B, ...] are equal, or their embeddings up to rounding.

  The precision of embeddings is that of the weights. False if they are not finite.
  """
  precision = float(jnp.finfo(jax.tree.leaves(params)[0].dtype).eps)
  length = jnp.linalg.norm(embeddings[1] - embeddings[0], axis=-1)
  is_equal = (inputs[0] == inputs[1]).reshape(len(length), -1).all(-1)
  return is_equal | (length < max(LEAST_CHANGE, precision))


def _cosine(a, b):
  lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return _dot(a, b) / jnp.maximum(lengths, 1e-8)
