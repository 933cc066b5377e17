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
  """Inks that each take away one primary of sRGB, and black that takes all; made without black."""
  to_light = 1 - (1 - LEVELS) ** 1.6  # of ink: the part of the light that it takes away
  from_light = 1 - (1 - LEVELS) ** (1 / 1.6)
  c, m, y, k = np.indices((2, 2, 2, 2))
  light = np.stack([1 - c, 1 - m, 1 - y], -1) * (1 - k)[..., None]
  whole = 32768 / 65535  # what stands for 1 in XYZ
  tags = {b'A2B0': lut(np.eye(3), [to_light] * 4, light @ SRGB.T * whole, [LEVELS] * 3)}
  if is_two_way:
    inks = 1 - np.stack([*np.indices((2, 2, 2)), np.ones((2, 2, 2))], -1)
    inverse = np.linalg.inv(SRGB) / whole
    tags[b'B2A0'] = lut(inverse, [LEVELS] * 3, inks, [from_light] * 4)
  return profile(b'CMYK', tags, b'prtr')


def scanner():
  """RGB by a table that only leads away from it."""
  r, g, b = np.indices((2, 2, 2))
  grid = np.stack([r, g, b], -1) @ SRGB.T * (32768 / 65535)
  return profile(b'RGB ', {b'A2B0': lut(np.eye(3), [LEVELS**1.5] * 3, grid, [LEVELS] * 3)}, b'scnr')


SRGB_LIGHT = np.where(LEVELS <= 0.04045, LEVELS / 12.92, ((LEVELS + 0.055) / 1.055) ** 2.4)
SRGB = primaries((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = primaries((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE = primaries((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
PROPHOTO = primaries((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585))
ALL = {
  'sRGB': rgb(SRGB, SRGB_LIGHT),
  'Display P3': rgb(P3, SRGB_LIGHT),
  'Adobe RGB': rgb(ADOBE, LEVELS ** (563 / 256)),
  'ProPhoto': rgb(PROPHOTO, LEVELS**1.8),
  'grey': grey(LEVELS**1.75),
  'CMYK': cmyk(),
}
WIDE = ('Display P3', 'Adobe RGB', 'ProPhoto')


def converted(picture, source, target, mode):
  """By Pillow alone, relative colorimetric with black point compensation; None is sRGB."""
  open_ = lambda p: ImageCms.ImageCmsProfile(io.BytesIO(p)) if p else ImageCms.createProfile('sRGB')
  return ImageCms.profileToProfile(
    picture, open_(source), open_(target), ImageCms.Intent.RELATIVE_COLORIMETRIC, mode,
    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
  )  # fmt: skip


def tagged(picture, name):
  """An sRGB picture in the colours of a profile, as a file of them is opened."""
  mode = {'grey': 'L', 'CMYK': 'CMYK'}.get(name, 'RGB')
  result = converted(picture, None, ALL[name], mode)
  result.info = {'icc_profile': ALL[name]}
  return result


def as_seen(picture) -> Image.Image:
  """What a viewer shows that honours profiles: RGB of sRGB."""
  profile = picture.info.get('icc_profile')
  return converted(picture, profile, None, 'RGB') if profile else picture.convert('RGB')
