"""ICC profiles (ICC.1:2001-04) made from their definitions, for tests of colour."""

import io
import struct

import numpy as np
from PIL import Image, ImageCms

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = (0.3127, 0.3290)
BRADFORD = np.array(
  [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
LEVELS = np.linspace(0, 1, 1024)


def from_xy(x, y):
  return np.array([x / y, 1, (1 - x - y) / y])


def primaries(red, green, blue, white=D65):
  """[3, 3]: from linear RGB to XYZ adapted to D50."""
  columns, white = np.stack([from_xy(*p) for p in (red, green, blue)], 1), from_xy(*white)
  matrix = columns * np.linalg.solve(columns, white)
  adapted = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
  return np.linalg.inv(BRADFORD) @ adapted @ BRADFORD @ matrix


def fixed(numbers):
  return struct.pack(f'>{np.size(numbers)}i', *(round(n * 65536) for n in np.ravel(numbers)))


def xyz(numbers):
  return b'XYZ \0\0\0\0' + fixed(numbers)


def table(values):
  return np.round(np.asarray(values) * 65535).astype('>u2').tobytes()


def curve(values):
  """Light, 0..1, of equally spaced numbers."""
  return b'curv\0\0\0\0' + struct.pack('>I', len(values)) + table(values)


def lut(matrix, inputs, grid, outputs):
  """An mft2 table: matrix (of XYZ), a curve for each input, grid [..., outputs], curves out."""
  head = struct.pack('>3Bx', grid.ndim - 1, grid.shape[-1], len(grid))
  sizes = struct.pack('>2H', len(inputs[0]), len(outputs[0]))
  tables = [table(part) for part in (np.stack(inputs), grid, np.stack(outputs))]
  return b'mft2\0\0\0\0' + head + fixed(matrix) + sizes + b''.join(tables)


def profile(space, tags, kind=b'mntr'):
  name = b'made for a test\0'
  tags = {
    b'desc': b'desc\0\0\0\0' + struct.pack('>I', len(name)) + name + bytes(78),
    b'cprt': b'text\0\0\0\0none\0',
    b'wtpt': xyz(D50),
  } | tags
  index, data, start = struct.pack('>I', len(tags)), b'', 132 + 12 * len(tags)
  for tag, content in tags.items():
    index += tag + struct.pack('>2I', start + len(data), len(content))
    data += content + bytes(-len(content) % 4)
  head = struct.pack('>I4x', start + len(data)) + b'\x02\x40\0\0' + kind + space + b'XYZ '
  head += struct.pack('>6H', 2024, 1, 1, 0, 0, 0) + b'acsp' + bytes(28) + fixed(D50)
  return head.ljust(128, b'\0') + index + data


def rgb(matrix, light):
  columns = {c + b'XYZ': xyz(matrix[:, i]) for i, c in enumerate((b'r', b'g', b'b'))}
  return profile(b'RGB ', columns | {c + b'TRC': curve(light) for c in (b'r', b'g', b'b')})


def grey(light):
  return profile(b'GRAY', {b'kTRC': curve(light)})


def cmyk(is_two_way=True):
  """Inks that each absorb one primary of sRGB, and black that absorbs all; made without black."""
  to_light = 1 - (1 - LEVELS) ** 1.6  # of ink: the fraction of the light that it absorbs
  from_light = 1 - (1 - LEVELS) ** (1 / 1.6)
  c, m, y, k = np.indices((2, 2, 2, 2))
  light = np.stack([1 - c, 1 - m, 1 - y], -1) * (1 - k)[..., None]
  one = 32768 / 65535  # what stands for 1 in XYZ
  tags = {b'A2B0': lut(np.eye(3), [to_light] * 4, light @ SRGB.T * one, [LEVELS] * 3)}
  if is_two_way:
    inks = 1 - np.stack([*np.indices((2, 2, 2)), np.ones((2, 2, 2))], -1)
    inverse = np.linalg.inv(SRGB) / one
    tags[b'B2A0'] = lut(inverse, [LEVELS] * 3, inks, [from_light] * 4)
  return profile(b'CMYK', tags, b'prtr')


def offset():
  """Offset print on coated paper: its inks show fewer colours than sRGB; made without black.

  Dots of solid inks side by side (Neugebauer), back from there by the nearest colour in Lab.
  """
  solids = (SOLIDS * D50 / SOLIDS[0]).reshape(2, 2, 2, 2, 3)  # relative to the paper
  to_area = 1 - (1 - LEVELS) ** 1.3  # dots grow in print
  one = 32768 / 65535  # what stands for 1 in XYZ
  light = shown_by(solids, np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 4, indexing='ij'), -1))
  numbers = np.stack(np.meshgrid(*[np.linspace(0, 1, 17)] * 3, indexing='ij'), -1)
  wanted = lab(np.interp(numbers, LEVELS, SRGB_LIGHT) @ SRGB.T).reshape(-1, 3)
  areas = np.full_like(wanted, 0.5)
  shown = lambda areas: lab(shown_by(solids[..., 0, :], areas))
  error = wanted - shown(areas)
  damping = np.ones((len(areas), 1, 1))
  for _ in range(60):  # Levenberg and Marquardt, each point by itself
    slopes = np.stack([shown(areas + step) - shown(areas) for step in 1e-4 * np.eye(3)], -1) / 1e-4
    normal = slopes.transpose(0, 2, 1) @ slopes + damping * np.eye(3)
    step = np.linalg.solve(normal, slopes.transpose(0, 2, 1) @ error[..., None])[..., 0]
    tried = np.clip(areas + step, 0, 1)
    left = wanted - shown(tried)
    is_better = (left**2).sum(-1) < (error**2).sum(-1)
    areas, error = (np.where(is_better[:, None], *pair) for pair in ((tried, areas), (left, error)))
    damping *= np.where(is_better, 0.3, 4)[:, None, None]
  inks = np.concatenate([areas, np.zeros((len(areas), 1))], -1).reshape(17, 17, 17, 4)
  to_numbers = np.interp(LEVELS, SRGB_LIGHT, LEVELS)
  from_area = np.interp(LEVELS, to_area, LEVELS)
  tags = {
    b'A2B0': lut(np.eye(3), [to_area] * 4, light * one, [LEVELS] * 3),
    b'B2A0': lut(np.linalg.inv(SRGB) / one, [to_numbers] * 3, inks, [from_area] * 4),
  }
  return profile(b'CMYK', tags, b'prtr')


