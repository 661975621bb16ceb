"""Pictures and clips: the tiling by hand, what is read, what is refused."""

import dataclasses
import struct
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import vl
from PIL import Image

from nemokernels.models import ImageError, load_clip, load_image
from nemokernels.models.images import frame_indices, frame_pixels, tile_grid, tile_pixels

# Width and height of the picture -> columns and rows of tiles of 512.
GRIDS = {
    (512, 512): (1, 1),
    (724, 724): (1, 1),  # 524,176 pixels, not half of the 1,048,576 of 2 x 2 tiles
    (725, 725): (2, 2),  # 525,625: more than half
    (1086, 1086): (2, 2),  # half of 3 x 3 is 1,179,648
    (1087, 1087): (3, 3),
    (9000, 9000): (3, 3),  # 4 x 4 is more than 12
    (1024, 512): (2, 1),
    (2000, 1000): (4, 2),  # over half of 8 tiles, 1,048,576
    (512, 1024): (1, 2),
    (300, 900): (1, 3),
    (1500, 4500): (2, 6),
    (100, 2000): (1, 12),  # 1:20; the nearest is 1:12
    (2000, 100): (12, 1),
    (640, 480): (4, 3),  # 4:3 exactly, however small the picture
    (1280, 720): (2, 1),  # 1.78: 2 is 0.22 off, 3:2 0.28; less than half of 4 x 2
    (1920, 1080): (4, 2),
    (3, 2): (3, 2),
    (1, 1): (1, 1),
    (1, 100_000): (1, 12),
}


@pytest.mark.parametrize("size", GRIDS)
def test_grid_by_hand(size):
    assert tile_grid(*size) == GRIDS[size]


def test_grid_between_two_ratios():
    """1.5 is as far from 1 as from 2: two tiles, if the picture covers more than one of them."""
    assert tile_grid(768, 512, max_tiles=2) == (2, 1)
    assert tile_grid(300, 200, max_tiles=2) == (1, 1)
    assert tile_grid(48, 32, tile=32, max_tiles=2) == (2, 1)


def test_grid_by_exhaustion():
    """The rule in exact fractions: nearest ratio, then the largest that is over half covered."""
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 3000, (300, 2)).tolist():
        most = int(generator.integers(1, 13))
        off = {}
        for columns in range(1, most + 1):
            for rows in range(1, most // columns + 1):
                distance = abs(Fraction(width, height) - Fraction(columns, rows))
                off.setdefault(distance, []).append((columns * rows, columns, rows))
        nearest = sorted(off[min(off)])
        covered = [grid for grid in nearest if 2 * width * height > 512 * 512 * grid[0]]
        assert tile_grid(width, height, max_tiles=most) == (covered or nearest[:1])[-1][1:]


@pytest.mark.parametrize(
    ("size", "options", "name"),
    [((0, 5), {}, "pixels"), ((5, 0), {}, "pixels"), ((5, 5), {"max_tiles": 13}, "max_tiles"),
     ((5, 5), {"max_tiles": 0}, "max_tiles")],
)  # fmt: skip
def test_bad_grids(size, options, name):
    with pytest.raises(ValueError, match=name):
        tile_grid(*size, **options)


def plain(width, height, colour=(255, 0, 51)):
    return Image.new("RGB", (width, height), colour)


def test_tiles_are_cut_row_by_row_and_a_thumbnail_follows():
    """Quarters of one colour each: a tile is one colour, the thumbnail has all four."""
    colours = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    image = Image.new("RGB", (64, 64))
    corners = [(0, 0), (32, 0), (0, 32), (32, 32)]
    for (x, y), colour in zip(corners, colours):
        image.paste(colour, (x, y, x + 32, y + 32))
    config = vl.config(norm_mean=[0.0, 0.5, 0.25], norm_std=[1.0, 0.5, 0.25])
    tiles = tile_pixels(config, image)
    assert tiles.shape == (5, 3, 32, 32) and tiles.dtype == torch.float32
    want = {0: [0, -1, -1], 255: [1, 1, 3]}
    for tile, (x, y), colour in zip(tiles, corners, colours):
        values = [want[value][channel] for channel, value in enumerate(colour)]
        assert torch.equal(tile, torch.tensor(values).view(3, 1, 1).expand(3, 32, 32).float())
        assert tiles[4][:, y // 2 + 4, x // 2 + 4].tolist() == values  # the thumbnail
    assert len(tile_pixels(dataclasses.replace(config, use_thumbnail=False), image)) == 4
    assert len(tile_pixels(config, image, max_tiles=1)) == 1
    assert len(tile_pixels(config, plain(32, 32))) == 1  # a single tile is its own thumbnail


def test_pixels_are_those_of_pillows_bicubic():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 77, 3), np.uint8))
    config = vl.config()
    columns, rows = tile_grid(77, 50, tile=32)
    whole = np.asarray(image.resize((32 * columns, 32 * rows), Image.Resampling.BICUBIC))
    mean, std = np.array(config.norm_mean), np.array(config.norm_std)
    want = ((whole / 255 - mean) / std).reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3)
    got = tile_pixels(config, image)[:-1].numpy().reshape(rows, columns, 3, 32, 32)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_frames_are_one_tile_each_without_thumbnail():
    frames = [plain(90, 30), plain(90, 30, (0, 0, 0))]
    pixels = frame_pixels(vl.config(norm_mean=[0.0] * 3, norm_std=[1.0] * 3), frames)
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[0, :, 5, 5].tolist() == pytest.approx([1, 0, 0.2]) and not pixels[1].any()
    assert frame_pixels(vl.config(), frames[:1]).shape == (1, 3, 32, 32)
    for count in (0, 129):
        with pytest.raises(ValueError, match="frames"):
            frame_pixels(vl.config(), frames[:1] * count)


