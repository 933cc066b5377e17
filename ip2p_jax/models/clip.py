"""CLIP's two towers (transformers' CLIPTextModel, CLIPVisionModelWithProjection, CLIPModel).

B batch, L text tokens (77), N = patches + 1, C channels, P width of the shared space. Attribute
names are the checkpoint's, with its spelling `pre_layrnorm`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.models.attention import attend
from ip2p_jax.models.configs import TextConfig, VisionConfig
from ip2p_jax.models.layers import LayerNorm, Linear


class TextEncoder(nnx.Module):
  """The text tower; with `has_projection` it can also embed a text in the shared space."""

  def __init__(self, config: TextConfig, *, has_projection: bool = False, rngs):
    self.config = config
    self.text_model = TextTransformer(config, rngs=rngs)
    self.text_projection = _projection(config, rngs) if has_projection else None

  def __call__(self, token_ids: Array) -> Array:
    """[B, L] int -> context float32 [B, L, C]: last layer after the final norm."""
    return self.text_model(token_ids).astype(jnp.float32)

  def embed(self, token_ids: Array) -> Array:
    """[B, L] int -> float32 [B, P], not normalised: the state at the end of the text, projected."""
    eos = self.config.eos_token_id
    # Configs from before 2023 say 2, although the tokenizer's end token is the largest id.
    is_end = token_ids == (token_ids.max(-1, keepdims=True) if eos == 2 else eos)
    states = self.text_model(token_ids)
    pooled = states[jnp.arange(len(states)), is_end.argmax(-1)]  # the first end token
    return self.text_projection(pooled).astype(jnp.float32)


class VisionEncoder(nnx.Module):
  """The vision tower: embeds images in the shared space."""

  def __init__(self, config: VisionConfig, *, rngs):
    self.config = config
    self.vision_model = VisionTransformer(config, rngs=rngs)
    self.visual_projection = _projection(config, rngs)

  def __call__(self, images: Array) -> Array:
    """[B, image_size, image_size, 3], normalised by CLIP's mean and std -> float32 [B, P]."""
    return self.visual_projection(self.vision_model(images)).astype(jnp.float32)


class TextTransformer(nnx.Module):
  def __init__(self, config: TextConfig, *, rngs):
    self.embeddings = TextEmbeddings(config, rngs=rngs)
    self.encoder = Encoder(config, rngs=rngs)
    self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

  def __call__(self, token_ids):
    return self.final_layer_norm(self.encoder(self.embeddings(token_ids), is_causal=True))


class TextEmbeddings(nnx.Module):
  def __init__(self, config: TextConfig, *, rngs):
    self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
    self.position_embedding = nnx.Embed(
      config.max_position_embeddings, config.hidden_size, rngs=rngs
    )

  def __call__(self, token_ids):  # [B, L]
    # Not by calling nnx.Embed, which returns float32 for weights of any type.
    tokens, positions = (
      jnp.asarray(table.embedding[...]) for table in (self.token_embedding, self.position_embedding)
    )
    return tokens[token_ids] + positions[None, : token_ids.shape[1]]


class VisionTransformer(nnx.Module):
  def __init__(self, config: VisionConfig, *, rngs):
    self.embeddings = VisionEmbeddings(config, rngs=rngs)
    self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
    self.encoder = Encoder(config, rngs=rngs)
    self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

  def __call__(self, images):  # -> [B, C]: the state of the class token
    x = self.encoder(self.pre_layrnorm(self.embeddings(images)))
    return self.post_layernorm(x[:, :1])[:, 0]


class VisionEmbeddings(nnx.Module):
  def __init__(self, config: VisionConfig, *, rngs):
    width, patch = config.hidden_size, config.patch_size
    self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
    self.patch_embedding = nnx.Conv(
      config.num_channels, width, (patch, patch), patch, padding='VALID', use_bias=False, rngs=rngs
    )
    positions = (config.image_size // patch) ** 2 + 1
    self.position_embedding = nnx.Embed(positions, width, rngs=rngs)

  def __call__(self, images):
    patches = self.patch_embedding(images.astype(self.patch_embedding.kernel.dtype))
    B, _, _, C = patches.shape
    first = jnp.broadcast_to(self.class_embedding[...][None, None], (B, 1, C))
    x = jnp.concatenate([first, patches.reshape(B, -1, C)], 1)  # [B, N, C]
    return x + self.position_embedding.embedding[...][None]


class Encoder(nnx.Module):
  def __init__(self, config, *, rngs):
    self.layers = nnx.List(
      [EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
    )

  def __call__(self, x, is_causal=False):
    for layer in self.layers:
      x = layer(x, is_causal)
    return x


class EncoderLayer(nnx.Module):
  def __init__(self, config, *, rngs):
    width, eps = config.hidden_size, config.layer_norm_eps
    self.layer_norm1 = LayerNorm(width, eps)
    self.self_attn = SelfAttention(width, config.num_attention_heads, rngs=rngs)
    self.layer_norm2 = LayerNorm(width, eps)
    self.mlp = MLP(width, config.intermediate_size, config.hidden_act, rngs=rngs)

  def __call__(self, x, is_causal):
    x = x + self.self_attn(self.layer_norm1(x), is_causal)
    return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nnx.Module):
  def __init__(self, width, heads, *, rngs):
    self.heads = heads
    linear = lambda: Linear(width, width, rngs=rngs)
    self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()

  def __call__(self, x, is_causal):
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
    q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
    return self.out_proj(attend(q, k, v, is_causal=is_causal).reshape(x.shape))


class MLP(nnx.Module):
  def __init__(self, width, inner_width, activation, *, rngs):
    self.activation = activation
    self.fc1 = Linear(width, inner_width, rngs=rngs)
    self.fc2 = Linear(inner_width, width, rngs=rngs)

  def __call__(self, x):
    return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


ACTIVATIONS = {
  'quick_gelu': lambda x: x * nnx.sigmoid(1.702 * x),
  'gelu': lambda x: nnx.gelu(x, approximate=False),
}


def _projection(config, rngs):
  return Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)
