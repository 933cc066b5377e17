import errno
import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageFont, ImageOps

from ip2p_jax import images
from ip2p_jax.errors import InputError

ORIENTATION, USER_COMMENT, EXIF_IFD = 0x0112, 0x9286, 0x8769


def noise_image(rng, width=24, height=16, channels=3):
  return Image.fromarray(rng.integers(0, 256, (height, width, channels), np.uint8))


def encoded(image, format='JPEG', **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def png_header(width, height, color=2):
  """A PNG of a claimed size with no pixels in it."""
  data = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, color, 0, 0, 0)
  crc = struct.pack('>I', zlib.crc32(data))
  return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + data + crc + b'\0\0\0\0IDAT'


# Finding


def test_a_folder_gives_its_images_sorted_by_name(tmp_path):
  for name in ('b.PNG', 'a.jpeg', 'c.tiff', 'd.Webp', '.hidden.png', 'notes.txt', 'e.gif.part'):
    (tmp_path / name).touch()
  (tmp_path / 'folder.png').mkdir()
  names = [path.name for path in images.find_images(tmp_path)]
  assert names == ['a.jpeg', 'b.PNG', 'c.tiff', 'd.Webp']


def test_any_file_name_is_returned_as_it_is(tmp_path):
  (tmp_path / 'photo').touch()
  assert images.find_images(str(tmp_path / 'photo')) == [tmp_path / 'photo']


def test_nothing_to_find_is_refused(tmp_path):
  with pytest.raises(InputError, match='absent cannot be read'):
    images.find_images(tmp_path / 'absent')
  with pytest.raises(InputError, match='holds no image'):
    images.find_images(tmp_path)


# Reading


@pytest.mark.parametrize(
  ('mode', 'colour', 'extension', 'expected'),
  [
    ('RGB', (1, 2, 3), 'png', (1, 2, 3)),
    ('RGBA', (1, 2, 3, 4), 'png', (1, 2, 3, 4)),
    ('RGBA', (1, 2, 3, 255), 'png', (1, 2, 3, 255)),
    ('L', 7, 'png', (7, 7, 7)),
    ('LA', (7, 8), 'png', (7, 7, 7, 8)),
    ('1', 1, 'png', (255, 255, 255)),
    ('1', 0, 'bmp', (0, 0, 0)),
    ('CMYK', (0, 255, 255, 0), 'tif', (255, 0, 0)),
    ('CMYK', (0, 255, 255, 0), 'jpg', (255, 0, 0)),  # stored inverted
    ('I;16', 65535, 'png', (255, 255, 255)),
  ],
)
def test_every_mode_becomes_rgb_or_rgba(tmp_path, mode, colour, extension, expected):
  path = tmp_path / f'image.{extension}'
  Image.new(mode, (8, 8), colour).save(path)
  image = images.read(path)
  assert image.mode == ('RGBA' if len(expected) == 4 else 'RGB')
  assert image.getpixel((3, 3)) == expected


def test_a_palette_keeps_its_transparency(tmp_path):
  palette = Image.new('P', (8, 8), 1)
  palette.putpalette([255, 0, 0, 0, 255, 0])
  palette.putpixel((0, 0), 0)
  palette.save(tmp_path / 'opaque.png')
  palette.save(tmp_path / 'some.png', transparency=0)
  palette.save(tmp_path / 'partly.png', transparency=bytes([0, 99]))
  opaque, some, partly = (images.read(tmp_path / f'{n}.png') for n in ('opaque', 'some', 'partly'))
  assert (opaque.mode, some.mode, partly.mode) == ('RGB', 'RGBA', 'RGBA')
  assert opaque.getpixel((0, 0)) == (255, 0, 0)
  assert (some.getpixel((0, 0))[3], some.getpixel((1, 1))) == (0, (0, 255, 0, 255))
  assert (partly.getpixel((0, 0))[3], partly.getpixel((1, 1))) == (0, (0, 255, 0, 99))


def test_a_transparent_colour_becomes_alpha(tmp_path):
  image = Image.new('RGB', (8, 8), (1, 2, 3))
  image.putpixel((0, 0), (9, 9, 9))
  image.save(tmp_path / 'key.png', transparency=(1, 2, 3))
  alpha = np.asarray(images.read(tmp_path / 'key.png'))[..., 3]
  assert alpha[0, 0] == 255 and alpha.sum() == 255