def shown_by(solids, areas):
  """XYZ [..., 3] of areas [..., inks], 0..1, by those of all overprints [2, 2, ..., 3]."""
  result = solids
  for i in range(areas.shape[-1]):  # from the last ink to the first
    area = areas[..., -1 - i].reshape(areas.shape[:-1] + (1,) * (areas.shape[-1] - i))
    result = result[..., 0, :] * (1 - area) + result[..., 1, :] * area
  return result


def lab(xyz):
  t = np.maximum(xyz / D50, 0)
  f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
  return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]),
                   200 * (f[..., 1] - f[..., 2])], -1)  # fmt: skip


def scanner():
  """RGB by a table without an inverse."""
  r, g, b = np.indices((2, 2, 2))
  grid = np.stack([r, g, b], -1) @ SRGB.T * (32768 / 65535)
  return profile(b'RGB ', {b'A2B0': lut(np.eye(3), [LEVELS**1.5] * 3, grid, [LEVELS] * 3)}, b'scnr')


SRGB_LIGHT = np.where(LEVELS <= 0.04045, LEVELS / 12.92, ((LEVELS + 0.055) / 1.055) ** 2.4)
SRGB = primaries((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = primaries((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE = primaries((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = primaries((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585))
# XYZ of paper, K, Y, YK, M, MK ... CMYK, all solid, by Fogra's measurements (FOGRA39).
SOLIDS = np.array(
  [[84.48, 87.62, 74.57], [2.02, 2.1, 1.73], [69.17, 74.16, 7.04], [1.84, 2.04, 0.82],
   [33.03, 16.79, 15.01], [1.61, 1.18, 0.89], [30.2, 16.02, 2.3], [1.56, 1.31, 0.65],
   [15.02, 22.93, 52.85], [0.91, 1.18, 1.79], [8.16, 18.42, 6.74], [0.89, 1.31, 0.85],
   [5.67, 4.1, 15.67], [0.99, 0.87, 1.08], [3.66, 3.8, 3.13], [0.93, 0.97, 0.69]]
)  # fmt: skip
ALL = {
  'sRGB': rgb(SRGB, SRGB_LIGHT),
  'Display P3': rgb(P3, SRGB_LIGHT),
  'Adobe RGB': rgb(ADOBE, LEVELS ** (563 / 256)),
  'ProPhoto': rgb(PROPHOTO, LEVELS**1.8),
  'grey': grey(LEVELS**1.75),
  'CMYK': cmyk(),
}
WIDE = ('Display P3', 'Adobe RGB', 'ProPhoto')


def converted(
  image, source, target, mode, intent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
  flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
):  # fmt: skip
  """An image converted by Pillow, relative colorimetric with black point compensation.

  The profile None is sRGB.
  """
  open_ = lambda p: ImageCms.ImageCmsProfile(io.BytesIO(p)) if p else ImageCms.createProfile('sRGB')
  return ImageCms.profileToProfile(
    image, open_(source), open_(target), intent, mode, flags=flags
  )  # fmt: skip


def tagged(image, name):
  """An sRGB image converted to a profile, as if opened from a file."""
  mode = {'grey': 'L', 'CMYK': 'CMYK'}.get(name, 'RGB')
  result = converted(image, None, ALL[name], mode)
  result.info = {'icc_profile': ALL[name]}
  return result


def as_seen(image) -> Image.Image:
  """The image as sRGB, as a viewer that uses profiles shows it."""
  profile = image.info.get('icc_profile')
  return converted(image, profile, None, 'RGB') if profile else image.convert('RGB')
