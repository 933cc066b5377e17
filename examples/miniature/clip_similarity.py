"""What CLIP sees of an edit, by a folder as transformers' CLIPModel has it.

B pictures, L text tokens, P width of the space that pictures and texts share.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from train_clip import normalised

from ip2p_jax import storage
from ip2p_jax.errors import InputError
from ip2p_jax.models.clip import TextEncoder, VisionEncoder
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.layers import abstract
from ip2p_jax.text import ClipTokenizer
from ip2p_jax.weights import names
from ip2p_jax.weights.files import read_tensors


class ClipSimilarity:
  """CLIP's two towers, in float32."""

  def __init__(self, folder: Path):
    """Reads `config.json`, `model.safetensors` and the tokenizer; InputError if one is amiss."""
    if not (folder / 'config.json').is_file():
      raise InputError(f'{folder}: no CLIP here; give a folder with config.json by --clip.')
    config = storage.read_json(folder / 'config.json')
    tensors, _ = read_tensors(folder / 'model.safetensors')
    text = TextConfig.from_json(config['text_config'], f'{folder}: text_config')
    vision = VisionConfig.from_json(config['vision_config'], f'{folder}: vision_config')
    text_def, text_shapes = abstract(lambda keys: TextEncoder(text, has_projection=True, rngs=keys))
    vision_def, vision_shapes = abstract(lambda keys: VisionEncoder(vision, rngs=keys))
    self.params = {
      tower: names.to_params(tensors, shapes, 'clip', tower, str(folder))
      for tower, shapes in (('text', text_shapes), ('vision', vision_shapes))
    }
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in _TEXT}
    self.tokenizer = ClipTokenizer(
      files, text.max_position_embeddings, text.vocab_size, str(folder)
    )
    self._texts = jax.jit(lambda params, ids: _unit(nnx.merge(text_def, params).embed(ids)))
    self._pictures = jax.jit(lambda params, x: _unit(nnx.merge(vision_def, params)(x)))

  def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
    """float32 [B, P] of length 1."""
    return np.asarray(self._texts(self.params['text'], self.tokenizer(texts)))

  def embed_pictures(self, pictures: np.ndarray) -> np.ndarray:
    """float32 [B, P] of length 1, from uint8 pictures of CLIP's own size."""
    return np.asarray(self._pictures(self.params['vision'], normalised(pictures)))

  def __call__(
    self,
    inputs: np.ndarray,
    edits: np.ndarray,
    captions: Sequence[str],
    edited_captions: Sequence[str],
  ) -> tuple[np.ndarray, np.ndarray]:
    """How well each edit went the way of its captions, and how near it stayed: two cosines [B].

    The first is between the differences of the pictures and of the captions (Gal et al. 2021); a
    picture that did not change has 0.
    """
    before, after = self.embed_pictures(inputs), self.embed_pictures(edits)
    way = self.embed_texts(edited_captions) - self.embed_texts(captions)
    return _cosine(after - before, way), _cosine(before, after)


_TEXT = ('.json', '.txt')


def _unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _cosine(a, b):
  lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / np.maximum(lengths, 1e-8)
