"""The denoising UNet of Stable Diffusion 1.x and 2.x (diffusers' UNet2DConditionModel).

B batch, h w latent height and width, N = h*w tokens of a level, C channels, L text tokens (77).
InstructPix2Pix differs in one number: it has eight input channels, first the noisy latents, then
the image latents. Attribute names are the checkpoint's.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ip2p_jax.models.attention import ATTENTION_OUT, Attention, Site, attend
from ip2p_jax.models.configs import UNetConfig
from ip2p_jax.models.layers import (
  Conv1x1,
  GroupNorm,
  LayerNorm,
  Linear,
  Remat,
  ResnetBlock,
  Upsample,
  conv3x3,
  halves,
)

# From this many queries on, products give separate heads: XLA then uses the layout of the TPU's
# kernel and does not copy them (half of the layer's time besides the kernel). Slower on a CPU.
LONG = 1024
TRANSFORMER_NORM_EPS = 1e-6  # not in config.json


class UNet(nnx.Module):
  """Predicts noise (or velocity) from noisy latents, timestep and text."""

  def __init__(self, config: UNetConfig, *, rngs):
    self.config = config
    widths, depth = config.block_out_channels, config.layers_per_block
    time_width = 4 * widths[0]
    block = _BlockMaker(config, time_width, rngs)
    self.conv_in = conv3x3(config.in_channels, widths[0], rngs=rngs)
    self.time_embedding = TimeEmbedding(widths[0], time_width, rngs=rngs)

    skips, down = [widths[0]], []
    for level, width in enumerate(widths):
      has_attention = config.down_block_types[level].startswith('CrossAttn')
      is_last = level == len(widths) - 1
      inputs = [skips[-1]] + [width] * (depth - 1)
      down.append(Block('down', level, inputs, width, has_attention, block))
      down[-1].downsamplers = None if is_last else nnx.List([Downsample(width, rngs=rngs)])
      skips += [width] * (depth if is_last else depth + 1)
    self.down_blocks = nnx.List(down)

    self.mid_block = MidBlock(len(widths) - 1, widths[-1], block)

    up, width_below = [], widths[-1]
    for i, has_attention in enumerate(t.startswith('CrossAttn') for t in config.up_block_types):
      level = len(widths) - 1 - i
      width = widths[level]
      inputs = [w + skips.pop() for w in [width_below] + [width] * depth]
      up.append(Block('up', level, inputs, width, has_attention, block))
      up[-1].upsamplers = nnx.List([Upsample(width, rngs=rngs)]) if level else None
      width_below = width
    self.up_blocks = nnx.List(up)

    self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
    self.conv_out = conv3x3(widths[0], config.out_channels, rngs=rngs)

  def __call__(
    self,
    latents: Array,
    timesteps: Array,
    context: Array,
    attention: Attention = attend,
    remat: Remat = lambda layer: layer,
  ) -> Array:
    """latents [B, h, w, in_channels], timesteps [B] or [] (may be fractional), context [B, L, X].

    `remat` wraps every resnet and transformer, one of `layers.REMATS` in training. Returns float32
    [B, h, w, out_channels]. Any h and w work; no multiple of 8 is needed.
    """
    dtype = self.conv_in.kernel.dtype
    latents, context = latents.astype(dtype), context.astype(dtype)
    timesteps = jnp.broadcast_to(timesteps, latents.shape[:1])
    time = self.time_embedding(sinusoids(timesteps, self.config).astype(dtype))  # [B, 4 * width]

    x = self.conv_in(latents)
    skips = [x]
    for block in self.down_blocks:
      for resnet, transformer in block.layers():
        x = remat(resnet)(x, time)
        if transformer is not None:
          x = remat(transformer.with_attention(attention))(x, context)
        skips.append(x)
      if block.downsamplers is not None:
        x = block.downsamplers[0](x)
        skips.append(x)

    x = self.mid_block(x, time, context, attention, remat)

    for block in self.up_blocks:
      for resnet, transformer in block.layers():
        x = remat(resnet)(jnp.concatenate([x, skips.pop()], -1), time)
        if transformer is not None:
          x = remat(transformer.with_attention(attention))(x, context)
      if block.upsamplers is not None:
        x = block.upsamplers[0](x, skips[-1].shape[1:3])

    return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)


def sinusoids(timesteps: Array, config: UNetConfig) -> Array:
  """[B] -> [B, width of the first level], float32; cosines first in every released model."""
  half = config.block_out_channels[0] // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / (half - config.freq_shift)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10_000) * exponents)[None]
  halves = [jnp.sin(angles), jnp.cos(angles)]
  return jnp.concatenate(halves[::-1] if config.flip_sin_to_cos else halves, -1)


class TimeEmbedding(nnx.Module):
  def __init__(self, in_width, width, *, rngs):
    self.linear_1 = Linear(in_width, width, rngs=rngs)
    self.linear_2 = Linear(width, width, rngs=rngs)

  def __call__(self, x):
    return self.linear_2(nnx.silu(self.linear_1(x)))


class _BlockMaker:
  """Makes the resnets and transformers of one UNet's blocks."""

  def __init__(self, config, time_width, rngs):
    self.config, self.time_width, self.rngs = config, time_width, rngs

  def resnet(self, in_width, width):
    c = self.config
    return ResnetBlock(
      in_width, width, groups=c.norm_num_groups, eps=c.norm_eps, time_width=self.time_width,
      rngs=self.rngs,
    )  # fmt: skip

  def transformer(self, place, level, width):
    return SpatialTransformer(place, level, width, self.config, rngs=self.rngs)