@pytest.mark.parametrize("make", [lambda c: tile_pixels(c, plain(9, 9)),
                                  lambda c: frame_pixels(c, [plain(9, 9)])])  # fmt: skip
def test_constants_are_never_assumed(make):
    with pytest.raises(ValueError, match="`norm_mean` and `norm_std` are not known"):
        make(vl.config(norm_mean=None, norm_std=None))


@pytest.mark.parametrize("image", [Image.new("RGBA", (4, 4)), Image.new("L", (4, 4)),
                                   Image.new("RGB", (0, 4))])  # fmt: skip
def test_unread_pictures_are_refused(image):
    for make in (
        lambda: tile_pixels(vl.config(), image),
        lambda: frame_pixels(vl.config(), [image]),
    ):
        with pytest.raises(ImageError, match="expected an RGB picture"):
            make()


def png16(path, colour):
    """A 4 x 4 PNG of 16 bits per sample, which pillow reads but does not write for colour."""
    channels = 3 if colour else 1
    rows = b"".join(b"\0" + b"\x12\x34" * 4 * channels for _ in range(4))
    out = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2 if colour else 0, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + name + data
        out += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(out)


GREY = Image.new("L", (6, 4), 128)
READ = {
    "rgb.png": plain(6, 4),
    "grey.png": GREY,
    "bit.png": Image.new("1", (6, 4), 1),
    "palette.png": plain(6, 4).quantize(4),
    "cmyk.tiff": Image.new("CMYK", (6, 4)),
    "opaque.png": plain(6, 4).convert("RGBA"),
    "opaque-grey.png": GREY.convert("LA"),
    "photo.jpg": plain(6, 4),
    "old.bmp": plain(6, 4),
}


def test_16_bits_per_pixel_are_not_16_per_channel(tmp_path):
    """A BMP of 5, 6 and 5 bits: pure red, green, blue and white."""
    pixels = struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    start = 14 + len(header) + len(masks)
    file = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    (tmp_path / "a.bmp").write_bytes(file + header + masks + pixels)
    image = load_image(tmp_path / "a.bmp")
    assert [image.getpixel(at) for at in ((0, 1), (1, 1), (0, 0), (1, 0))] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    ]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_pictures_that_are_read(tmp_path, name):
    READ[name].save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (6, 4)
    want = READ[name].convert("RGB").getpixel((2, 2))
    assert image.getpixel((2, 2)) == pytest.approx(want, abs=2 if name.endswith("jpg") else 0)


def translucent(mode):
    image = plain(6, 4).convert("RGBA")
    image.putpixel((1, 1), (255, 0, 51, 254))
    return image if mode == "RGBA" else image.convert(mode)


BAD = {
    "alpha.png": (lambda p: translucent("RGBA").save(p), "transparent pixels"),
    "grey-alpha.png": (lambda p: translucent("LA").save(p), "transparent pixels"),
    "palette.png": (lambda p: Image.new("P", (4, 4)).save(p, transparency=0), "transparent"),
    "colour-key.png": (lambda p: plain(4, 4).save(p, transparency=(255, 0, 51)), "transparent"),
    "grey16.png": (lambda p: png16(p, False), "more than 8 bits"),
    "rgb16.png": (lambda p: png16(p, True), "more than 8 bits"),
    "int.tiff": (lambda p: Image.new("I", (4, 4)).save(p), "more than 8 bits"),
    "float.tiff": (lambda p: Image.new("F", (4, 4)).save(p), "more than 8 bits"),
    "text.png": (lambda p: p.write_text("no picture"), "not a usable picture"),
    "empty.png": (lambda p: p.write_bytes(b""), "not a usable picture"),
    "cut.png": (lambda p: cut(p), "not a usable picture"),
    "folder.png": (lambda p: p.mkdir(), "cannot be read"),
    "absent.png": (lambda p: None, "cannot be read"),
    "deep.pgm": (lambda p: p.write_bytes(b"P5 2 2 1023\n" + bytes(8)), "more than 8 bits"),
    "zero.pgm": (lambda p: p.write_bytes(b"P5 0 4 255\n"), "zero.pgm"),
}  # fmt: skip


