"""DINO and LPIPS in plain PyTorch from their published definitions, and files with their names."""

import math

import numpy as np
import peers

torch = peers.module('torch')

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LINS = {'squeeze': (64, 128, 256, 384, 384, 512, 512), 'alex': (64, 192, 384, 256, 256)}
# (place, in, inner, out) of SqueezeNet's fires; place -> (out, in, kernel) of AlexNet's features.
FIRES = (
  (3, 64, 16, 64), (4, 128, 16, 64), (6, 128, 32, 128), (7, 256, 32, 128), (9, 256, 48, 192),
  (10, 384, 48, 192), (11, 384, 64, 256), (12, 512, 64, 256),
)  # fmt: skip
ALEX = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def _random(shapes, rng):
  """Normal weights, scaled so that activations stay near one; scales of norms are near 1."""

  def tensor(name, shape):
    values = rng.standard_normal(shape, np.float32)
    if len(shape) in (2, 4):
      return values * np.float32(math.sqrt(2 / math.prod(shape[1:])))
    is_scale = 'norm' in name and name.endswith('weight')
    return np.float32(0.1) * values + np.float32(is_scale)

  return {name: tensor(name, shape) for name, shape in shapes.items()}


def dino_tensors(rng, width=128, patch=16, depth=2, grid=14) -> dict[str, np.ndarray]:
  """The tensors of a backbone file of facebookresearch/dino."""
  shapes = {
    'cls_token': (1, 1, width),
    'pos_embed': (1, grid**2 + 1, width),
    'patch_embed.proj.weight': (width, 3, patch, patch),
    'patch_embed.proj.bias': (width,),
    'norm.weight': (width,),
    'norm.bias': (width,),
  }
  for i in range(depth):
    layers = {
      'norm1': (width,),
      'attn.qkv': (3 * width, width),
      'attn.proj': (width, width),
      'norm2': (width,),
      'mlp.fc1': (4 * width, width),
      'mlp.fc2': (width, 4 * width),
    }
    for layer, shape in layers.items():
      shapes |= {f'blocks.{i}.{layer}.weight': shape, f'blocks.{i}.{layer}.bias': shape[:1]}
  return _random(shapes, rng)


def dino(tensors, images):
  """float32 [B, 3, H, W], normalised -> class token [B, C], keys of the last block [B, N, C]."""
  t = {name: torch.from_numpy(value) for name, value in tensors.items()}
  F, width = torch.nn.functional, tensors['cls_token'].shape[-1]
  patch = tensors['patch_embed.proj.weight'].shape[-1]
  norm = lambda x, name: F.layer_norm(x, (width,), t[f'{name}.weight'], t[f'{name}.bias'], eps=1e-6)
  linear = lambda x, name: F.linear(x, t[f'{name}.weight'], t[f'{name}.bias'])
  heads_first = lambda x: x.unflatten(-1, (-1, 64)).transpose(1, 2)
  x = F.conv2d(images, t['patch_embed.proj.weight'], t['patch_embed.proj.bias'], stride=patch)
  positions = _positions(t['pos_embed'], *x.shape[2:], images.shape[2] == images.shape[3])
  x = torch.cat([t['cls_token'].expand(len(x), 1, width), x.flatten(2).transpose(1, 2)], 1)
  x = x + positions
  for i in range(1 + max(int(name.split('.')[1]) for name in t if name.startswith('blocks.'))):
    q, keys, v = linear(norm(x, f'blocks.{i}.norm1'), f'blocks.{i}.attn.qkv').chunk(3, -1)
    q, k, v = map(heads_first, (q, keys, v))
    attended = torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v
    x = x + linear(attended.transpose(1, 2).flatten(2), f'blocks.{i}.attn.proj')
    inner = F.gelu(linear(norm(x, f'blocks.{i}.norm2'), f'blocks.{i}.mlp.fc1'))
    x = x + linear(inner, f'blocks.{i}.mlp.fc2')
  return norm(x, 'norm')[:, 0], keys


