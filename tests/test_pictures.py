"""Pictures as cameras, telephones and programs write them: their colours as sRGB, or a refusal by name; and pictures of every size."""

import io, logging, struct, zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from collectionlora.bases.pipeline import load_base
from collectionlora.core import nano_dir, UserError
from collectionlora.files.conditions import ConditionCache
from collectionlora.files.pictures import ADOBE, converted, load_image, PRIMARIES, shown_size, SRGB

P3 = PRIMARIES[12]


@pytest.fixture(scope='module')
def nano():
    return load_base(nano_dir())


COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (128, 128, 128),
    (200, 120, 60),
    (30, 90, 160),
    (0, 0, 0),
    (255, 255, 255),
]


def light(v):
    return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4


def curve(v):
    return 12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055


# sRGB light of Display P3's and Adobe RGB's primaries (CSS Color 4, section 17: lin_P3_to_XYZ and lin_a98rgb_to_XYZ times XYZ_to_lin_sRGB)
FROM_P3 = [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]
FROM_ADOBE = [[1.3983, -0.3983, 0.0], [0.0, 1.0, 0.0], [0.0, -0.0429, 1.0429]]


def expected(colour, matrix, to_light=light):
    "The right sRGB numbers of a colour of another space, from the published matrix."
    there = [to_light(v / 255) for v in colour]
    return [round(255 * curve(min(1, max(0, sum(m * v for m, v in zip(row, there)))))) for row in matrix]


def chart(mode='RGB'):
    return Image.fromarray(np.array([COLOURS] * 8, np.uint8)).convert(mode)


def profile(points, gamma=None):
    "A matrix profile (ICC version 2) of these primaries, adapted to D50 by Bradford, with sRGB's curve or a gamma."
    x, y = np.reshape(points, (4, 2)).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    B = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    adapt = np.linalg.inv(B) @ np.diag((B @ d50) / (B @ xyz[:, 0])) @ B
    columns = adapt @ (xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0]))
    number = lambda v: struct.pack('>i', round(v * 65536))
    kind = lambda v: b'XYZ \0\0\0\0' + b''.join(map(number, v))
    if gamma:
        trc = b'curv\0\0\0\0' + struct.pack('>IH', 1, round(gamma * 256)) + b'\0\0'
    else:
        table = [round(65535 * light(i / 1023)) for i in range(1024)]
        trc = b'curv\0\0\0\0' + struct.pack('>I1024H', 1024, *table)
    text = b'desc\0\0\0\0' + struct.pack('>I', 5) + b'made\0' + bytes(78)
    tags = {b'desc': text, b'wtpt': kind(d50), b'rXYZ': kind(columns[:, 0]), b'gXYZ': kind(columns[:, 1])}
    tags |= {b'bXYZ': kind(columns[:, 2]), b'rTRC': trc, b'gTRC': trc, b'bTRC': trc}
    return _icc(tags)


def _icc(tags, space=b'RGB ', pcs=b'XYZ ', device=b'mntr'):
    "An ICC file of version 2 with these tags."
    table, body, at = b'', b'', 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack('>4sII', name, at + len(body), len(content))
        body += content
    total = at + len(body)
    d50 = struct.pack('>iii', 63190, 65536, 54061)
    head = (
        struct.pack('>I4sI', total, bytes(4), 0x02400000)
        + device
        + space
        + pcs
        + struct.pack('>6H', 2026, 1, 1, 0, 0, 0)
    )
    head = (head + b'acsp').ljust(68, b'\0') + d50
    return head.ljust(128, b'\0') + struct.pack('>I', len(tags)) + table + body


def chunked(path, image, *chunks):
    "A PNG with chunks more behind its head."
    image.save(path)
    raw = path.read_bytes()
    more = b''.join(struct.pack('>I', len(c)) + n + c + struct.pack('>I', zlib.crc32(n + c)) for n, c in chunks)
    path.write_bytes(raw[:33] + more + raw[33:])
    return path


