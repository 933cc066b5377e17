"""DINO's vision transformer (Caron et al. 2021), as facebookresearch/dino publishes its weights.

B batch, H W pixels, N = patches + 1, C channels. Attribute names are the checkpoint's.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, Self

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.errors import InputError
from ip2p_jax.models.attention import attend
from ip2p_jax.models.clip import MLP
from ip2p_jax.models.layers import LayerNorm, Linear, cubic_weights

HEAD_WIDTH = 64  # in every published model
EPS = 1e-6
# What is added to the number of patches in a row before positions are resized. DINO adds it against
# rounding, and moves every position by it.
EXTRA = 0.1


@dataclasses.dataclass(frozen=True)
class DinoConfig:
  """Sizes of the network. S/16 is (16, 384, 12, 1536, 14), B/8 is (8, 768, 12, 3072, 28)."""

  patch_size: int  # pixels
  width: int
  depth: int
  inner_width: int  # of the MLPs
  grid: int  # patches in a row of the images that it was trained on

  @classmethod
  def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], source: str) -> Self:
    """From the shapes of a checkpoint's tensors; InputError if it is not a DINO transformer."""
    try:
      _, positions, width = shapes['pos_embed']
      patch_size = shapes['patch_embed.proj.weight'][-1]
      inner_width = shapes['blocks.0.mlp.fc1.weight'][0]
    except (KeyError, ValueError):
      raise InputError(
        f'{source}: no DINO here (pos_embed, patch_embed.proj.weight, blocks.0 ...); give a'
        ' backbone of facebookresearch/dino, such as dino_deitsmall16_pretrain.pth.'
      ) from None
    depth = len({name.split('.')[1] for name in shapes if name.startswith('blocks.')})
    grid = math.isqrt(positions - 1)
    if grid**2 != positions - 1 or width % HEAD_WIDTH:
      raise InputError(
        f'{source}: pos_embed is {shapes["pos_embed"]}; DINO has a class token, a square of'
        f' patches, and a width that is a multiple of {HEAD_WIDTH}; use another file.'
      )
    return cls(patch_size, width, depth, inner_width, grid)


class Seen(NamedTuple):
  """What DINO sees in images."""

  class_token: Array  # float32 [B, C], after the final norm
  keys: Array  # float32 [B, N, C], of the last block; all heads side by side, class token first


class Dino(nnx.Module):
  def __init__(self, config: DinoConfig, *, rngs):
    width = config.width
    self.config = config
    self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
    self.pos_embed = nnx.Param(jnp.zeros((1, config.grid**2 + 1, width)))
    self.patch_embed = PatchEmbed(config, rngs=rngs)
    self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
    self.norm = LayerNorm(width, EPS)

  def __call__(self, images: Array) -> Seen:
    """[B, H, W, 3], normalised by ImageNet's mean and std; sides below a whole patch are left."""
    patches = self.patch_embed(images)
    B, rows, columns, C = patches.shape
    x = patches.reshape(B, -1, C)
    x = jnp.concatenate([jnp.broadcast_to(self.cls_token[...], (B, 1, C)), x], 1)  # [B, N, C]
    is_square = images.shape[1] == images.shape[2]
    x = x + self.positions(rows, columns, is_square)
    for block in self.blocks:
      x, keys = block(x)
    return Seen(self.norm(x)[:, 0].astype(jnp.float32), keys.astype(jnp.float32))

  def positions(self, rows: int, columns: int, is_square: bool) -> Array:
    """[1, N, C]: the positions of a grid of patches, bicubic from those of the training images."""
    grid, positions = self.config.grid, self.pos_embed[...]
    if is_square and rows == columns == grid:
      return positions
    down, across = (cubic_weights(grid, n, grid / (n + EXTRA)) for n in (rows, columns))
    square = positions[0, 1:].reshape(grid, grid, -1)
    resized = jnp.einsum('yh,hwc,xw->yxc', down, square, across, precision='highest')
    resized = resized.reshape(1, rows * columns, -1).astype(positions.dtype)
    return jnp.concatenate([positions[:, :1], resized], 1)


class PatchEmbed(nnx.Module):
  def __init__(self, config: DinoConfig, *, rngs):
    patch = config.patch_size
    self.proj = nnx.Conv(3, config.width, (patch, patch), patch, padding='VALID', rngs=rngs)

  def __call__(self, images):
    return self.proj(images.astype(self.proj.kernel.dtype))


class Block(nnx.Module):
  def __init__(self, config: DinoConfig, *, rngs):
    self.norm1 = LayerNorm(config.width, EPS)
    self.attn = SelfAttention(config.width, rngs=rngs)
    self.norm2 = LayerNorm(config.width, EPS)
    self.mlp = MLP(config.width, config.inner_width, 'gelu', rngs=rngs)

  def __call__(self, x):  # -> [B, N, C], its keys
    attended, keys = self.attn(self.norm1(x))
    x = x + attended
    return x + self.mlp(self.norm2(x)), keys


class SelfAttention(nnx.Module):
  def __init__(self, width, *, rngs):
    self.qkv = Linear(width, 3 * width, rngs=rngs)
    self.proj = Linear(width, width, rngs=rngs)

  def __call__(self, x):  # -> [B, N, C], keys [B, N, C]
    q, k, v = jnp.split(self.qkv(x), 3, -1)
    split = lambda y: y.reshape(*y.shape[:2], -1, HEAD_WIDTH)
    return self.proj(attend(split(q), split(k), split(v)).reshape(x.shape)), k
