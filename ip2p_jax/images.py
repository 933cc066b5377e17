"""Image files: the only place that reads, resizes and writes them.

Images are upright PIL images of mode RGB, RGBA or, with a profile, CMYK. Sizes are (width, height),
as in Pillow. An image keeps its own colours: its `info` holds the profile, 'exif' and 'dpi' (see
`colour` and `metadata`). Arrays are sRGB, uint8 [h, w, 3], at the size the model works at. Masks
are float32 [H, W] in [0, 1] at the original's size, 1 = edit. Where transparency must go, the image
is shown on white.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageDraw, ImageFont

from ip2p_jax import colour, metadata, storage
from ip2p_jax.defaults import MIN_SIDE
from ip2p_jax.errors import InputError
from ip2p_jax.image_errors import MAX_PIXELS, check_size, named

# No other formats: some run programs (EPS), and each one gives hostile files more code to attack.
READ_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF')
READ_EXTENSIONS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
WRITE_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP'}
WRITE_FORMATS |= {'.tif': 'TIFF', '.tiff': 'TIFF'}
CMYK_FORMATS = ('JPEG', 'TIFF')
ORIENTED = (b'Exif', b'tiff:Orientation')  # EXIF and XMP, which Pillow reads
PROFILE_MARK = b'ICC_PROFILE\0'  # of a JPEG's segments that hold one
T = Image.Transpose
UPRIGHT = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE)  # EXIF orientations 2-5
UPRIGHT += (T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)  # 6-8


def find_images(path: str | Path) -> list[Path]:
  """[path] for a file; for a folder the images directly in it, by name, without hidden ones."""
  if os.path.isfile(path):
    return [Path(path)]
  try:
    files = sorted(file for file in Path(path).iterdir() if not file.name.startswith('.'))
  except OSError as error:
    raise InputError(f'{path} cannot be read ({error.strerror}); check the name') from error
  result = [file for file in files if file.suffix.lower() in READ_EXTENSIONS and file.is_file()]
  if not result:
    raise InputError(f'the folder {path} holds no image ({" ".join(READ_EXTENSIONS)})')
  return result


def read(path: str | Path) -> Image.Image:
  """The image in a file, as `with_metadata` returns it; the first frame of several."""
  with _opened(path) as image:
    check_size(path, *image.size)
    # Pillow rotates a TIFF as it loads it, and drops the tag; PNG may hold EXIF behind its pixels.
    info = metadata.kept(image) if image.format == 'TIFF' else None
    result, problem = plain_and_problem(image)
    result.info |= metadata.kept(image) if info is None else info
  if 'icc_profile' not in result.info:
    with open(path, 'rb') as file:
      problem = problem or colour.cicp_problem(file.read(4096))
  if problem:  # outside `_opened`, which ignores warnings
    warnings.warn(f'{path}: {problem}', stacklevel=2)
  return result


def size_of(path: str | Path) -> tuple[int, int]:
  """(width, height) of the image that `read` returns; most often the file's header is enough."""
  with _opened(path) as image:
    check_size(path, *image.size)
    # PNG may hold EXIF behind its pixels.
    is_late = image.format == 'PNG' and 'exif' not in image.info
    if image.format == 'TIFF' or (is_late and b'eXIf' in Path(path).read_bytes()):
      return _upright(image).size
    is_turned = _orientation(image) in range(5, 9)
    return image.size[::-1] if is_turned else image.size


def decode_jpeg(encoded: bytes) -> np.ndarray | None:
  """A usual JPEG as uint8 [H, W, 3]: the same bytes as Pillow's, in two thirds of the time.

  None for all other files, which Pillow decodes or refuses: other formats, damaged files, CMYK,
  colours that are not sRGB, sizes out of range, and images that may need a rotation.
  """
  if not encoded.startswith(b'\xff\xd8') or any(mark in encoded for mark in ORIENTED):
    return None
  if PROFILE_MARK in encoded and not _says_srgb(encoded):
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    is_plain = colours in ('YCbCr', 'Gray') and min(width, height) >= MIN_SIDE
    return simplejpeg.decode_jpeg(encoded) if is_plain and width * height <= MAX_PIXELS else None
  except ValueError:
    return None