def near(path, wanted, within=3):
    got = np.asarray(load_image(path))[0].astype(int)
    away = np.abs(got - np.array(wanted)).max()
    assert away <= within, (away, got.tolist(), wanted)


@pytest.mark.parametrize('ending', ['png', 'webp', 'tif'])
@pytest.mark.parametrize('space', ['P3', 'Adobe'])
def test_an_embedded_profile_is_converted(space, ending, tmp_path):
    points, gamma, matrix = (P3, None, FROM_P3) if space == 'P3' else (ADOBE, 2.19921875, FROM_ADOBE)
    path = tmp_path / f'a.{ending}'
    chart().save(path, icc_profile=profile(points, gamma), **({'lossless': True} if ending == 'webp' else {}))
    to_light = light if gamma is None else lambda v: v**gamma
    near(path, [expected(c, matrix, to_light) for c in COLOURS])
    assert converted(path)


def test_profiles_of_jpeg_palette_and_grey_pictures(tmp_path):
    wide = Image.new('RGB', (16, 16), (200, 120, 60))
    wide.save(tmp_path / 'a.jpg', icc_profile=profile(P3), quality=100, subsampling=0)
    wide.quantize(4).save(tmp_path / 'b.png', icc_profile=profile(P3))
    for name in ('a.jpg', 'b.png'):
        near(tmp_path / name, [expected((200, 120, 60), FROM_P3)] * 16, 4)
    tags = {b'wtpt': b'XYZ \0\0\0\0' + struct.pack('>iii', 63190, 65536, 54061)}
    tags[b'kTRC'] = b'curv\0\0\0\0' + struct.pack('>IH', 1, 256) + b'\0\0'  # light itself
    Image.new('L', (8, 8), 55).save(tmp_path / 'c.png', icc_profile=_icc(tags, b'GRAY'))
    near(tmp_path / 'c.png', [[128] * 3] * 8)
    chart().save(tmp_path / 'd.png', icc_profile=_icc(tags, b'GRAY'))
    with pytest.raises(UserError, match='d.png: its colour profile is for L'):
        load_image(tmp_path / 'd.png')


def test_a_profile_of_srgb_changes_no_number_and_a_broken_one_is_refused(tmp_path):
    for k, icc in enumerate((ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), profile(SRGB))):
        chart().save(tmp_path / f'{k}.png', icc_profile=icc)
        near(tmp_path / f'{k}.png', COLOURS, 0)
        assert not converted(tmp_path / f'{k}.png')
    chart().save(tmp_path / 'x.png', icc_profile=b'no profile' * 20)
    with pytest.raises(UserError, match='x.png: its colour profile cannot be read'):
        load_image(tmp_path / 'x.png')


GAMMA, CHRM = lambda g: (b'gAMA', struct.pack('>I', round(100_000 / g))), b'cHRM'
P3_CHRM = (CHRM, struct.pack('>8I', *(round(100_000 * v) for v in P3)))


@pytest.mark.parametrize(
    'chunks, wanted',
    [
        ([GAMMA(2.2)], COLOURS),
        ([GAMMA(1.0)], [[round(255 * curve(v / 255)) for v in c] for c in COLOURS]),
        ([GAMMA(1.8)], [[round(255 * curve((v / 255) ** 1.8)) for v in c] for c in COLOURS]),
        ([GAMMA(1.0), (b'sRGB', b'\0')], COLOURS),
        ([GAMMA(2.2), P3_CHRM], [expected(c, FROM_P3) for c in COLOURS]),
        ([P3_CHRM, GAMMA(2.2), (b'sRGB', b'\0')], COLOURS),
        ([(b'cICP', bytes([12, 13, 0, 1]))], [expected(c, FROM_P3) for c in COLOURS]),
        ([(b'cICP', bytes([1, 13, 0, 1])), GAMMA(1.0)], COLOURS),
        ([(b'cICP', bytes([1, 8, 0, 1]))], [[round(255 * curve(v / 255)) for v in c] for c in COLOURS]),
    ],
)
def test_the_chunks_of_a_png_are_read_in_their_order_of_rank(chunks, wanted, tmp_path):
    near(chunked(tmp_path / 'a.png', chart(), *chunks), wanted)