def cut(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("name", BAD)
def test_pictures_that_are_refused(tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_too_large_to_be_meant_is_refused(tmp_path, monkeypatch):
    plain(60, 40).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"a\.png.*2400 pixels"):
        load_image(tmp_path / "a.png")


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    plain(4, 4).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImageError, match=r"pip install 'nemokernels\[vision\]'"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("frames", "fps", "want"),
    [
        (1, 30, [0]),
        (1, 2, [0]),
        (5, 2, [0, 1, 2, 3, 4]),
        (5, 0.5, [0, 1, 2, 3, 4]),  # slower than two per second: all
        (45, 30, [0, 15, 30]),
        (46, 30, [0, 15, 30, 45]),
        (6, 5, [0, 2, 5]),  # every 2.5 frames
        (128, 2, list(range(128))),
        (129, 2, [int(k * 129 / 128) for k in range(128)]),
        (256, 2, list(range(0, 256, 2))),
        (30 * 64, 30, list(range(0, 1920, 15))),
        (30 * 128, 30, list(range(0, 3840, 30))),  # longer than 64 seconds: spread
    ],
)
def test_frames_by_hand(frames, fps, want):
    assert frame_indices(frames, fps) == want


def test_frames_are_never_more_than_128():
    for frames in range(1, 2000, 7):
        for fps in (0.3, 2, 23.976, 30, 59.94):
            indices = frame_indices(frames, fps)
            assert len(indices) == len(set(indices)) <= 128 and indices[-1] < frames
            assert frames < 129 * max(fps / 2, 1) or len(indices) == 128


def animation(path, count, **options):
    shades = [Image.new("RGB", (8, 6), (40 * i, 0, 0)) for i in range(count)]
    shades[0].save(path, save_all=True, append_images=shades[1:], **options)


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_animations(tmp_path, name):
    animation(tmp_path / name, 5, duration=250)  # four per second: every second frame
    clip = load_clip(tmp_path / name)
    assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == [0, 80, 160]
    assert clip.seconds == [0.0, 0.5, 1.0]
    assert load_clip(tmp_path / name, fps=2).seconds == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_animation_without_durations_and_with_one_frame(tmp_path):
    animation(tmp_path / "still.gif", 3, duration=0)
    clip = load_clip(tmp_path / "still.gif")
    assert len(clip.frames) == 3 and clip.seconds is None
    animation(tmp_path / "some.gif", 3, duration=[250, 0, 250])
    assert load_clip(tmp_path / "some.gif").seconds is None
    plain(8, 6).save(tmp_path / "one.png")
    clip = load_clip(tmp_path / "one.png")
    assert len(clip.frames) == 1 and clip.seconds is None
    assert load_clip(tmp_path / "one.png", fps=25).seconds == [0.0]


def test_folders_of_frames(tmp_path):
    for index in range(6):
        plain(8, 6, (index, 0, 0)).save(tmp_path / f"frame-{index}.png")
    (tmp_path / ".hidden").write_text("")
    clip = load_clip(tmp_path)
    assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == [0, 1, 2, 3, 4, 5]
    assert clip.seconds is None
    clip = load_clip(tmp_path, fps=6)
    assert [frame.getpixel((0, 0))[0] for frame in clip.frames] == [0, 3]
    assert clip.seconds == [0.0, 3 * 166 / 1000]  # whole milliseconds per frame


def test_bad_clips(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="no frames"):
        load_clip(tmp_path / "empty")
    plain(8, 6).save(tmp_path / "a.png")
    plain(8, 7).save(tmp_path / "b.png")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ImageError, match="differ in size"):
        load_clip(tmp_path)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            load_clip(tmp_path, fps=fps)
    (tmp_path / "b.png").write_text("notes")
    with pytest.raises(ImageError, match=r"b\.png"):
        load_clip(tmp_path)
    animation(tmp_path / "c.gif", 3, duration=500)
    (tmp_path / "c.gif").write_bytes((tmp_path / "c.gif").read_bytes()[:-60])
    with pytest.raises(ImageError, match=r"c\.gif"):
        load_clip(tmp_path / "c.gif")
