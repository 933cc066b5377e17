"""Images with colour profiles: models see sRGB, and results have the profile of their image."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import profiles
import pytest
import tiny_pairs
from PIL import ExifTags, Image, ImageCms

from ip2p_jax import Editor, bundled, images
from ip2p_jax.data import check, examples, pack
from ip2p_jax.data.examples import Framing
from ip2p_jax.data.rows import Pair, Row
from ip2p_jax.editing.image_files import plan_jobs, run_jobs

B, IFD = ExifTags.Base, ExifTags.IFD
LOSSLESS = ('png', 'tif')
BPC = ImageCms.Flags.BLACKPOINTCOMPENSATION
SWOP = Path('/usr/share/color/icc/ghostscript/default_cmyk.icc')


@pytest.fixture
def photo():
  """RGB of sRGB, 64 x 48, smooth, of many colours."""
  y, x = np.mgrid[:48, :64] / 63
  colours = np.stack([0.1 + 0.8 * x, 0.9 - y, 0.5 + 0.4 * np.sin(7 * x + 5 * y)], -1)
  return Image.fromarray(np.uint8(255 * colours))


@pytest.fixture
def half():
  """A mask: the upper half is edited."""
  mask = np.zeros((48, 64), np.float32)
  mask[:24] = 1
  return mask


def pixels(image):
  return np.asarray(image).astype(int)


def opened(path):
  """The image as Pillow opens it; the file is closed."""
  with Image.open(path) as image:
    image.load()
  return image


def difference(a, b):
  """The mean absolute difference, in levels of 255."""
  return np.abs(pixels(a) - pixels(b)).mean()


def write(image, path, **options):
  """Writes a file as other software does."""
  extra = {'lossless': True} if path.suffix == '.webp' else {'subsampling': 0, 'quality': 98}
  extra = {} if path.suffix in ('.png', '.tif') else extra
  image.save(path, icc_profile=image.info.get('icc_profile'), **extra, **options)
  return path


def negative(array):
  """An edit that changes every colour much."""
  return 255 - array


# The model sees sRGB.


@pytest.mark.parametrize('name', [*profiles.WIDE, 'CMYK'])
@pytest.mark.parametrize('extension', ['png', 'jpg', 'tif', 'webp'])
def test_an_image_is_converted_by_its_profile(tmp_path, photo, name, extension):
  if name == 'CMYK' and extension in ('png', 'webp'):
    return  # these formats have no CMYK
  own = profiles.tagged(photo, name)
  path = write(own, tmp_path / f'in.{extension}')
  seen = images.to_array(images.read(path), photo.size)
  assert difference(own.convert('RGB'), photo) > 5  # without the profile
  assert difference(seen, photo) < (1.5 if extension == 'jpg' else 0.8)
  assert difference(tiny_pairs.decoded(path.read_bytes(), 48, 'squash'),
                    photo.resize((48, 48), Image.Resampling.LANCZOS)) < 1.5  # fmt: skip


@pytest.mark.parametrize('mode', ['L', 'LA', 'I;16'])
def test_grey_images_are_converted_by_profile_and_stay_equal(tmp_path, mode, half):
  values = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (48, 1))
  grey = Image.fromarray(values)
  seen = pixels(profiles.converted(grey, profiles.ALL['grey'], None, 'RGB'))
  own = {'L': grey, 'LA': Image.merge('LA', [grey, grey])}.get(mode)
  own = own or Image.fromarray(values.astype(np.uint16) * 257)
  own.info = {'icc_profile': profiles.ALL['grey']}
  original = images.read(write(own, tmp_path / 'grey.png'))
  assert (pixels(original)[..., 0] == values).all()
  assert (pixels(original)[..., 3:] == values[..., None]).all()
  array = images.to_array(original.convert('RGB'), original.size)
  assert np.abs(array - seen).max() <= 1
  result = images.restore(negative(array), original, half)
  images.save(result, tmp_path / 'out.png', {})
  written = opened(tmp_path / 'out.png')
  assert (pixels(written)[24:, :, :3] == values[24:, :, None]).all()
  shown = pixels(profiles.as_seen(written.convert('RGB')))
  assert np.abs(shown[24:] - seen[24:]).max() <= 1
  assert difference(shown[:24], 255 - seen[:24]) < 1


def test_a_palette_is_converted_by_its_profile(tmp_path, photo):
  own = profiles.tagged(photo, 'Adobe RGB')
  palette = own.quantize(256)
  palette.info = dict(own.info)
  write(palette, tmp_path / 'in.png')
  expected = profiles.converted(palette.convert('RGB'), own.info['icc_profile'], None, 'RGB')
  assert difference(images.to_array(images.read(tmp_path / 'in.png'), photo.size), expected) == 0


def png_of_16_bits(values, path, profile):
  """[h, w, 1 to 4] as grey, grey and alpha, RGB or RGBA; Pillow writes none of the last three."""
  height, width, channels = values.shape
  header = struct.pack('>2I5B', width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
  lines = b''.join(b'\0' + line.astype('>u2').tobytes() for line in values)
  parts = {b'IHDR': header, b'iCCP': b'own\0\0' + zlib.compress(profile)}
  parts |= {b'IDAT': zlib.compress(lines), b'IEND': b''}
  chunk = lambda n, d: struct.pack('>I', len(d)) + n + d + struct.pack('>I', zlib.crc32(n + d))
  path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts.items()))
  return path


SOURCES = ('palette', 'palette of greys', '16-bit grey', '16-bit grey and alpha', '16-bit RGB')
SOURCES += ('16-bit RGBA', 'rotated JPEG')


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.filterwarnings('error')
def test_unusual_files_are_edited_by_profile_and_kept_by_masks(tmp_path, photo, half, source):
  path, alpha = tmp_path / 'in.png', None
  name = 'grey' if 'grey' in source else 'ProPhoto'
  own = profiles.tagged(photo.convert('L').convert('RGB') if name == 'grey' else photo, name)
  if source.startswith('16'):
    values = pixels(own).reshape(48, 64, -1) * 257
    if 'alpha' in source or 'RGBA' in source:
      alpha = np.broadcast_to(np.arange(64) * 4, (48, 64))
      values = np.concatenate([values, alpha[..., None] * 257], -1)
    png_of_16_bits(values, path, own.info['icc_profile'])
  elif source == 'rotated JPEG':
    path, exif = tmp_path / 'in.jpg', Image.Exif()
    exif[B.Orientation] = 6
    turned = own.transpose(Image.Transpose.ROTATE_90)
    turned.info = own.info
    write(turned, path, exif=exif)
  else:
    palette = own.convert('P') if name == 'grey' else own.quantize(255)
    photo = profiles.converted(palette.convert(own.mode), own.info['icc_profile'], None, 'RGB')
    indices = pixels(palette)
    clear = bytes(0 if index == indices[0, 0] else 255 for index in range(256))
    alpha = np.where(indices == indices[0, 0], 0, 255)
    palette.save(path, icc_profile=own.info['icc_profile'], transparency=clear)
  original = images.read(path)
  truth = pixels(photo.convert('L').convert('RGB') if name == 'grey' else photo)
  assert original.size == (64, 48)
  result = images.restore(negative(truth).astype(np.uint8), original, half)
  images.save(result, tmp_path / 'o.tif', {})
  written = opened(tmp_path / 'o.tif')
  assert written.getexif().get(B.Orientation, 1) == 1
  assert alpha is None or (pixels(written)[..., 3] == alpha).all()
  assert (pixels(written)[24:] == pixels(original)[24:]).all()
  seen = written.convert('RGB')
  seen.info = {'icc_profile': written.info['icc_profile']}
  seen = pixels(profiles.as_seen(seen))
  assert difference(seen[:24], negative(truth)[:24]) < 1.5
  assert difference(seen[24:], truth[24:]) < 1.5


def test_lab_needs_no_profile(tmp_path, photo):
  lab = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
  own = profiles.converted(photo, None, lab, 'LAB')
  own.save(tmp_path / 'lab.tif', icc_profile=lab)
  assert difference(images.read(tmp_path / 'lab.tif'), photo) < 2


def test_transparency_is_not_converted(tmp_path, photo):
  own = profiles.tagged(photo, 'ProPhoto').convert('RGBA')
  alpha = Image.linear_gradient('L').resize(photo.size)
  own.putalpha(alpha)
  own.info = {'icc_profile': profiles.ALL['ProPhoto']}
  original = images.read(write(own, tmp_path / 'in.png'))
  on_white = Image.composite(photo, Image.new('RGB', photo.size, 'white'), alpha)
  array = images.to_array(original, photo.size)
  assert difference(array, on_white) < 1
  result = images.restore(array, original)
  assert result.getchannel('A').tobytes() == alpha.tobytes()
  images.save(result, tmp_path / 'out.tif', {})
  assert images.read(tmp_path / 'out.tif').tobytes() == result.tobytes()
  images.save(result, tmp_path / 'out.jpg', {})
  assert profiles.as_seen(opened(tmp_path / 'out.jpg')).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('profile', [None, 'sRGB'])
def test_srgb_profiles_are_not_converted(tmp_path, photo, profile):
  variants = {'lcms': ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()}
  for content in (profiles.ALL['sRGB'], variants['lcms']) if profile else (None,):
    photo.info = {'icc_profile': content} if content else {}
    original = images.read(write(photo, tmp_path / 'in.png'))
    assert original.info == photo.info
    array = images.to_array(original, (32, 24))
    assert (array == np.asarray(photo.resize((32, 24), Image.Resampling.LANCZOS))).all()
    result = images.restore(array, original)
    expected = Image.fromarray(array).resize(photo.size, Image.Resampling.LANCZOS)
    assert result.tobytes() == expected.tobytes() and result.info == photo.info


# The result has the colours of its image.


@pytest.mark.parametrize('name', profiles.WIDE)
@pytest.mark.parametrize('extension', ['png', 'jpg', 'tif', 'webp'])
def test_a_result_keeps_the_profile_and_the_edited_colours(tmp_path, photo, half, name, extension):
  own = profiles.tagged(photo, name)
  original = images.read(write(own, tmp_path / 'in.png'))
  edited = negative(images.to_array(original, photo.size))
  images.save(images.restore(edited, original, half), tmp_path / f'out.{extension}', {'seed': 1})
  written = opened(tmp_path / f'out.{extension}')
  assert written.info['icc_profile'] == profiles.ALL[name]
  shown = pixels(profiles.as_seen(written))
  close = 3.5 if extension == 'webp' else 2  # WebP alone loses 2.1
  assert difference(shown[:24], edited[:24]) < close
  assert difference(shown[24:], pixels(photo)[24:]) < close
  if extension in LOSSLESS:
    assert (pixels(written)[24:] == pixels(own)[24:]).all()
    assert images.read_settings(tmp_path / f'out.{extension}') == {'seed': 1}


@pytest.mark.parametrize(
  ('extension', 'mode'), [('tif', 'CMYK'), ('jpg', 'CMYK'), ('png', 'RGB'), ('webp', 'RGB')]
)
def test_cmyk_stays_if_the_format_has_it_or_becomes_srgb(tmp_path, photo, half, extension, mode):
  own, path = profiles.tagged(photo, 'CMYK'), tmp_path / f'out.{extension}'
  original = images.read(write(own, tmp_path / 'in.tif'))
  assert original.mode == 'CMYK' and original.tobytes() == own.tobytes()
  original = images.for_file(original, path)
  edited = negative(images.to_array(original, photo.size))
  images.save(images.restore(edited, original, half), path, {})
  written = opened(path)
  assert written.mode == mode
  assert written.info.get('icc_profile') == (profiles.ALL['CMYK'] if mode == 'CMYK' else None)
  shown = pixels(profiles.as_seen(written))
  close = 3 if extension == 'webp' else 2
  assert difference(shown[:24], edited[:24]) < close
  assert difference(shown[24:], pixels(photo)[24:]) < close
  if extension == 'tif':
    assert (pixels(written)[24:] == pixels(own)[24:]).all()
  images.save(images.read(tmp_path / 'in.tif'), path, {})  # without `for_file`
  assert difference(profiles.as_seen(opened(path)), photo) < 2


@pytest.fixture(params=['made', 'SWOP'], scope='module')
def press(request):
  """A profile of inks with fewer colours than sRGB: one made here, and one of libgs-common."""
  if request.param == 'made':
    return profiles.offset()
  if not SWOP.exists():
    pytest.skip(f'{SWOP} is not installed')
  return SWOP.read_bytes()


def test_cmyk_results_are_as_close_as_the_inks_allow(tmp_path, photo, press):
  original = profiles.converted(photo, None, press, 'CMYK')
  original.info = {'icc_profile': press}
  original = images.plain(original)
  printable = images.shown(original)
  best = {}
  for name, edited in {
    'printable': printable,
    'sRGB': Image.fromarray(negative(np.asarray(photo))),
  }.items():
    ways = [(intent, flags) for intent in ImageCms.Intent for flags in (0, BPC)]
    ways = [profiles.converted(edited, None, press, 'CMYK', *way) for way in ways]
    ways = [difference(profiles.converted(way, press, None, 'RGB'), edited) for way in ways]
    best[name] = min(ways)
    for extension, loss in (('tif', 0.1), ('jpg', 0.3)):
      path = tmp_path / f'out.{extension}'
      images.save(images.restore(np.asarray(edited), original), path, {})
      written = opened(path)
      assert written.mode == 'CMYK' and written.info['icc_profile'] == press
      assert difference(profiles.as_seen(written), edited) < best[name] + loss, (name, extension)
    assert max(ways) > best[name] + 4  # other ways are much worse
  assert best['printable'] < 1.5 and best['sRGB'] > 5


def test_a_soft_mask_mixes_in_the_profile_of_the_image(photo):
  original = images.plain(profiles.tagged(photo, 'CMYK'))
  edited = negative(images.to_array(original, photo.size))
  full = pixels(images.restore(edited, original))
  mixed = pixels(images.restore(edited, original, np.full((48, 64), 0.5, np.float32)))
  assert np.abs(mixed - (full + pixels(original)) / 2).max() <= 0.5


def test_an_image_with_a_one_way_profile_becomes_srgb(tmp_path, photo):
  photo.info = {'icc_profile': profiles.scanner()}
  write(photo, tmp_path / 'scan.png')
  with pytest.warns(UserWarning, match=r'scan\.png: its colour profile has no inverse.*sRGB'):
    original = images.read(tmp_path / 'scan.png')
  assert original.info == {}
  assert difference(original, profiles.as_seen(photo)) == 0
  assert difference(photo, original) > 5


# One warning names a problem with the colours.


BROKEN = {
  'no profile at all': ('RGB', b'garbage'),
  'a profile cut short': ('RGB', profiles.ALL['Adobe RGB'][:200]),
  'a profile in ruins': ('RGB', profiles.ALL['Adobe RGB'][:300].ljust(6624, b'\xff')),
  'a profile of CMYK': ('RGB', profiles.ALL['CMYK']),
  'a profile of grey': ('RGB', profiles.ALL['grey']),
  'a profile of RGB': ('CMYK', profiles.ALL['Adobe RGB']),
}


@pytest.mark.parametrize('what', BROKEN)
def test_an_unreadable_profile_gives_one_warning_with_the_file_name(tmp_path, photo, what):
  mode, profile = BROKEN[what]
  own = photo.convert(mode)
  own.info = {'icc_profile': profile}
  write(own, tmp_path / 'odd.tif')
  with warnings.catch_warnings(record=True, action='always') as caught:
    original = images.read(tmp_path / 'odd.tif')
  (warning,) = caught
  assert str(warning.message).startswith(f'{tmp_path}/odd.tif: its colour profile ')
  assert str(warning.message).endswith('its colours are taken as sRGB')
  assert original.info == {} and original.tobytes() == own.convert('RGB').tobytes()
  with pytest.warns(UserWarning, match='the image: its colour profile'):
    images.with_metadata(own)
  encoded = (tmp_path / 'odd.tif').read_bytes()  # for data sets, `ip2p check` warns
  expected = own.convert('RGB').resize((48, 48), Image.Resampling.LANCZOS)
  assert difference(tiny_pairs.decoded(encoded, 48, 'squash'), expected) == 0
  row = Row('row 3', ('go',), (Pair(encoded, encoded),), False)
  report = check._check_images(row, type('Tokenizer', (), {'cut_off': lambda self, text: ''})())
  assert sum('image: its colour profile' in text for _, text in report.warnings) == 2


def test_adobe_rgb_in_exif_is_read_and_becomes_a_profile(tmp_path, photo):
  own = Image.fromarray(np.asarray(profiles.tagged(photo, 'Adobe RGB')))
  exif = Image.Exif()
  exif[B.Make] = 'Camera'
  exif.get_ifd(IFD.Exif)[B.ColorSpace] = 65535
  exif.get_ifd(IFD.Exif)[B.ExifInteroperabilityOffset] = {1: 'R03', 2: b'0100'}
  own.save(tmp_path / 'camera.jpg', quality=98, subsampling=0, exif=exif.tobytes())
  original = images.read(tmp_path / 'camera.jpg')
  assert difference(images.to_array(original, photo.size), photo) < 1.5
  assert difference(original, photo) > 5
  images.save(original, tmp_path / 'out.png', {})
  assert difference(profiles.as_seen(opened(tmp_path / 'out.png')), photo) < 1.5
  exif.get_ifd(IFD.Exif)[B.ColorSpace] = 1  # sRGB; then R03 does not count
  own.save(tmp_path / 'camera.jpg', exif=exif.tobytes())
  assert 'icc_profile' not in images.read(tmp_path / 'camera.jpg').info


def png_with(photo, path, **chunks):
  """A PNG with these chunks before its pixels."""
  file = io.BytesIO()
  photo.save(file, 'PNG')
  content = file.getvalue()
  extra = b''
  for name, data in chunks.items():
    body = name.encode() + data
    extra += struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))
  path.write_bytes(content[:33] + extra + content[33:])
  return path


P3_CHRM = struct.pack('>8I', 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_CHRM = struct.pack('>8I', 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
  ('chunks', 'named'),
  [
    ({'gAMA': struct.pack('>I', 45455), 'cHRM': SRGB_CHRM}, None),
    ({'gAMA': struct.pack('>I', 100000), 'sRGB': b'\0'}, None),
    ({'cICP': b'\x01\x0d\0\x01'}, None),
    ({'gAMA': struct.pack('>I', 100000)}, 'gAMA'),
    ({'cHRM': P3_CHRM}, 'cHRM'),
    ({'cICP': b'\x0c\x0d\0\x01'}, 'cICP'),
  ],
  ids=str,
)
def test_colour_chunks_of_png_are_ignored_with_a_warning(tmp_path, photo, chunks, named):
  path = png_with(photo, tmp_path / 'chunks.png', **chunks)
  with warnings.catch_warnings(record=True, action='always') as caught:
    original = images.read(path)
  assert difference(original, photo) == 0 and original.info == {}
  assert len(caught) == (named is not None)
  messages = [str(warning.message) for warning in caught]
  assert all('chunks.png' in message and named in message for message in messages)


# Other readers of images.


def test_only_srgb_jpegs_use_the_fast_decoder(photo):
  encode = lambda name: jpeg(profiles.tagged(photo, name))
  assert images.decode_jpeg(encode('sRGB')) is not None
  for name in (*profiles.WIDE, 'grey', 'CMYK'):
    assert images.decode_jpeg(encode(name)) is None, name


def jpeg(image):
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=98, subsampling=0, icc_profile=image.info['icc_profile'])
  return file.getvalue()


@pytest.mark.parametrize('quality', [None, 95])
def test_packed_images_are_srgb_or_keep_their_profile(photo, quality):
  large = photo.resize((160, 120), Image.Resampling.BICUBIC)
  encoded = jpeg(profiles.tagged(large, 'ProPhoto'))
  shrunk = pack.smaller(encoded, 32, quality)
  assert 'icc_profile' not in Image.open(io.BytesIO(shrunk)).info
  for file in (shrunk, pack.smaller(encoded, 120, quality)):  # the second is unchanged
    expected = large.resize((32, 32), Image.Resampling.LANCZOS)
    assert difference(tiny_pairs.decoded(file, 32, 'squash'), expected) < 2


def test_both_images_of_a_pair_become_srgb(photo):
  files = jpeg(profiles.tagged(photo, 'sRGB')), jpeg(profiles.tagged(photo, 'CMYK'))
  framing = Framing(48, resize='squash')
  row = Row('row', ('keep it',), (Pair(*files),), False)
  example = examples.example(row, None, framing, lambda texts: np.zeros((1, 1), np.int32))
  assert difference(example['input_image'], example['edited_image']) < 1.5


def test_a_mask_counts_by_its_brightness_in_srgb(tmp_path):
  grey = Image.new('L', (8, 8), 100)
  grey.info = {'icc_profile': profiles.ALL['grey']}
  write(grey, tmp_path / 'mask.png')
  seen = profiles.converted(grey, profiles.ALL['grey'], None, 'RGB').getpixel((0, 0))[0]
  mask = images.read_mask(tmp_path / 'mask.png', (8, 8))
  assert abs(mask[0, 0] * 255 - seen) <= 1 and seen > 110


def test_a_grid_shows_every_image_by_its_profile(photo):
  rows = [[images.plain(profiles.tagged(photo, name)) for name in (*profiles.WIDE, 'CMYK')]]
  sheet = images.image_grid(rows, [''], [''] * 4)
  plain = images.image_grid([[photo] * 4], [''], [''] * 4)
  assert sheet.size == plain.size and difference(sheet, plain) < 0.5


# EXIF and resolution.


def exif_of_a_camera():
  exif = Image.Exif()
  exif[B.Make], exif[B.Orientation], exif[B.Copyright] = 'Camera', 6, 'someone'
  exif.get_ifd(IFD.Exif).update({
    B.DateTimeOriginal: '2026:01:02 03:04:05', B.ISOSpeedRatings: 200, B.MakerNote: b'\1' * 400,
    B.ExifImageWidth: 64, B.UserComment: b'ASCII\0\0\0hello',
  })  # fmt: skip
  exif.get_ifd(IFD.GPSInfo).update({1: 'N', 2: (48.0, 51.0, 30.0)})
  return exif.tobytes()


@pytest.mark.parametrize('source', ['jpg', 'png', 'tif', 'webp'])
@pytest.mark.parametrize('target', ['jpg', 'png', 'tif', 'webp'])
def test_exif_and_dpi_are_kept_except_the_orientation(tmp_path, photo, source, target):
  exif = Image.Exif()
  exif.load(exif_of_a_camera())
  exif[B.XResolution], exif[B.YResolution], exif[B.ResolutionUnit] = 300, 150, 2
  photo.save(tmp_path / f'in.{source}', exif=exif.tobytes(), dpi=(300, 150))
  original = images.read(tmp_path / f'in.{source}')
  assert original.size == (48, 64)
  result = images.restore(images.to_array(original, (48, 64)), original)
  images.save(result, tmp_path / f'out.{target}', {'seed': 1})
  with Image.open(tmp_path / f'out.{target}') as written:
    tags = written.getexif()
    camera, place = tags.get_ifd(IFD.Exif), tags.get_ifd(IFD.GPSInfo)
    assert (tags[B.Make], tags[B.Copyright]) == ('Camera', 'someone')
    assert tags.get(B.Orientation, 1) == 1
    assert (camera[B.DateTimeOriginal], camera[B.ISOSpeedRatings]) == ('2026:01:02 03:04:05', 200)
    assert place[1] == 'N' and [float(part) for part in place[2]] == [48, 51, 30]
    assert not {B.MakerNote, B.ExifImageWidth} & set(camera)
  again = images.read(tmp_path / f'out.{target}')
  assert again.size == (48, 64)
  assert np.round(again.info['dpi']).tolist() == [150, 300]  # rotated with the image
  assert images.read_settings(tmp_path / f'out.{target}') == {'seed': 1}


def test_a_file_without_exif_or_dpi_gets_none(tmp_path, photo):
  for extension in ('jpg', 'png', 'tif', 'webp', 'bmp', 'gif'):
    photo.save(tmp_path / f'in.{extension}')
    read = images.read(tmp_path / f'in.{extension}').info
    assert read == ({'dpi': read['dpi']} if extension == 'bmp' else {})  # a BMP always has dpi
    images.save(photo, tmp_path / 'out.jpg', {})
    assert images.read(tmp_path / 'out.jpg').info == {}


def test_damaged_or_too_long_exif_is_dropped(tmp_path, photo):
  photo.save(tmp_path / 'ruins.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x0f')
  assert images.read(tmp_path / 'ruins.jpg').info.get('exif') is None
  exif = Image.Exif()
  exif[B.ImageDescription] = 'x' * 65000
  original = photo.copy()
  original.info = {'exif': exif.tobytes()}
  images.save(original, tmp_path / 'long.jpg', {'instruction': 'x' * 1000})
  assert images.read_settings(tmp_path / 'long.jpg') == {'instruction': 'x' * 1000}
  original.info = {'exif': b'Exif\0\0garbage'}
  images.save(original, tmp_path / 'out.jpg', {'seed': 1})
  assert images.read_settings(tmp_path / 'out.jpg') == {'seed': 1}


@pytest.mark.parametrize('brand', [b'heic', b'avif', b'mif1'])
def test_heic_is_refused_with_advice(tmp_path, brand):
  (tmp_path / 'phone.heic').write_bytes(struct.pack('>I', 24) + b'ftyp' + brand + bytes(100))
  with pytest.raises(images.InputError, match=r'phone\.heic is HEIC or AVIF; convert it to JPEG'):
    images.read(tmp_path / 'phone.heic')


# A real edit.


@pytest.mark.long
def test_edits_are_the_same_in_all_colour_profiles(tmp_path):
  import world

  example = world.example(11, 'test')
  scene = Image.fromarray(world.picture(example.scene))
  mask = Image.new('L', scene.size)
  mask.paste(255, (0, 0, 64, 32))
  mask.save(tmp_path / 'mask.png')
  scene.save(tmp_path / 'plain.png')
  formats = {name: '.tif' if name == 'CMYK' else '.png' for name in profiles.ALL if name != 'grey'}
  files = {name: tmp_path / f'{name}{formats[name]}' for name in formats}
  for name, file in files.items():
    write(profiles.tagged(scene, name), file)
  editor = Editor.load(dtype='float32')
  results = {}
  for name, file in ({'plain': tmp_path / 'plain.png'} | files).items():
    jobs = plan_jobs(
      file, tmp_path / f'out-{name}{file.suffix}',
      [(bundled.TEXT_GUIDANCE, bundled.IMAGE_GUIDANCE)],
      seed=0, index=0, num=1, mask=tmp_path / 'mask.png', is_grid=False,
    )  # fmt: skip
    options = {'steps': 8, 'sampler': bundled.SAMPLER}
    ((job, result),) = run_jobs(
      editor, jobs, example.instruction, resolution=64, batch_size=1,
      mask=tmp_path / 'mask.png', options=options,
    )  # fmt: skip
    images.save(result, job.output, {})
    results[name] = opened(job.output)
  assert difference(results['plain'], scene) > 1  # it is an edit
  assert difference(results['sRGB'], results['plain']) == 0
  for name, file in files.items():
    assert difference(profiles.as_seen(results[name]), results['plain']) < 2, name
    assert results[name].mode == opened(file).mode
    assert (pixels(results[name])[32:] == pixels(opened(file))[32:]).all(), name
    assert results[name].info['icc_profile'] == profiles.ALL[name]
