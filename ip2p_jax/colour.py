"""Colour profiles: from an image's own colours to sRGB, which the models see, and back.

The ICC profile in `info['icc_profile']` defines an image's colours. Without a profile they are
sRGB. Conversions are relative colorimetric with black point compensation: colours that both
spaces have do not change, white and black stay white and black, and other colours are clipped. So
an image that goes to sRGB and back changes by rounding only, inside the gamut of sRGB. (The
perceptual intent would change all colours, by another rule each way.)
"""

import contextlib
import functools
import io
import struct

import numpy as np
from PIL import ExifTags, Image, ImageCms

RGB_MODES = ('RGB', 'RGBA', 'RGBX', 'P', 'PA')
GREY_MODES = ('1', 'L', 'LA', 'I', 'I;16', 'I;16B', 'I;16L', 'F')
TAKEN = 'its colours are taken as sRGB'
SAME = 2  # levels of 255: profiles of sRGB differ so much between their makers
D50 = (0.9642, 1.0, 0.8249)  # white of all profiles
# XYZ of red, green and blue, adapted to D50.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
ADOBE_GAMMA = 563 / 256
UNCALIBRATED = 65535  # EXIF's ColorSpace of all that is not sRGB
# sRGB in the PNG chunks gAMA, cHRM and cICP (H.273: primaries and transfer).
SRGB_GAMMA, SRGB_CHROMATICITY = 1 / 2.2, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
SRGB_CICP = ((1, 13), (1, 1), (2, 2))


def own_profile(image: Image.Image) -> tuple[bytes | None, str]:
  """The colours that an opened image declares: (profile or None, problem or '').

  The profile can be read. It is of RGB, or of CMYK for a CMYK image. The profile of a grey image
  becomes the profile of RGB in which equal numbers show the same grey. None means sRGB, or CMYK of
  an unknown kind.
  """
  profile = image.info.get('icc_profile')
  if image.mode == 'LAB':  # Pillow knows what it is
    return None, ''
  if not profile:
    return _without_profile(image)
  try:
    space = _space(profile)
    is_grey = image.mode in GREY_MODES or (space == 'GRAY' and _has_only_greys(image))
    if is_grey and space == 'GRAY':
      profile, space = _rgb_of_grey(profile), 'RGB'
    if space != ('CMYK' if image.mode == 'CMYK' else 'RGB'):
      return None, f'its colour profile is for {space} and its pixels are not; {TAKEN}'
    _transform(profile, space, True)
  except (OSError, ImageCms.PyCMSError) as error:
    return None, f'its colour profile cannot be read ({error}); {TAKEN}'
  return (None if is_grey and is_srgb(profile) else profile), ''


def _has_only_greys(image):
  """Pillow opens 16-bit grey with transparency as RGBA; a palette may have greys only."""
  if image.mode not in RGB_MODES:
    return False
  red, green, blue = image.convert('RGB').split()
  return red.tobytes() == green.tobytes() == blue.tobytes()


def has_way_back(profile: bytes) -> bool:
  """Whether colours can be converted to a profile; profiles of some scanners have no inverse."""
  try:
    _transform(profile, _space(profile), False)
  except (OSError, ImageCms.PyCMSError):
    return False
  return True


def cicp_problem(head: bytes) -> str:
  """The problem of a PNG whose chunk cICP names other colours than sRGB, or ''.

  `head` holds the first bytes of the file.
  """
  _, mark, numbers = head.partition(b'cICP')
  is_other = mark and head.startswith(b'\x89PNG') and tuple(numbers[:2]) not in SRGB_CICP
  return f"its colours are given by PNG's cICP, which is not read; {TAKEN}" if is_other else ''


def to_srgb(image: Image.Image) -> Image.Image:
  """RGB, RGBA or CMYK as RGB or RGBA of sRGB, without a profile; `image` itself if it is sRGB."""
  profile = image.info.get('icc_profile')
  if not profile or is_srgb(profile):
    return image.convert('RGB') if image.mode == 'CMYK' else image
  result = _transform(profile, image.mode, True).apply(image)
  result.info = {key: value for key, value in image.info.items() if key != 'icc_profile'}
  return result


def from_srgb(image: Image.Image, like: Image.Image) -> Image.Image:
  """An sRGB image in the colours of the image `like`: CMYK, or RGB of its profile."""
  profile = like.info.get('icc_profile')
  if not profile or is_srgb(profile):
    return image
  return _transform(profile, 'CMYK' if like.mode == 'CMYK' else 'RGB', False).apply(image)


@functools.lru_cache(64)
def is_srgb(profile: bytes) -> bool:
  """Whether the colours of a profile are those of sRGB within SAME levels."""
  try:
    converted = _transform(profile, 'RGB', True).apply(_probe())
  except (OSError, ImageCms.PyCMSError):  # broken, or not of RGB
    return False
  return np.abs(np.asarray(converted, int) - np.asarray(_probe(), int)).max() <= SAME


