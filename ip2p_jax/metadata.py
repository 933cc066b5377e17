"""Metadata of image files: EXIF, resolution, and the settings of an edit.

An edit keeps the EXIF tags about the photo, its camera and its place, and the dots per inch. It
drops what becomes wrong: the orientation, which is applied; the thumbnail; the size; makers' notes,
which point into the old file. It also drops other blocks (XMP, IPTC).
"""

import contextlib
import json
import math
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

SETTINGS_KEY = 'ip2p'
COMMENT_PREFIX = b'ASCII\0\0\0ip2p '  # EXIF's UserComment: eight bytes name the code, then our mark
FORMATS_WITH_EXIF_DPI = ('JPEG', 'MPO', 'TIFF', 'WEBP')
MAX_JPEG_EXIF = 65533  # bytes
B, IFD = ExifTags.Base, ExifTags.IFD
# Tags of the first IFD that are kept; its other tags say how a TIFF file stores its pixels.
MAIN_TAGS = (B.ImageDescription, B.Make, B.Model, B.Software, B.DateTime, B.Artist, B.HostComputer)
MAIN_TAGS += (B.Copyright, B.Rating, B.RatingPercent, B.XPTitle, B.XPComment, B.XPAuthor)
MAIN_TAGS += (B.XPKeywords, B.XPSubject)
DROPPED = (B.MakerNote, B.ExifImageWidth, B.ExifImageHeight, B.ExifInteroperabilityOffset)
DROPPED += (B.ComponentsConfiguration, B.CompressedBitsPerPixel)


def kept(image: Image.Image) -> dict[str, Any]:
  """The metadata of an opened image to keep: {'exif': bytes, 'dpi': (x, y)}, or less."""
  result = {}
  exif = Image.Exif()
  with contextlib.suppress(Exception):  # unreadable metadata is dropped
    exif = image.getexif()
  if encoded := _encoded(_lines(exif)):
    result['exif'] = encoded
  if dpi := _dpi(image, exif):
    result['dpi'] = dpi
  return result


def options(info: dict[str, Any], settings: dict, format: str) -> dict[str, Any]:
  """Arguments of `Image.save` that write `info` as `kept` gives it, and the settings (JSON values).

  PNG has the settings in a text chunk. Other formats have them as EXIF's comment.
  """
  text = json.dumps(settings)  # ASCII, so that every reader agrees on the encoding
  result = {'icc_profile': info.get('icc_profile')}
  if 'dpi' in info:
    result['dpi'] = info['dpi']
  if format == 'PNG':
    result['pnginfo'] = PngImagePlugin.PngInfo()
    result['pnginfo'].add_text(SETTINGS_KEY, text)
    return result | ({'exif': info['exif']} if 'exif' in info else {})
  own = [(IFD.Exif, B.UserComment, COMMENT_PREFIX + text.encode())]
  if format == 'WEBP' and 'dpi' in info:  # WebP has no other place for them
    x, y = info['dpi']
    own += [(None, B.XResolution, x), (None, B.YResolution, y), (None, B.ResolutionUnit, 2)]
  exif = _exif(own).tobytes()
  with contextlib.suppress(Exception):  # `info` of an image that `images.read` did not read
    full = _exif(own, info.get('exif', b'')).tobytes()
    exif = exif if format == 'JPEG' and len(full) > MAX_JPEG_EXIF else full
  return result | {'exif': exif}


def settings_of(image: Image.Image) -> dict | None:
  """The settings that `options` wrote; None if an opened image has none."""
  text = image.info.get(SETTINGS_KEY)
  with contextlib.suppress(Exception):  # no comment, a camera's comment, or damaged metadata
    exif = image.getexif().get_ifd(IFD.Exif)
    text = text or exif[B.UserComment].partition(COMMENT_PREFIX)[2]
    settings = json.loads(text)
    return settings if isinstance(settings, dict) else None
  return None


def _lines(exif) -> list[tuple[int | None, int, Any]]:
  """(IFD or None for the first, tag, value) of each tag that is kept."""
  lines = [(None, tag, exif[tag]) for tag in MAIN_TAGS if tag in exif]
  for ifd in (IFD.Exif, IFD.GPSInfo):
    with contextlib.suppress(Exception):
      lines += [(ifd, tag, value) for tag, value in exif.get_ifd(ifd).items()]
  return [line for line in lines if not _is_dropped(*line)]


def _is_dropped(ifd, tag, value):
  if ifd != IFD.Exif:
    return False
  is_ours = tag == B.UserComment and isinstance(value, bytes) and value.startswith(COMMENT_PREFIX)
  return is_ours or tag in DROPPED


def _encoded(lines) -> bytes:
  """The tags as EXIF, without those that cannot be written."""
  if not lines:
    return b''
  with contextlib.suppress(Exception):
    return _exif(lines).tobytes()
  writable = []
  for line in lines:
    with contextlib.suppress(Exception):
      _exif([*writable, line]).tobytes()
      writable.append(line)
  return _exif(writable).tobytes() if writable else b''


def _exif(lines, encoded=b'') -> Image.Exif:
  exif = Image.Exif()
  exif.load(encoded)
  for ifd, tag, value in lines:
    (exif if ifd is None else exif.get_ifd(ifd))[tag] = value
  return exif


def _dpi(image, exif) -> tuple[float, float] | None:
  """Dots per inch; None if the file has none (Pillow then says 72 for JPEG, 1 for TIFF)."""
  with contextlib.suppress(Exception):
    if image.format in FORMATS_WITH_EXIF_DPI and image.info.get('jfif_unit') not in (1, 2):
      scale = 2.54 if exif.get(B.ResolutionUnit) == 3 else 1
      dpi = scale * float(exif[B.XResolution]), scale * float(exif[B.YResolution])
    else:
      dpi = tuple(float(side) for side in image.info['dpi'])
    if all(0 < side < math.inf for side in dpi):
      return dpi[::-1] if exif.get(B.Orientation) in range(5, 9) else dpi
  return None