@pytest.mark.parametrize(('dtype', 'extension'), [('<u2', 'png'), ('<u2', 'tif'), ('>u2', 'tif')])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, dtype, extension):
  values = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
  path = tmp_path / f'deep.{extension}'
  Image.fromarray(values.astype(dtype)).save(path)
  expected = (values.astype(int) * 2 + 257) // 514  # value / 257, to the nearest
  np.testing.assert_array_equal(np.asarray(images.read(path))[..., 0], expected)


@pytest.mark.parametrize(
  ('values', 'expected'),
  [
    (np.int32([0, 257, 65535]), [0, 1, 255]),  # fits 16 bits
    (np.int32([-100, 0, 100]), [0, 128, 255]),  # fits nothing: stretched
    (np.int32([0, 2**30, 2**31 - 1]), [0, 128, 255]),
    (np.int32([-5, -5, -5]), [0, 0, 0]),
    (np.float32([0, 0.5, 0.9]), [0, 128, 230]),  # fits 0..1
    (np.float32([0, 100, 200]), [0, 100, 200]),  # fits 0..255
    (np.float32([0, 257, 32896]), [0, 1, 128]),  # fits 16 bits
    (np.float32([-1, 0, 1]), [0, 128, 255]),
  ],
)
def test_values_of_32_bits_are_scaled_by_the_documented_rule(tmp_path, values, expected):
  Image.fromarray(np.tile(np.repeat(values, 4), (8, 1))).save(tmp_path / 'deep.tif')
  image = np.asarray(images.read(tmp_path / 'deep.tif'))
  np.testing.assert_array_equal(image[0, ::4], np.repeat(expected, 3).reshape(3, 3))


def test_an_image_of_not_a_number_is_refused(tmp_path):
  Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / 'nan.tif')
  with pytest.raises(InputError, match=r'nan\.tif.*not finite'):
    images.read(tmp_path / 'nan.tif')


@pytest.mark.parametrize('extension', ['gif', 'webp', 'png', 'tif'])
def test_the_first_frame_is_read(tmp_path, extension):
  first, second = Image.new('RGB', (8, 8), (255, 0, 0)), Image.new('RGB', (8, 8), (0, 0, 255))
  lossless = {'lossless': True} if extension == 'webp' else {}
  path = tmp_path / f'moving.{extension}'
  first.save(path, save_all=True, append_images=[second], **lossless)
  assert images.read(path).getpixel((3, 3))[:3] == (255, 0, 0)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('extension', ['png', 'tif', 'webp'])
def test_exif_orientation_is_applied_once(tmp_path, rng, orientation, extension):
  image = noise_image(rng)
  exif = Image.Exif()
  exif[ORIENTATION] = orientation
  path = tmp_path / f'turned.{extension}'
  image.save(path, exif=exif, **({'lossless': True} if extension == 'webp' else {}))
  expected = image.copy()
  expected.info['exif'] = exif.tobytes()
  upright = images.read(path)
  assert upright.tobytes() == ImageOps.exif_transpose(expected).tobytes()
  assert images.plain(upright).tobytes() == upright.tobytes()
  assert images.size_of(path) == upright.size


def test_size_of_does_not_read_pixels(tmp_path, monkeypatch):
  photo, exif = Image.new('RGB', (64, 32)), Image.Exif()
  exif[ORIENTATION] = 6
  photo.save(tmp_path / 'phone.jpg', exif=exif)
  photo.save(tmp_path / 'plain.png')
  monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda *_: pytest.fail('pixels were read'))
  assert images.size_of(tmp_path / 'phone.jpg') == (32, 64)
  assert images.size_of(tmp_path / 'plain.png') == (64, 32)


def test_size_of_reads_exif_behind_the_pixels_of_png(tmp_path):
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  Image.new('RGB', (64, 32)).save(tmp_path / 'x.png')
  content = (tmp_path / 'x.png').read_bytes()
  chunk = b'eXIf' + exif.tobytes().removeprefix(b'Exif\0\0')
  chunk = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
  (tmp_path / 'x.png').write_bytes(content[:-12] + chunk + content[-12:])
  assert images.size_of(tmp_path / 'x.png') == images.read(tmp_path / 'x.png').size == (32, 64)


