"""The autoencoder of Stable Diffusion (diffusers' AutoencoderKL).

B batch, H W pixels, h w latents, `factor` times fewer along each side. Latents here are *unscaled*,
those of the posterior; the diffusion multiplies them by `config.scaling_factor`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ip2p_jax.models.attention import attend
from ip2p_jax.models.configs import VAEConfig
from ip2p_jax.models.layers import Conv1x1, GroupNorm, Linear, ResnetBlock, Upsample, conv3x3

EPS = 1e-6  # of every norm; not in config.json


class Posterior(NamedTuple):
  """A diagonal normal over latents; both fields [B, h, w, latent_channels], float32."""

  mean: Array
  log_variance: Array

  def mode(self) -> Array:
    return self.mean

  def sample(self, noise: Array) -> Array:
    """`noise` is standard normal, shaped like the mean."""
    return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class VAE(nnx.Module):
  def __init__(self, config: VAEConfig, *, rngs):
    self.config = config
    channels = config.latent_channels
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)
    self.quant_conv = Conv1x1(2 * channels, 2 * channels, rngs=rngs)
    self.post_quant_conv = Conv1x1(channels, channels, rngs=rngs)

  def encode(self, images: Array) -> Posterior:
    """[B, H, W, 3] in [-1, 1] -> posterior over unscaled latents [B, h, w, latent_channels]."""
    images = images.astype(self.quant_conv.kernel.dtype)
    moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, -1)
    return Posterior(mean, jnp.clip(log_variance, -30, 20))

  def decode(self, latents: Array) -> Array:
    """Unscaled latents [B, h, w, latent_channels] -> float32 images [B, H, W, 3], about [-1, 1]."""
    latents = latents.astype(self.post_quant_conv.kernel.dtype)
    return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)


class Encoder(nnx.Module):
  def __init__(self, config: VAEConfig, *, rngs):
    widths, groups = config.block_out_channels, config.norm_num_groups
    self.conv_in = conv3x3(config.in_channels, widths[0], rngs=rngs)
    blocks, in_width = [], widths[0]
    for level, width in enumerate(widths):
      blocks.append(Block(in_width, width, config.layers_per_block, groups, rngs=rngs))
      has_downsample = level < len(widths) - 1
      blocks[-1].downsamplers = nnx.List([Downsample(width, rngs=rngs)]) if has_downsample else None
      in_width = width
    self.down_blocks = nnx.List(blocks)
    self.mid_block = MidBlock(widths[-1], groups, rngs=rngs)
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
    self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels, rngs=rngs)

  def __call__(self, images):
    x = self.conv_in(images)
    for block in self.down_blocks:
      x = block(x)
      if block.downsamplers is not None:
        x = block.downsamplers[0](x)
    x = self.mid_block(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
  def __init__(self, config: VAEConfig, *, rngs):
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    self.conv_in = conv3x3(config.latent_channels, widths[0], rngs=rngs)
    self.mid_block = MidBlock(widths[0], groups, rngs=rngs)
    blocks, in_width = [], widths[0]
    for level, width in enumerate(widths):
      blocks.append(Block(in_width, width, config.layers_per_block + 1, groups, rngs=rngs))
      has_upsample = level < len(widths) - 1
      blocks[-1].upsamplers = nnx.List([Upsample(width, rngs=rngs)]) if has_upsample else None
      in_width = width
    self.up_blocks = nnx.List(blocks)
    self.conv_norm_out = GroupNorm(groups, widths[-1], EPS)
    self.conv_out = conv3x3(widths[-1], config.out_channels, rngs=rngs)

  def __call__(self, latents):
    x = self.mid_block(self.conv_in(latents))
    for block in self.up_blocks:
      x = block(x)
      if block.upsamplers is not None:
        x = block.upsamplers[0](x, (2 * x.shape[1], 2 * x.shape[2]))
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Block(nnx.Module):
  def __init__(self, in_width, width, depth, groups, *, rngs):
    in_widths = [in_width] + [width] * (depth - 1)
    self.resnets = nnx.List([ResnetBlock(w, width, groups=groups, eps=EPS, rngs=rngs)
                             for w in in_widths])  # fmt: skip

  def __call__(self, x):
    for resnet in self.resnets:
      x = resnet(x)
    return x


class MidBlock(nnx.Module):
  def __init__(self, width, groups, *, rngs):
    resnet = lambda: ResnetBlock(width, width, groups=groups, eps=EPS, rngs=rngs)
    self.resnets = nnx.List([resnet(), resnet()])
    self.attentions = nnx.List([PixelAttention(width, groups, rngs=rngs)])

  def __call__(self, x):
    x = self.attentions[0](self.resnets[0](x))
    return self.resnets[1](x)


class PixelAttention(nnx.Module):
  """Self-attention of all latents, with a single head as wide as the network."""

  def __init__(self, width, groups, *, rngs):
    linear = lambda: Linear(width, width, rngs=rngs)
    self.group_norm = GroupNorm(groups, width, EPS)
    self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()

  def __call__(self, x):
    y = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])  # [B, N, one head, C]
    y = attend(self.to_q(y), self.to_k(y), self.to_v(y))
    return x + self.to_out(y).reshape(x.shape)


class Downsample(nnx.Module):
  """Stride 2 with padding on the right and at the bottom only."""

  def __init__(self, width, *, rngs):
    self.conv = conv3x3(width, width, strides=2, padding=((0, 1), (0, 1)), rngs=rngs)

  def __call__(self, x):
    return self.conv(x)