class Block(nnx.Module):
  """One level, down or up: resnets, each followed by a transformer if the level has attention."""

  def __init__(self, place, level, in_widths, width, has_attention, make: _BlockMaker):
    self.resnets = nnx.List([make.resnet(in_width, width) for in_width in in_widths])
    self.attentions = (
      nnx.List([make.transformer(place, level, width) for _ in in_widths])
      if has_attention
      else None
    )

  def layers(self):
    attentions = [None] * len(self.resnets) if self.attentions is None else self.attentions
    return zip(self.resnets, attentions, strict=True)


class MidBlock(nnx.Module):
  def __init__(self, level, width, make: _BlockMaker):
    self.resnets = nnx.List([make.resnet(width, width) for _ in range(2)])
    self.attentions = nnx.List([make.transformer('mid', level, width)])

  def __call__(self, x, time, context, attention, remat):
    x = remat(self.resnets[0])(x, time)
    x = remat(self.attentions[0].with_attention(attention))(x, context)
    return remat(self.resnets[1])(x, time)


class Downsample(nnx.Module):
  def __init__(self, width, *, rngs):
    self.conv = conv3x3(width, width, strides=2, rngs=rngs)

  def __call__(self, x):
    return self.conv(x)


class SpatialTransformer(nnx.Module):
  """Flattens the image to tokens and runs one transformer block over them, with a residual."""

  def __init__(self, place, level, width, config: UNetConfig, *, rngs):
    self.place, self.level = place, level
    projection = Linear if config.use_linear_projection else Conv1x1
    self.norm = GroupNorm(config.norm_num_groups, width, TRANSFORMER_NORM_EPS)
    self.proj_in = projection(width, width, rngs=rngs)
    block = TransformerBlock(width, config.heads[level], config.cross_attention_dim, rngs=rngs)
    self.transformer_blocks = nnx.List([block])
    self.proj_out = projection(width, width, rngs=rngs)

  def with_attention(self, attention: Attention):
    return lambda x, context: self(x, context, attention)

  def __call__(self, x, context, attention):  # [B, h, w, C], [B, L, X]
    site = Site(self.place, self.level, False, x.shape[1] * x.shape[2])
    tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])  # [B, N, C]
    for block in self.transformer_blocks:
      tokens = block(tokens, context, attention, site)
    return self.proj_out(tokens.reshape(x.shape)) + x


class TransformerBlock(nnx.Module):
  def __init__(self, width, heads, context_width, *, rngs):
    self.norm1 = LayerNorm(width)
    self.attn1 = MultiHeadAttention(width, width, heads, rngs=rngs)
    self.norm2 = LayerNorm(width)
    self.attn2 = MultiHeadAttention(width, context_width, heads, rngs=rngs)
    self.norm3 = LayerNorm(width)
    self.ff = FeedForward(width, rngs=rngs)

  def __call__(self, x, context, attention, site: Site):  # [B, N, C], [B, L, X]
    y = self.norm1(x)
    x = x + self.attn1(y, y, attention, site)
    x = x + self.attn2(self.norm2(x), context, attention, site._replace(is_cross=True))
    return x + self.ff(self.norm3(x))


class MultiHeadAttention(nnx.Module):
  def __init__(self, width, context_width, heads, *, rngs):
    self.heads = heads
    self.to_q = Linear(width, width, use_bias=False, rngs=rngs)
    self.to_k = Linear(context_width, width, use_bias=False, rngs=rngs)
    self.to_v = Linear(context_width, width, use_bias=False, rngs=rngs)
    self.to_out = Linear(width, width, rngs=rngs)

  def __call__(self, x, context, attention, site):
    is_long = site.tokens >= LONG
    q, k, v = (
      self._heads(project, y, is_long)
      for project, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
    )
    out = checkpoint_name(attention(q, k, v, site), ATTENTION_OUT)
    if not is_long:
      return self.to_out(out.reshape(x.shape))
    kernel = self.to_out.kernel[...].reshape(*out.shape[2:], -1)
    return jnp.einsum('bnhd,hdc->bnc', out, kernel) + self.to_out.bias[...][None, None]

  def _heads(self, project, x, is_long):  # [B, N, C] -> [B, N, heads, D]
    if not is_long:
      return project(x).reshape(*x.shape[:2], self.heads, -1)
    kernel = project.kernel[...].reshape(x.shape[-1], self.heads, -1)
    return jnp.einsum('bnc,chd->bnhd', x, kernel)


class FeedForward(nnx.Module):
  """GEGLU: half of a wide projection gates the other half through exact GELU."""

  def __init__(self, width, *, rngs):
    self.proj = Linear(width, 8 * width, rngs=rngs)
    self.out = Linear(4 * width, width, rngs=rngs)

  def __call__(self, x):
    return self.out(gated(*halves(x, self.proj.kernel[...], self.proj.bias[...])))


@jax.custom_vjp
def gated(value: Array, gate: Array) -> Array:
  """value * gelu(gate), arithmetic in float32; the backward pass is one pass over both."""
  value32, gate32 = value.astype(jnp.float32), gate.astype(jnp.float32)
  return (value32 * nnx.gelu(gate32, approximate=False)).astype(value.dtype)


def _gated_forward(value, gate):
  return gated(value, gate), (value, gate)


def _gated_backward(inputs, grad):
  value, gate, grad32 = (x.astype(jnp.float32) for x in (*inputs, grad))
  share = 0.5 * (1 + jax.lax.erf(gate * 0.5**0.5))  # normal distribution function of the gate
  density = jnp.exp(-0.5 * jnp.square(gate)) * (2 * math.pi) ** -0.5
  by_value, by_gate = gate * share, value * (share + gate * density)
  return tuple((grad32 * by).astype(grad.dtype) for by in (by_value, by_gate))


gated.defvjp(_gated_forward, _gated_backward)