def test_a_phone_held_upright_gives_a_tall_image(tmp_path):
  photo = Image.new('RGB', (64, 32))
  photo.paste((255, 255, 255), (0, 0, 16, 16))  # top left in the sensor
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  photo.save(tmp_path / 'phone.jpg', exif=exif)
  upright = images.read(tmp_path / 'phone.jpg')
  assert upright.size == (32, 64)
  assert upright.getpixel((28, 4)) == (255, 255, 255)  # top right in the hand


def test_unreadable_exif_does_not_hide_the_image(tmp_path, rng):
  noise_image(rng).save(tmp_path / 'odd.jpg', exif=b'Exif\0\0garbage, no TIFF header at all')
  assert images.read(tmp_path / 'odd.jpg').size == (24, 16)


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize(
  'options',
  [{}, {'subsampling': 0}, {'subsampling': 1, 'quality': 30}, {'progressive': True}],
  ids=str,
)
def test_a_usual_jpeg_is_decoded_as_by_pillow(rng, mode, options):
  small = rng.integers(0, 256, (8, 6, 3), np.uint8)
  file = encoded(Image.fromarray(small).resize((61, 83)).convert(mode), **options)
  array = images.decode_jpeg(file)
  assert array.dtype == np.uint8
  np.testing.assert_array_equal(array, np.asarray(Image.open(io.BytesIO(file)).convert('RGB')))


TURNED = Image.Exif()
TURNED[ORIENTATION] = 6
GREY = Image.new('RGB', (16, 16), 'grey')


@pytest.mark.parametrize(
  'file',
  [
    encoded(GREY, exif=TURNED),
    encoded(GREY, xmp=b'<x tiff:Orientation="6"/>'),
    encoded(GREY.convert('CMYK')),
    encoded(GREY.resize((7, 16))),
    encoded(GREY)[:-20],
    encoded(GREY, 'PNG'),
    b'',
  ],
  ids=['turned by EXIF', 'turned by XMP', 'CMYK', 'too small', 'cut short', 'PNG', 'empty'],
)
def test_other_files_are_left_to_pillow(file):
  assert images.decode_jpeg(encoded(GREY)) is not None
  assert images.decode_jpeg(file) is None


def test_an_rgb_colour_profile_travels_with_the_image(tmp_path, rng):
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  noise_image(rng).save(tmp_path / 'in.png', icc_profile=profile)
  Image.new('L', (8, 8)).save(tmp_path / 'grey.png', icc_profile=profile)
  original = images.read(tmp_path / 'in.png')
  edited = images.restore(images.to_array(original, (16, 8)), original)
  for extension in ('png', 'jpg', 'webp'):
    images.save(edited, tmp_path / f'out.{extension}', {})
    assert images.read(tmp_path / f'out.{extension}').info == {'icc_profile': profile}
  assert images.read(tmp_path / 'grey.png').info == {}  # it described greys, not RGB


@pytest.mark.parametrize('extension', ['png', 'jpg', 'webp', 'bmp', 'gif', 'tif'])
def test_a_file_cut_short_is_refused(tmp_path, rng, extension):
  full, half = tmp_path / f'whole.{extension}', tmp_path / f'half.{extension}'
  noise_image(rng, 64, 64).save(full)
  assert images.read(full).size == (64, 64)
  for share in (0.3, 0.6, 0.9):
    half.write_bytes(full.read_bytes()[: int(full.stat().st_size * share)])
    with pytest.raises(InputError, match=f'half.{extension} '):
      images.read(half)


def test_a_file_that_is_no_image_is_named(tmp_path):
  (tmp_path / 'text.png').write_text('hello')
  (tmp_path / 'empty.jpg').touch()
  Image.new('RGB', (8, 8)).save(tmp_path / 'vector.eps')
  for name in ('text.png', 'empty.jpg', 'vector.eps'):
    with pytest.raises(InputError, match=f'{name} is not an image'):
      images.read(tmp_path / name)
  with pytest.raises(InputError, match=r'absent\.png was not found'):
    images.read(tmp_path / 'absent.png')
  with pytest.raises(InputError, match='is a folder'):
    images.read(tmp_path)