def test_adobe_rgb_by_a_cameras_note(tmp_path):
    image = Image.new('RGB', (16, 16), (200, 120, 60))
    exif = image.getexif()
    exif[0x8769] = {0xA001: 0xFFFF, 0xA005: {1: 'R03'}}
    image.save(tmp_path / 'a.jpg', exif=exif, quality=100, subsampling=0)
    near(tmp_path / 'a.jpg', [expected((200, 120, 60), FROM_ADOBE, lambda v: v**2.19921875)] * 16, 4)


def avif(path, image, primaries, transfer):
    buffer = io.BytesIO()
    image.save(buffer, 'AVIF', quality=100)
    raw = buffer.getvalue()
    at = raw.find(b'colrnclx') + 8
    assert at > 8
    path.write_bytes(raw[:at] + struct.pack('>HH', primaries, transfer) + raw[at + 4 :])


def test_high_dynamic_range_is_refused_by_name(tmp_path):
    for codes, name in (((9, 16), 'PQ'), ((9, 18), 'HLG')):
        chunked(tmp_path / 'a.png', chart(), (b'cICP', bytes([*codes, 0, 1])))
        with pytest.raises(UserError, match=f'a.png: holds high dynamic range .{name}'):
            load_image(tmp_path / 'a.png')
        avif(tmp_path / 'b.avif', chart(), *codes)
        with pytest.raises(UserError, match=f'b.avif: holds high dynamic range .{name}'):
            load_image(tmp_path / 'b.avif')
    body = profile(PRIMARIES[9])
    tags = b'cicp' + struct.pack('>II', len(body) + 12, 12)
    moved = [struct.unpack('>4sII', body[132 + 12 * k :][:12]) for k in range(8)]
    table = b''.join(struct.pack('>4sII', n, at + 12, size) for n, at, size in moved)
    body = body[:128] + struct.pack('>I', 9) + table + tags + body[132 + 96 :] + b'cicp\0\0\0\0' + bytes([9, 16, 0, 1])
    chart().save(tmp_path / 'c.png', icc_profile=struct.pack('>I', len(body)) + body[4:])
    with pytest.raises(UserError, match='c.png: holds high dynamic range .PQ'):
        load_image(tmp_path / 'c.png')


def test_what_of_a_file_is_not_used_is_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    frames = [Image.new('RGB', (16, 16), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / 'a.png', save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / 'b.webp', save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / 'c.tif', save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / 'd.gif', save_all=True, append_images=frames[1:])
    for name in ('a.png', 'b.webp', 'c.tif', 'd.gif'):
        assert load_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)
        assert f'{name}: holds 3 pictures' in caplog.text
    xmp = b'<x:xmpmeta><rdf:Description hdrgm:Version="1.0"/></x:xmpmeta>'
    frames[0].save(tmp_path / 'e.jpg', 'MPO', save_all=True, append_images=frames[1:2], xmp=xmp)
    assert load_image(tmp_path / 'e.jpg').getpixel((0, 0))[0] > 250
    assert 'e.jpg: its HDR gain map is left out' in caplog.text


def sixteen(path, value, kind):
    "A PNG with 16 bits a channel, one colour."
    n = {0: 1, 2: 3}[kind]
    head = struct.pack('>IIBBBBB', 8, 8, 16, kind, 0, 0, 0)
    rows = (b'\0' + struct.pack('>H', value) * (n * 8)) * 8
    chunk = lambda n, c: struct.pack('>I', len(c)) + n + c + struct.pack('>I', zlib.crc32(n + c))
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize('value', [0, 257, 32768, 33023, 65535])
def test_sixteen_bits_are_right_in_colour_and_refused_in_grey(value, tmp_path):
    sixteen(tmp_path / 'a.png', value, 2)
    near(tmp_path / 'a.png', [[round(value / 257)] * 3] * 8, 1)
    sixteen(tmp_path / 'b.png', value, 0)
    with pytest.raises(UserError, match='b.png: holds 16-bit integers'):
        load_image(tmp_path / 'b.png')