def decode(encoded: bytes, name: str) -> tuple[Image.Image, str]:
  """`plain_and_problem` of a file's bytes. Raises InputError, which begins with `name`."""
  if not encoded:
    raise InputError(f'{name} is missing')
  opened = lambda: io.BytesIO(encoded)
  with named(name, opened), Image.open(opened(), 'r', READ_FORMATS) as image:
    check_size(name, *image.size)
    return plain_and_problem(image)


def plain(image: Image.Image) -> Image.Image:
  """Any PIL image as a new upright image in its own colours, without other metadata.

  A profile that cannot be read is ignored. With a profile that has no inverse the result is sRGB.
  """
  return plain_and_problem(image)[0]


def plain_and_problem(image: Image.Image) -> tuple[Image.Image, str]:
  """`plain`, and the problem with the colours, or ''."""
  image.load()
  profile, problem = colour.own_profile(image)
  image = _upright(image)
  if image.mode[0] in 'IF':
    image = _eight_bits(image)
  if image.mode == 'CMYK' and profile:
    result = image.copy()
  else:
    result = image.convert('RGBA' if image.has_transparency_data else 'RGB')
  result.info = {'icc_profile': profile} if profile else {}
  if profile and not colour.has_way_back(profile):
    return colour.to_srgb(result), 'its colour profile has no inverse; the result will be in sRGB'
  return result, problem


def with_metadata(image: Image.Image) -> Image.Image:
  """`plain`, with the metadata that is kept; warns of a problem with the colours."""
  result, problem = plain_and_problem(image)
  result.info |= metadata.kept(image)
  if problem:
    warnings.warn(f'the image: {problem}', stacklevel=2)
  return result


def shown(image: Image.Image, background: str = 'white') -> Image.Image:
  """An image as RGB of sRGB, on a background colour where it is transparent."""
  return _on(colour.to_srgb(image), background)