@pytest.mark.parametrize('limit', [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch, limit):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
  for width, height in [(40000, 40000), (images.MAX_PIXELS // 10 + 1, 10)]:
    (tmp_path / 'bomb.png').write_bytes(png_header(width, height))
    with pytest.raises(InputError, match=r'bomb\.png has over 178,956,970 pixels'):
      images.read(tmp_path / 'bomb.png')


def test_a_large_image_under_the_limit_gives_no_warning(tmp_path, recwarn):
  (tmp_path / 'large.png').write_bytes(png_header(10000, 10000))  # Pillow warns from 89 million
  with pytest.raises(InputError, match='cut short') as caught:  # only for its missing pixels
    images.read(tmp_path / 'large.png')
  assert 'bomb' not in str(caught.value) and not recwarn.list


def test_less_than_one_latent_pixel_is_refused(tmp_path):
  Image.new('RGB', (100, 7)).save(tmp_path / 'thin.png')
  with pytest.raises(InputError, match=r'thin\.png is 100x7'):
    images.read(tmp_path / 'thin.png')
  Image.new('RGB', (8, 8)).save(tmp_path / 'least.png')
  assert images.read(tmp_path / 'least.png').size == (8, 8)


# Sizes


@pytest.mark.parametrize('resolution', [64, 256, 512, 768])
def test_every_square_works_at_exactly_the_resolution(resolution):
  sizes = {images.working_size(side, side, resolution) for side in range(64, 4097)}
  assert sizes == {(resolution, resolution)}


@pytest.mark.parametrize('multiple', [8, 64])
def test_a_rectangle_keeps_its_aspect_within_half_a_multiple(rng, multiple):
  for width, height in rng.integers(8, 5000, (20000, 2)).tolist():
    size = images.working_size(width, height, 512, multiple)
    long, short = max(width, height), min(width, height)
    assert max(size) == 512 and size[0] % multiple == 0 and size[1] % multiple == 0
    assert (size[0] >= size[1]) if width >= height else (size[0] <= size[1])
    # |short side - 512 short / long| <= multiple / 2, in integers
    off = 2 * abs(min(size) * long - 512 * short)
    assert off <= multiple * long or min(size) == multiple


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ((640, 480, 512), (512, 384)),
    ((1920, 1080, 512), (512, 288)),
    ((1080, 1350, 512), (408, 512)),
    ((100, 5000, 512), (8, 512)),
    ((600, 400, 300), (304, 200)),  # a resolution between multiples
    ((600, 400, 3), (8, 8)),
    ((1000, 1000, 500, 64), (512, 512)),
  ],
)
def test_working_sizes_by_hand(arguments, expected):
  assert images.working_size(*arguments) == expected


def test_a_resolution_of_nothing_is_refused():
  with pytest.raises(InputError, match='resolution 0'):
    images.working_size(640, 480, 0)


# To the model and back


def test_an_opaque_image_is_resized_by_lanczos(rng):
  image = noise_image(rng, 60, 40)
  array = images.to_array(image, (24, 16))
  assert array.shape == (16, 24, 3) and array.dtype == np.uint8 and array.flags.writeable
  np.testing.assert_array_equal(array, image.resize((24, 16), Image.Resampling.LANCZOS))
  np.testing.assert_array_equal(images.to_array(image, image.size), image)


def test_hidden_colours_do_not_bleed_and_transparency_is_white(rng):
  pixels = rng.integers(0, 256, (40, 40, 4), np.uint8)
  pixels[:, :20, 3] = 0
  array = images.to_array(Image.fromarray(pixels), (16, 16))
  assert (array[:, :5] == 255).all()
  pixels[:, :20, :3] = 77
  np.testing.assert_array_equal(images.to_array(Image.fromarray(pixels), (16, 16)), array)


def test_compositing_first_equals_resizing_premultiplied_colours():
  y, x = np.mgrid[:64, :64] / 63.0
  rgba = np.stack([x, y, 1 - x, (0.2 + 0.6 * x * y)], -1)  # smooth: no overshoot to clip
  flat = rgba[..., :3] * rgba[..., 3:]
  channels = [*np.moveaxis(flat, -1, 0), rgba[..., 3]]
  scaled = np.stack([Image.fromarray(np.float32(c)).resize((24, 24), 1) for c in channels], -1)
  expected = 255 * (scaled[..., :3] + 1 - scaled[..., 3:])
  array = images.to_array(Image.fromarray((rgba * 255).round().astype(np.uint8)), (24, 24))
  np.testing.assert_allclose(array, expected, atol=1.6)  # three roundings to 8 bits


def test_an_edit_returns_at_the_original_size_with_its_alpha(rng):
  edited = rng.integers(0, 256, (16, 24, 3), np.uint8)
  original = noise_image(rng, 60, 40, 4)
  image = images.restore(edited, original)
  assert (image.size, image.mode) == ((60, 40), 'RGBA')
  assert image.getchannel('A').tobytes() == original.getchannel('A').tobytes()
  expected = Image.fromarray(edited).resize((60, 40), Image.Resampling.LANCZOS)
  assert image.convert('RGB').tobytes() == expected.tobytes()
  opaque = images.restore(edited, original.convert('RGB'))
  assert (opaque.mode, opaque.tobytes()) == ('RGB', expected.tobytes())


@pytest.mark.parametrize('channels', [3, 4])
def test_a_hard_mask_takes_whole_pixels_from_either_side(rng, channels):
  original = noise_image(rng, 60, 40, channels)
  edited = rng.integers(0, 256, (16, 24, 3), np.uint8)
  mask = rng.integers(0, 2, (40, 60)).astype(np.float32)
  result = np.asarray(images.restore(edited, original, mask))
  full = np.asarray(images.restore(edited, original))
  np.testing.assert_array_equal(result[mask == 0], np.asarray(original)[mask == 0])
  np.testing.assert_array_equal(result[mask == 1], full[mask == 1])


@pytest.mark.parametrize('share', [1 / 255, 0.3, 0.5, 254 / 255, 1e-6])
def test_a_soft_mask_blends_to_the_nearest_value(share):
  before, after = (np.stack([v] * 3, -1).astype(np.uint8) for v in np.mgrid[:256, :256])
  mask = np.full((256, 256), share, np.float32)
  blended = np.asarray(images.restore(after, Image.fromarray(before), mask))
  exact = before + mask[..., None].astype(np.float64) * (after.astype(np.float64) - before)
  assert np.abs(blended - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
  ('mask', 'message'),
  [
    (np.ones((24, 16)), r'has shape \[24, 16\]; the image needs \[16, 24\]'),
    (np.full((16, 24), 1.1), 'values that are not from 0 to 1'),
    (np.full((16, 24), np.nan), 'values that are not from 0 to 1'),
  ],
)
def test_a_mask_array_of_wrong_shape_or_range_is_refused(rng, mask, message):
  original = noise_image(rng)
  with pytest.raises(InputError, match=message):
    images.restore(np.asarray(original), original, mask.astype(np.float32))


# Masks


def test_a_mask_of_equal_size_is_exact(tmp_path, rng):
  values = rng.integers(0, 256, (16, 24), np.uint8)
  Image.fromarray(values).save(tmp_path / 'mask.png')
  mask = images.read_mask(tmp_path / 'mask.png', (24, 16))
  assert mask.dtype == np.float32 and mask.shape == (16, 24)
  np.testing.assert_array_equal(mask, values.astype(np.float32) / np.float32(255))
  Image.fromarray(values > 127).save(tmp_path / 'hard.png')
  hard = images.read_mask(tmp_path / 'hard.png', (24, 16))
  np.testing.assert_array_equal(hard, values > 127)


@pytest.mark.parametrize('size', [(12, 8), (48, 32)])
def test_a_mask_of_another_size_is_scaled_without_overshoot(tmp_path, size):
  mask_file = Image.new('L', size)
  mask_file.paste(255, (size[0] // 2, 0, *size))
  mask_file.save(tmp_path / 'mask.png')
  mask = images.read_mask(tmp_path / 'mask.png', (24, 16))
  assert mask.shape == (16, 24)
  assert (mask[:, :10] == 0).all() and (mask[:, 14:] == 1).all()
  assert (np.diff(mask, axis=1) >= 0).all()


def test_transparent_parts_of_a_mask_count_as_black(tmp_path):
  mask_file = Image.new('RGBA', (8, 8), (255, 255, 255, 0))
  mask_file.paste((255, 255, 255, 255), (0, 0, 4, 8))
  mask_file.save(tmp_path / 'mask.png')
  mask = images.read_mask(tmp_path / 'mask.png', (8, 8))
  np.testing.assert_array_equal(mask, np.arange(8) < np.full((8, 1), 4))


def test_a_black_mask_is_refused(tmp_path):
  speck = Image.new('L', (800, 800))
  speck.putpixel((400, 400), 255)  # black after scaling to the image's size
  for mask in (Image.new('L', (8, 8)), speck):
    mask.save(tmp_path / 'mask.png')
    with pytest.raises(InputError, match=r'mask\.png is all black, so nothing would be edited'):
      images.read_mask(tmp_path / 'mask.png', (8, 8))


def test_a_mask_may_differ_in_shape_by_rounding_only(tmp_path):
  Image.new('L', (400, 267), 255).save(tmp_path / 'rounded.png')
  assert images.read_mask(tmp_path / 'rounded.png', (3000, 2000)).shape == (2000, 3000)
  Image.new('L', (400, 400), 255).save(tmp_path / 'square.png')
  for size in [(3000, 2000), (400, 300), (300, 400)]:
    with pytest.raises(InputError, match=r'square\.png is 400x400 and the image'):
      images.read_mask(tmp_path / 'square.png', size)


# Writing

SETTINGS = {'instruction': 'añade una “luna” 🌙', 'seed': 1371, 'text_guidance': 7.5, 'mask': None}


@pytest.mark.parametrize('extension', ['png', 'PNG', 'jpg', 'jpeg', 'webp'])
def test_settings_are_read_back_from_the_image(tmp_path, rng, extension):
  path = tmp_path / f'edit.{extension}'
  images.save(noise_image(rng), path, SETTINGS)
  assert images.read_settings(path) == SETTINGS
  formats = {'png': 'PNG', 'jpg': 'JPEG', 'jpeg': 'JPEG', 'webp': 'WEBP'}
  with Image.open(path) as image:
    assert image.format == formats[extension.lower()]
  assert images.read(path).size == (24, 16)


def test_settings_of_a_png_are_its_text_chunk(tmp_path, rng):
  images.save(noise_image(rng), tmp_path / 'edit.png', {'seed': 7})
  with Image.open(tmp_path / 'edit.png') as image:
    assert image.text == {'ip2p': '{"seed": 7}'}


def test_an_image_without_our_settings_has_none(tmp_path, rng):
  image = noise_image(rng)
  for name in ('plain.png', 'plain.jpg', 'plain.gif'):
    image.save(tmp_path / name)
    assert images.read_settings(tmp_path / name) is None
  for comment in (b'ASCII\0\0\0{"seed": 1}', b'{"seed": 1}', b'', 'a word'):
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    image.save(tmp_path / 'camera.jpg', exif=exif)
    assert images.read_settings(tmp_path / 'camera.jpg') is None
  image.save(tmp_path / 'ruins.jpg', exif=b'Exif\0\0garbage, no TIFF header at all')
  assert images.read_settings(tmp_path / 'ruins.jpg') is None
  with pytest.raises(InputError, match='not found'):
    images.read_settings(tmp_path / 'absent.png')


def test_png_and_webp_keep_transparency_and_jpeg_gets_white(tmp_path, rng):
  image = noise_image(rng, channels=4)
  images.save(image, tmp_path / 'edit.png', {})
  assert images.read(tmp_path / 'edit.png').tobytes() == image.tobytes()
  images.save(Image.new('RGBA', (8, 8), (255, 0, 0, 0)), tmp_path / 'edit.jpg', {})
  assert images.read(tmp_path / 'edit.jpg').getpixel((3, 3)) == (255, 255, 255)
  images.save(Image.new('RGBA', (8, 8), (255, 0, 0, 0)), tmp_path / 'edit.webp', {})
  assert images.read(tmp_path / 'edit.webp').getpixel((3, 3))[3] == 0


def test_a_jpeg_keeps_fine_colour(tmp_path):
  stripes = np.zeros((16, 16, 3), np.uint8)
  stripes[:, ::2] = (255, 0, 0)
  stripes[:, 1::2] = (0, 0, 255)
  images.save(Image.fromarray(stripes), tmp_path / 'stripes.jpg', {})
  decoded = np.asarray(images.read(tmp_path / 'stripes.jpg')).astype(int)
  assert np.abs(decoded - stripes).max() < 16  # halved colour resolution gives over 100
  Image.fromarray(stripes).save(tmp_path / 'reference.jpg', quality=95)
  with Image.open(tmp_path / 'stripes.jpg') as a, Image.open(tmp_path / 'reference.jpg') as b:
    assert a.quantization == b.quantization


@pytest.mark.parametrize('name', ['edit.gif', 'edit', 'edit.tar.gz', '.png'])
def test_another_extension_is_refused_with_those_that_work(tmp_path, name):
  for attempt in (
    images.check_writable,
    lambda path: images.save(Image.new('L', (8, 8)), path, {}),
  ):
    with pytest.raises(InputError, match=r'must end in one of \.png \.jpg \.jpeg \.webp'):
      attempt(tmp_path / name)


def test_a_saved_image_has_the_usual_permissions(tmp_path):
  images.save(Image.new('RGB', (8, 8)), tmp_path / 'edit.png', {})
  (tmp_path / 'other').touch()
  assert (tmp_path / 'edit.png').stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_a_full_disk_leaves_the_old_image_and_nothing_else(tmp_path, rng):
  path = tmp_path / 'edit.png'
  path.write_bytes(b'old')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(
    resource.RLIMIT_FSIZE, (1000, hard)
  )  # writing past it fails, as on a full disk
  try:
    with pytest.raises(InputError, match=r'edit\.png cannot be written \(File too large\)'):
      images.save(noise_image(rng, 64, 64), path, {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert os.listdir(tmp_path) == ['edit.png'] and path.read_bytes() == b'old'


def test_an_interrupt_while_saving_leaves_nothing(tmp_path, monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', interrupt)
  with pytest.raises(KeyboardInterrupt):
    images.save(Image.new('RGB', (8, 8)), tmp_path / 'edit.png', {})
  assert os.listdir(tmp_path) == []


def test_a_failed_save_gives_one_sentence(tmp_path):
  image = Image.new('RGB', (8, 8))
  (tmp_path / 'folder.png').mkdir()
  for path, settings in [
    (tmp_path / 'absent' / 'edit.png', {}),
    (tmp_path / 'folder.png', {}),
    (tmp_path / 'long.jpg', {'instruction': 'x' * 70000}),  # EXIF holds 64 kB
  ]:
    with pytest.raises(InputError, match=f'{path.name} cannot be written') as caught:
      images.save(image, path, settings)
    assert '\n' not in str(caught.value)
  assert os.listdir(tmp_path) == ['folder.png']


def test_checking_makes_folders_and_nothing_else(tmp_path):
  images.check_writable(tmp_path / 'new' / 'deep' / 'edit.png')
  assert os.listdir(tmp_path / 'new' / 'deep') == []
  (tmp_path / 'old.png').write_bytes(b'old')
  images.check_writable(tmp_path / 'old.png')
  assert (tmp_path / 'old.png').read_bytes() == b'old'
  assert sorted(os.listdir(tmp_path)) == ['new', 'old.png']


def test_checking_refuses_what_saving_would(tmp_path, monkeypatch):
  (tmp_path / 'folder.png').mkdir()
  (tmp_path / 'file').touch()
  for path in ('folder.png', 'file/edit.png', 'x' * 300 + '.png', 'nul\0.png'):
    with pytest.raises(InputError, match='cannot be written'):
      images.check_writable(tmp_path / path)

  def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr('pathlib.Path.touch', read_only)
  with pytest.raises(InputError, match='Read-only file system'):
    images.check_writable(tmp_path / 'edit.png')
  assert sorted(os.listdir(tmp_path)) == ['file', 'folder.png']


# Grids


def find(sheet, image):
  """The box of an image of one colour in the sheet."""
  rows, columns = np.nonzero((np.asarray(sheet) == image.getpixel((0, 0))[:3]).all(-1))
  return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def colours(num_rows, num_columns, size):
  return [
    [Image.new('RGB', size, (200, 20 * i, 20 * j)) for j in range(num_columns)]
    for i in range(num_rows)
  ]


@pytest.mark.parametrize('size', [(64, 64), (160, 96), (512, 344)])
def test_a_grid_holds_every_image_whole_in_rows_and_columns(size):
  rows = colours(2, 3, size)
  sheet = images.image_grid(
    rows, ['image 1.2', 'image 1.5'], ['text 3', 'text 5', 'text 7.5'], 'snow'
  )
  boxes = np.array([[find(sheet, image) for image in row] for row in rows])
  assert sheet.mode == 'RGB'
  assert (boxes[..., 2] - boxes[..., 0] == size[0]).all()
  assert (boxes[..., 3] - boxes[..., 1] == size[1]).all()
  assert (boxes[:, :, [1, 3]] == boxes[:, :1, [1, 3]]).all()  # a row shares its top and bottom
  assert (boxes[:, :, [0, 2]] == boxes[:1, :, [0, 2]]).all()
  assert (boxes[:, 1:, 0] > boxes[:, :-1, 2]).all() and (boxes[1:, :, 1] > boxes[:-1, :, 3]).all()


@pytest.mark.parametrize('title', ['', 'snow', 'turn the whole street into a snowy night ' * 9])
@pytest.mark.parametrize('label', ['7.5', 'a label that is far too long for an image ' * 3])
def test_labels_are_dark_and_do_not_touch_images_or_margin(title, label):
  rows = colours(2, 2, (64, 64))
  bare = np.asarray(images.image_grid(rows, [label] * 2, [label] * 2, title))
  left, top, _, _ = find(Image.fromarray(bare), rows[0][0])
  for words in (bare[: top - 1], bare[top:, : left - 1]):
    assert words.min() < 64
  ink = (bare < 128).all(-1)
  ink[top:, left:] = False
  ys, xs = np.nonzero(ink)
  assert min(xs.min(), ys.min()) >= 10 and xs.max() < bare.shape[1] - 10
  assert (bare[top - 1, left:] == 255).all() and (bare[top:, left - 1] == 255).all()


def test_a_title_is_wrapped_then_cut():
  rows = colours(1, 2, (64, 64))
  heights = [
    images.image_grid(rows, ['1.5'], ['5', '7'], title).height
    for title in ('', 'one', 'one two three four five six', 'many words ' * 50, 'x' * 5000)
  ]
  none, one, two, most, word = heights
  assert none < one < two < most == one + 2 * (two - one) and word == one


def test_text_left_out_shows_as_an_ellipsis():
  font = ImageFont.load_default(16)
  width = font.getlength('one two…')
  assert images._wrap('one two three', font, width, 2) == ['one two', 'three']
  assert images._wrap('one two three', font, width, 1) == ['one two…']
  [cut] = images._wrap('incomprehensibilities', font, width, 1)
  assert cut.startswith('inco') and cut.endswith('…') and font.getlength(cut) <= width


def test_a_grid_centres_smaller_images_and_shows_transparency_on_white():
  small, large = (
    Image.new('RGBA', (20, 10), (9, 99, 9, 255)),
    Image.new('RGB', (60, 50), (9, 9, 99)),
  )
  sheet = images.image_grid([[small], [large]], ['a', 'b'], ['c'])
  (l0, _, r0, _), (l1, _, r1, _) = find(sheet, small), find(sheet, large)
  assert l0 + r0 == l1 + r1
  clear = images.image_grid([[Image.new('RGBA', (64, 64), (0, 0, 0, 0))]], [''], [''])
  assert clear.getextrema() == ((255, 255),) * 3


def test_a_missing_label_or_image_of_a_grid_raises():
  rows = colours(2, 2, (16, 16))
  for arguments in [
    (rows, ['a'], ['b', 'c']),
    (rows, ['a', 'b'], ['c']),
    ([rows[0], []], 'ab', 'cd'),
  ]:
    with pytest.raises(ValueError, match='zip'):
      images.image_grid(*arguments)