@functools.cache
def _probe() -> Image.Image:
  """All greys, and a cube of 9 x 9 x 9 colours."""
  levels = np.linspace(0, 255, 9).round()
  cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
  greys = np.broadcast_to(np.arange(256)[:, None], (1, 256, 3))
  return Image.fromarray(np.concatenate([greys, cube], 1).astype(np.uint8))


@functools.lru_cache(32)
def _transform(profile: bytes, mode: str, to_srgb: bool) -> ImageCms.ImageCmsTransform:
  """From a profile's colours to sRGB or back; OSError or PyCMSError if it cannot be used."""
  srgb, own = ImageCms.createProfile('sRGB'), _open(profile)
  sides = [(own, mode), (srgb, 'RGBA' if mode == 'RGBA' else 'RGB')]
  (source, source_mode), (target, target_mode) = sides if to_srgb else sides[::-1]
  flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
  if target_mode == 'CMYK':  # the usual table is off by up to half a level of ink
    flags |= ImageCms.Flags.HIGHRESPRECALC
  intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
  return ImageCms.buildTransform(source, target, source_mode, target_mode, intent, flags)


def _open(profile):
  return ImageCms.ImageCmsProfile(io.BytesIO(profile))


def _space(profile) -> str:
  """'RGB', 'CMYK', 'GRAY', 'Lab' ..."""
  return _open(profile).profile.xcolor_space.strip()


def _without_profile(image):
  """`own_profile` without an ICC profile: cameras name Adobe RGB in EXIF, PNG has chunks."""
  with contextlib.suppress(Exception):  # unreadable metadata says nothing
    exif = image.getexif()
    colour_space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
    index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
    if image.mode == 'RGB' and colour_space == UNCALIBRATED and str(index).startswith('R03'):
      return _rgb_profile('Adobe RGB of EXIF', ADOBE_RGB, [ADOBE_GAMMA]), ''
  gamma = image.info.get('gamma', SRGB_GAMMA)
  chromaticity = image.info.get('chromaticity', SRGB_CHROMATICITY)
  is_like = abs(gamma - SRGB_GAMMA) < 0.01
  is_like = is_like and np.allclose(chromaticity, SRGB_CHROMATICITY, atol=0.005)
  if image.format != 'PNG' or 'srgb' in image.info or is_like:
    return None, ''
  return None, f"its colours are given by PNG's gAMA and cHRM, which are not read; {TAKEN}"


@functools.lru_cache(32)
def _rgb_of_grey(profile: bytes) -> bytes:
  """The profile of RGB in which (v, v, v) shows the grey that v is in a profile of grey."""
  greys = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
  shown = np.asarray(_transform(profile, 'L', True).apply(greys))[0, :, 1] / 255
  light = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
  return _rgb_profile('RGB of a grey profile', SRGB, light)


def _rgb_profile(name, primaries, curve) -> bytes:
  """A display profile, ICC.1:2001-04 (version 2.4).

  `primaries` are XYZ of red, green and blue. `curve` is the light, 0..1, of equally spaced numbers,
  or [gamma].
  """
  fixed = lambda numbers: struct.pack(f'>{len(numbers)}i', *(round(n * 65536) for n in numbers))
  xyz = lambda numbers: b'XYZ \0\0\0\0' + fixed(numbers)
  ascii = name.encode() + b'\0'
  unit = 256 if len(curve) == 1 else 65535
  curve = struct.pack(f'>I{len(curve)}H', len(curve), *(round(value * unit) for value in curve))
  tags = {
    b'desc': b'desc\0\0\0\0' + struct.pack('>I', len(ascii)) + ascii + bytes(78),
    b'cprt': b'text\0\0\0\0No copyright\0',
    b'wtpt': xyz(D50),
    **{c + b'XYZ': xyz(primary) for c, primary in zip((b'r', b'g', b'b'), primaries, strict=True)},
    **{c + b'TRC': b'curv\0\0\0\0' + curve for c in (b'r', b'g', b'b')},
  }
  table, data, start = struct.pack('>I', len(tags)), b'', 128 + 4 + 12 * len(tags)
  for tag, content in tags.items():
    table += tag + struct.pack('>2I', start + len(data), len(content))
    data += content + bytes(-len(content) % 4)
  size = struct.pack('>I4x', start + len(data))
  head = size + b'\x02\x40\0\0mntrRGB XYZ ' + struct.pack('>6H', 2026, 1, 1, 0, 0, 0) + b'acsp'
  return head.ljust(68, b'\0') + fixed(D50).ljust(60, b'\0') + table + data
