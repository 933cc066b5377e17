"""The UNet of Stable Diffusion 1.x in PyTorch, under diffusers' names, for where diffusers is not.

B batch, C channels, H W latent sides, N tokens, L text tokens, X text width; NCHW.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class UNet(nn.Module):
  """As diffusers' UNet2DConditionModel with this config; state dicts of the two fit each other."""

  def __init__(self, config: dict):
    super().__init__()
    widths, depth = config['block_out_channels'], config['layers_per_block']
    time, self.width = 4 * widths[0], widths[0]
    norm = config['norm_num_groups'], config['norm_eps']
    resnet = lambda inside, out: Resnet(inside, out, time, *norm)
    transformer = lambda width: Transformer(
      width, config['attention_head_dim'], config['cross_attention_dim'], norm[0]
    )

    def block(kind, inputs, width):
      made = nn.Module()
      made.resnets = nn.ModuleList([resnet(inside, width) for inside in inputs])
      has_attention = kind.startswith('CrossAttn')
      made.attentions = nn.ModuleList([transformer(width) for _ in inputs if has_attention])
      return made

    self.conv_in = nn.Conv2d(config['in_channels'], widths[0], 3, padding=1)
    self.time_embedding = nn.Module()
    self.time_embedding.linear_1 = nn.Linear(widths[0], time)
    self.time_embedding.linear_2 = nn.Linear(time, time)
    skips, last = [widths[0]], len(widths) - 1
    self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
    for level, width in enumerate(widths):
      kind = config['down_block_types'][level]
      down = block(kind, [skips[-1]] + [width] * (depth - 1), width)
      if level < last:
        down.downsamplers = nn.ModuleList([nn.Module()])
        down.downsamplers[0].conv = nn.Conv2d(width, width, 3, 2, padding=1)
      self.down_blocks.append(down)
      skips += [width] * (depth + (level < last))
    self.mid_block = block('CrossAttn', [widths[-1]], widths[-1])
    self.mid_block.resnets.append(resnet(widths[-1], widths[-1]))
    below = widths[-1]
    for level, kind in zip(range(last, -1, -1), config['up_block_types'], strict=True):
      width = widths[level]
      up = block(kind, [inside + skips.pop() for inside in [below] + [width] * depth], width)
      if level:
        up.upsamplers = nn.ModuleList([nn.Module()])
        up.upsamplers[0].conv = nn.Conv2d(width, width, 3, padding=1)
      self.up_blocks.append(up)
      below = width
    self.conv_norm_out = nn.GroupNorm(norm[0], widths[0], norm[1])
    self.conv_out = nn.Conv2d(widths[0], config['out_channels'], 3, padding=1)

  def forward(self, x, timesteps, context):  # [B, C, H, W], [B], [B, L, X]
    half = self.width // 2
    rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=x.device))
    angles = timesteps[:, None].float() * rates[None]
    time = self.time_embedding.linear_1(torch.cat([angles.cos(), angles.sin()], -1))
    time = self.time_embedding.linear_2(F.silu(time))

    def run(block, x, take, keep):
      for i, resnet in enumerate(block.resnets):
        x = resnet(torch.cat([x, take()], 1) if take else x, time)
        x = block.attentions[i](x, context) if len(block.attentions) else x
        keep(x)
      return x

    x = self.conv_in(x)
    skips = [x]
    for block in self.down_blocks:
      x = run(block, x, None, skips.append)
      if hasattr(block, 'downsamplers'):
        x = block.downsamplers[0].conv(x)
        skips.append(x)
    first, second = self.mid_block.resnets
    x = second(self.mid_block.attentions[0](first(x, time), context), time)
    for block in self.up_blocks:
      x = run(block, x, skips.pop, lambda x: None)
      if hasattr(block, 'upsamplers'):
        x = block.upsamplers[0].conv(F.interpolate(x, scale_factor=2.0, mode='nearest'))
    return self.conv_out(F.silu(self.conv_norm_out(x)))


class Resnet(nn.Module):
  def __init__(self, inside, out, time, groups, eps):
    super().__init__()
    self.norm1 = nn.GroupNorm(groups, inside, eps)
    self.conv1 = nn.Conv2d(inside, out, 3, padding=1)
    self.time_emb_proj = nn.Linear(time, out)
    self.norm2 = nn.GroupNorm(groups, out, eps)
    self.conv2 = nn.Conv2d(out, out, 3, padding=1)
    self.conv_shortcut = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

  def forward(self, x, time):
    h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
    return self.conv2(F.silu(self.norm2(h))) + self.conv_shortcut(x)


class Transformer(nn.Module):
  """Convolutions of one pixel around one block of self-attention, text attention and GEGLU."""

  def __init__(self, width, heads, context, groups):
    super().__init__()
    self.norm = nn.GroupNorm(groups, width, 1e-6)
    self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
    self.transformer_blocks = nn.ModuleList([Layer(width, heads, context)])

  def forward(self, x, context):
    B, C, H, W = x.shape
    tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
    tokens = self.transformer_blocks[0](tokens, context)
    return self.proj_out(tokens.transpose(1, 2).reshape(B, C, H, W)) + x


class Layer(nn.Module):
  def __init__(self, width, heads, context):
    super().__init__()
    self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
    self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, context, heads)
    self.ff = nn.Module()
    gate = nn.Module()
    gate.proj = nn.Linear(width, 8 * width)
    self.ff.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(4 * width, width)])

  def forward(self, x, context):  # [B, N, C], [B, L, X]
    y = self.norm1(x)
    x = x + self.attn1(y, y)
    x = x + self.attn2(self.norm2(x), context)
    value, gate = self.ff.net[0].proj(self.norm3(x)).chunk(2, -1)
    return x + self.ff.net[2](value * F.gelu(gate))


class Attention(nn.Module):
  def __init__(self, width, context, heads):
    super().__init__()
    self.heads = heads
    self.to_q = nn.Linear(width, width, bias=False)
    self.to_k = nn.Linear(context, width, bias=False)
    self.to_v = nn.Linear(context, width, bias=False)
    self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])

  def forward(self, x, context):
    heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
    out = F.scaled_dot_product_attention(q, k, v)
    return self.to_out[0](out.transpose(1, 2).flatten(2))