def _positions(positions, rows, columns, is_square):
  grid = math.isqrt(positions.shape[1] - 1)
  if is_square and rows == columns == grid:
    return positions
  square = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
  factors = (rows + 0.1) / grid, (columns + 0.1) / grid
  resized = torch.nn.functional.interpolate(square, scale_factor=factors, mode='bicubic')
  return torch.cat([positions[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def structure_distance(keys, others):
  """The mean squared difference of the cosines of each two keys."""
  unit = torch.nn.functional.normalize
  first, second = (unit(x, dim=-1) @ unit(x, dim=-1).transpose(1, 2) for x in (keys, others))
  return ((first - second) ** 2).mean((1, 2))


def classifier_tensors(classifier, rng) -> dict[str, np.ndarray]:
  """The tensors of torchvision's squeezenet1_1 or alexnet, with a little of the head."""
  shapes = {}
  if classifier == 'squeeze':
    convolutions = {'features.0': (64, 3, 3, 3), 'classifier.1': (7, 512, 1, 1)}
    for place, width, inner, out in FIRES:
      convolutions[f'features.{place}.squeeze'] = (inner, width, 1, 1)
      convolutions[f'features.{place}.expand1x1'] = (out, inner, 1, 1)
      convolutions[f'features.{place}.expand3x3'] = (out, inner, 3, 3)
  else:
    convolutions = {'classifier.6': (7, 9)}
    for place, (out, width, kernel) in ALEX.items():
      convolutions[f'features.{place}'] = (out, width, kernel, kernel)
  for name, shape in convolutions.items():
    shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  return _random(shapes, rng)


def lin_tensors(classifier, rng) -> dict[str, np.ndarray]:
  """The tensors of LPIPS's own file, which are not negative."""
  return {
    f'lin{i}.model.1.weight': rng.random((1, width, 1, 1), np.float32)
    for i, width in enumerate(LINS[classifier])
  }


def lpips(features, lins, images, others):
  """LPIPS 0.1 of float32 [B, 3, H, W] in -1..1 -> [B]."""
  maps = _squeeze if 'features.3.squeeze.weight' in features else _alex
  t = {name: torch.from_numpy(value) for name, value in features.items()}
  shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
  scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
  unit = lambda x: x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
  total = 0
  pairs = zip(maps(t, (images - shift) / scale), maps(t, (others - shift) / scale), strict=True)
  for i, (first, second) in enumerate(pairs):
    weight = torch.from_numpy(lins[f'lin{i}.model.1.weight'])
    squares = (unit(first) - unit(second)) ** 2
    total = total + torch.nn.functional.conv2d(squares, weight).mean((1, 2, 3))
  return total


def _conv(t, x, name, **options):
  return torch.relu(
    torch.nn.functional.conv2d(x, t[f'{name}.weight'], t[f'{name}.bias'], **options)
  )


def _squeeze(t, x):
  def fire(x, place):
    name = f'features.{place}'
    x = _conv(t, x, f'{name}.squeeze')
    wide = _conv(t, x, f'{name}.expand3x3', padding=1)
    return torch.cat([_conv(t, x, f'{name}.expand1x1'), wide], 1)

  pool = lambda x: torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
  maps = [_conv(t, x, 'features.0', stride=2)]
  maps.append(fire(fire(pool(maps[-1]), 3), 4))
  maps.append(fire(fire(pool(maps[-1]), 6), 7))
  maps.append(fire(pool(maps[-1]), 9))
  for place in (10, 11, 12):
    maps.append(fire(maps[-1], place))
  return maps


def _alex(t, x):
  pool = lambda x: torch.nn.functional.max_pool2d(x, 3, 2)
  maps = [_conv(t, x, 'features.0', stride=4, padding=2)]
  maps.append(_conv(t, pool(maps[-1]), 'features.3', padding=2))
  maps.append(_conv(t, pool(maps[-1]), 'features.6', padding=1))
  maps.append(_conv(t, maps[-1], 'features.8', padding=1))
  maps.append(_conv(t, maps[-1], 'features.10', padding=1))
  return maps