def test_a_lying_picture_with_a_profile_is_upright_and_converted(tmp_path):
    image = Image.new('RGB', (40, 16), (200, 120, 60))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / 'a.jpg', exif=exif, icc_profile=profile(P3), quality=100, subsampling=0)
    assert load_image(tmp_path / 'a.jpg').size == shown_size(tmp_path / 'a.jpg') == (16, 40)
    near(tmp_path / 'a.jpg', [expected((200, 120, 60), FROM_P3)] * 16, 4)


def test_conditions_made_before_colours_were_converted_are_made_again(tmp_path, nano):
    cache = ConditionCache(nano, tmp_path / 'cache')
    chart().save(tmp_path / 'a.png')
    chart().save(tmp_path / 'b.png', icc_profile=profile(P3))
    assert not cache._sha(tmp_path / 'a.png').endswith(' as sRGB')
    assert cache._sha(tmp_path / 'b.png').endswith(' as sRGB')


def test_a_damaged_picture_is_one_sentence_or_is_read(tmp_path):
    buffers = []
    for kind, more in (
        ('PNG', dict(icc_profile=profile(P3))),
        ('JPEG', {}),
        ('WEBP', {}),
        ('TIFF', {}),
        ('GIF', {}),
        ('AVIF', {}),
    ):
        buffers.append(io.BytesIO())
        chart().save(buffers[-1], kind, **more)
    r = np.random.default_rng(0)
    for k in range(300):
        raw = bytearray(buffers[k % len(buffers)].getvalue())
        for at in r.integers(0, len(raw), r.integers(1, 6)):
            raw[at] = r.integers(256)
        (tmp_path / 'a').write_bytes(raw[: r.integers(1, len(raw))] if k % 5 == 0 else raw)
        for read in (load_image, shown_size, converted):
            try:
                read(tmp_path / 'a')
            except UserError as e:
                assert '\n' not in str(e) and str(tmp_path / 'a') in str(e)


# ---- sizes

REFUSED = [(640, 40), (40, 640), (5000, 1), (1, 5000), (1, 16)]
FITS = [(1, 1), (1, 2), (2, 1), (1, 15), (15, 1), (3, 3), (15, 15), (31, 31), (299, 20), (8000, 600)]


@pytest.mark.parametrize('size', REFUSED)
def test_a_picture_too_long_and_narrow_is_refused_with_the_ratio_that_fits(size, nano):
    with pytest.raises(UserError, match=f'{size[0]} × {size[1]} pixels is too long and narrow.*crop it to 15 : 1'):
        nano.size(Image.new('RGB', size))


def test_a_refused_picture_is_named_by_its_file(tmp_path, nano):
    Image.new('RGB', (640, 40)).save(tmp_path / 'long.png')
    with pytest.raises(UserError, match='long.png: a picture of 640'):
        nano.encode_images([load_image(tmp_path / 'long.png')])


@pytest.mark.parametrize('size', FITS)
def test_any_other_size_has_a_working_size_whose_latents_fit(size, nano):
    h, w = nano.size(Image.new('RGB', size))
    assert min(h, w) >= 32 and h % 32 == w % 32 == 0 and max(h, w) / min(h, w) < 16
    assert nano.encode_images([Image.new('RGB', size)]).shape[1] == nano.grid(Image.new('RGB', size))[0] * (w // 8)


def test_a_warning_about_a_file_is_said_once(tmp_path, caplog):
    Image.new('L', (9, 9)).save(tmp_path / 'a.png')
    for _ in range(3):
        load_image(tmp_path / 'a.png')
    assert [r.getMessage() for r in caplog.records] == [f'{tmp_path / "a.png"}: converted from mode L to RGB']