def working_size(width: int, height: int, resolution: int, multiple: int = 8) -> tuple[int, int]:
  """The (width, height) to work at, in multiples of `multiple`; nothing is cropped.

  The longer side becomes `resolution`, the other keeps the aspect ratio. Both are rounded to the
  nearest multiple (halves up), at least one. Integers: floats can make a square lose a multiple.
  """
  if min(width, height, resolution, multiple) < 1:
    raise InputError(f'cannot work on {width}x{height} at resolution {resolution}; use 1 or more')
  long, short = max(width, height), min(width, height)
  long_units = max(1, (2 * resolution + multiple) // (2 * multiple))
  short_units = max(1, (2 * long_units * short + long) // (2 * long))
  sides = long_units * multiple, short_units * multiple
  return sides if width >= height else sides[::-1]


def to_array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
  """The image at `size` as sRGB, uint8 [h, w, 3], transparency on white.

  Compositing comes first. Both steps are linear, so this equals resizing premultiplied colours:
  colours under transparent pixels do not bleed.
  """
  return np.array(shown(image).resize(size, Image.Resampling.LANCZOS))


def restore(
  edited: np.ndarray, original: Image.Image, mask: np.ndarray | None = None
) -> Image.Image:
  """The edit, uint8 [h, w, 3], at the original's size, in its colours, with its transparency.

  With a mask, float32 [H, W] in [0, 1], pixels at 0 keep the original's bytes, and pixels at 1 are
  the edit's. Others are a mixture, rounded to the nearest value.
  """
  result = Image.fromarray(np.asarray(edited)).resize(original.size, Image.Resampling.LANCZOS)
  result = colour.from_srgb(result, original)
  if mask is not None:
    check_mask(mask, result.size)
    before, after = np.asarray(original.convert(result.mode)), np.asarray(result)
    blended = np.where((mask == 1)[..., None], after, before)
    soft = (mask > 0) & (mask < 1)  # the rest is exact without arithmetic
    share = mask[soft].astype(np.float64)[:, None]
    blended[soft] = np.floor(share * after[soft] + (1 - share) * before[soft] + 0.5)
    result = Image.frombytes(result.mode, result.size, blended.tobytes())
  if original.mode == 'RGBA':
    result.putalpha(original.getchannel('A'))
  result.info = dict(original.info)
  return result


def check_mask(mask: np.ndarray, size: tuple[int, int]) -> None:
  """Raises InputError for a mask, [H, W] in [0, 1], that does not fit an image of `size`."""
  if np.shape(mask) != size[::-1]:
    raise InputError(f'the mask has shape {list(np.shape(mask))}; the image needs'
                     f' {list(size[::-1])}')  # fmt: skip
  if not ((np.asarray(mask) >= 0) & (np.asarray(mask) <= 1)).all():
    raise InputError('the mask has values that are not from 0 to 1; 1 is edited, 0 is kept')


def read_mask(path: str | Path, size: tuple[int, int]) -> np.ndarray:
  """A mask file as float32 [H, W] in [0, 1] for an image of `size`; white = edit.

  Brightness in sRGB counts. Transparent is black, so white strokes on an empty layer work. A mask
  of equal size keeps its values. A mask of the same shape, up to one pixel, is scaled bilinearly.
  """
  return as_mask(read(path), size, path)


def as_mask(image: Image.Image, size: tuple[int, int], path: str | Path) -> np.ndarray:
  """`read_mask` of an image that is read; `path` is for messages."""
  mask, (width, height) = shown(image, 'black').convert('L'), size
  if abs(mask.width * height - mask.height * width) > max(*mask.size, *size):
    sizes = f'{mask.width}x{mask.height} and the image {width}x{height}'
    raise InputError(f'the mask {path} is {sizes}; give both the same shape')
  mask = mask.resize(size, Image.Resampling.BILINEAR)
  if not mask.getextrema()[1]:  # after scaling, which may lose a speck of a larger mask
    raise InputError(f'the mask {path} is all black, so nothing would be edited; paint it white')
  return np.asarray(mask, np.float32) / np.float32(255)


def for_file(image: Image.Image, path: str | Path) -> Image.Image:
  """The image in colours that this kind of file can hold: CMYK becomes sRGB for PNG and WebP."""
  is_cmyk = image.mode == 'CMYK' and _format(path) not in CMYK_FORMATS
  return colour.to_srgb(image) if is_cmyk else image


def save(image: Image.Image, path: str | Path, settings: dict) -> None:
  """Writes PNG, JPEG, TIFF or WebP by the extension, with the settings (JSON values) in the file.

  It also writes profile, EXIF and dpi of the image's `info`. The file appears whole or not at all.
  JPEG has no transparency and gets a white background.
  """
  format, image = _format(path), for_file(image, path)
  options = metadata.options(image.info, settings, format)
  if format == 'JPEG' and image.mode != 'CMYK':
    image = _on(image, 'white')
  if format != 'TIFF':
    options |= {'quality': 95, 'subsampling': '4:4:4'}
  with _writing(path) as temporary:
    with open(temporary, 'xb') as file:
      image.save(file, format, **options)
    os.replace(temporary, path)


def read_settings(path: str | Path) -> dict | None:
  """The settings that `save` wrote; None if there are none."""
  with _opened(path) as image:
    return metadata.settings_of(image)


def check_writable(path: str | Path) -> None:
  """Raises InputError now if `save` to this path would fail later; makes missing folders."""
  _format(path)
  with _writing(path) as temporary:  # permissions are not enough: a disk can be read-only
    if os.path.isdir(path):
      raise IsADirectoryError('it is a folder')
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch(exist_ok=False)
    with contextlib.suppress(FileNotFoundError):
      os.lstat(path)  # a name that is too long fails here


def image_grid(
  rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], title: str = ''
) -> Image.Image:
  """One labelled image of a sweep, sRGB, on white; a text that is too long ends in '…'."""
  cells = [shown(cell) for row in rows for cell in row]
  width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
  em = min(max(min(width, height) // 14, 13), 36)
  font, title_font = ImageFont.load_default(em), ImageFont.load_default(em * 5 // 4)
  gap = em // 3
  column = max(width, min(int(max(map(font.getlength, column_labels))) + 1, 12 * em))
  left = em + min(int(max(map(font.getlength, row_labels))) + 1, 16 * em) + em // 2
  total = left + len(column_labels) * (column + gap) - gap + em
  lines = _wrap(title or '', title_font, total - 2 * em, 3)
  top = em + len(lines) * em * 7 // 4 + (em * 2 if lines else em * 3 // 2)
  sheet = Image.new('RGB', (total, top + len(rows) * (height + gap) - gap + em), 'white')
  draw = ImageDraw.Draw(sheet)
  for i, line in enumerate(lines):
    draw.text((em, em + i * em * 7 // 4), line, 'black', title_font, 'la')
  xs = [left + j * (column + gap) + column // 2 for j in range(len(column_labels))]
  ys = [top + i * (height + gap) + height // 2 for i in range(len(rows))]
  for x, text in zip(xs, column_labels, strict=True):
    draw.text((x, top - em // 2), _cut(text, font, column), 'black', font, 'ms')
  for y, text in zip(ys, row_labels, strict=True):
    draw.text((left - em // 2, y), _cut(text, font, left - em * 3 // 2), 'black', font, 'rm')
  for (x, y), cell in zip([(x, y) for y in ys for x in xs], cells, strict=True):
    sheet.paste(cell, (x - cell.width // 2, y - cell.height // 2))
  return sheet


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
  """Opens an image without reading its pixels; errors become InputError."""
  if not os.path.isfile(path):
    problem = 'is a folder' if os.path.isdir(path) else 'was not found'
    raise InputError(f'{path} {problem}; give an image file')
  with (
    named(path, lambda: open(path, 'rb')),
    warnings.catch_warnings(action='ignore'),
    Image.open(path, 'r', READ_FORMATS) as image,
  ):
    yield image


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[Path]:
  """A temporary name in the folder of `path`, deleted at the end; errors become InputError."""
  try:
    # A short name: only the name of `path` may be too long.
    with storage.temporary_name(Path(path).with_name('ip2p')) as temporary:
      yield temporary
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise InputError(f'{path} cannot be written ({reason}); choose another place') from error


def _format(path):
  extension = Path(path).suffix.lower()
  if extension not in WRITE_FORMATS:
    raise InputError(f'the name {path} must end in one of {" ".join(WRITE_FORMATS)}')
  return WRITE_FORMATS[extension]


def _says_srgb(encoded):
  """Whether a JPEG is in sRGB, by its header alone."""
  try:
    with Image.open(io.BytesIO(encoded), 'r', ['JPEG']) as image:
      profile = image.info.get('icc_profile')
      return profile is None or colour.is_srgb(profile)
  except Exception:  # decoders raise many kinds
    return False


def _upright(image):
  # ImageOps.exif_transpose also rewrites the metadata, and fails on files of some cameras.
  image.load()
  orientation = _orientation(image)
  return image.transpose(UPRIGHT[orientation - 2]) if orientation in range(2, 9) else image


def _orientation(image):
  with contextlib.suppress(Exception):  # unreadable metadata is no reason to refuse the image
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's `getexif` loads pixels


def _eight_bits(image):
  """Greyscale of 16 or 32 bits as mode L, rounded to the nearest value.

  The scale is 0..65535 for integers. For floats it is the first of 0..1, 0..255, 0..65535 that
  holds all values. If none does (32-bit integers, negative values), it is smallest..largest.
  """
  values = np.asarray(image).astype(np.float32)
  if not np.isfinite(values).all():
    raise ValueError('it holds values that are not finite')
  low, high = values.min(), values.max()
  scales = (1, 255, 65535) if image.mode == 'F' else (65535,)
  fitting = [scale for scale in scales if low >= 0 and high <= scale]
  low, high = (0, fitting[0]) if fitting else (low, high)
  return Image.fromarray(((values - low) * (255 / ((high - low) or 1)) + 0.5).astype(np.uint8))


def _on(image, background):
  """The image as RGB, shown on a background colour."""
  if not image.has_transparency_data:
    return image.convert('RGB')
  image = image.convert('RGBA')
  return Image.alpha_composite(Image.new('RGBA', image.size, background), image).convert('RGB')


def _wrap(text, font, width, limit):
  """At most `limit` lines of words, none wider than `width` pixels; '…' marks text that is cut."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and font.getlength(longer) > width:
      lines.append(word)
    else:
      lines[-1] = longer
  if len(lines) > limit:
    lines[limit - 1] += '…'
  return [_cut(line, font, width) for line in lines[:limit] if line]


def _cut(line, font, width):
  line = line[: int(width) + 1]  # a character is at least one pixel wide
  while len(line) > 1 and font.getlength(line) > width:
    line = line[:-2] + '…'
  return line
