"""Every expected value is computed from the samples with NumPy; the files know no Pillow."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from depthvar.errors import InputError
from depthvar.training import pictures
from depthvar.training.pictures import Background, PictureError, read_picture
from tests.picture_files import exif, grey_profile, png, rgb_profile, tiff

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 2**16, (9, 11, 4), dtype=np.uint16)
DEEP[0, :4] = [[65535] * 4, [32896] * 4, [0] * 4, [128] * 4]
BYTES = RNG.integers(0, 256, (6, 8, 4), dtype=np.uint8)
INK = (10, 200, 30)
# Adobe RGB (1998) and sRGB in XYZ of D50, columns red, green, blue (their specifications)
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38506, 0.14308], [0.22250, 0.71688, 0.06062], [0.01393, 0.09710, 0.71417]]
)


def read(data: bytes, folder: Path, **options: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    path = folder / "picture"
    path.write_bytes(data)
    picture = read_picture(path, **options)
    return np.asarray(picture.image).astype(int), picture.conversions


def by_pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_8_bits(samples: np.ndarray) -> np.ndarray:
    return np.rint(samples / 257).astype(int)


def over(colours: np.ndarray, alpha: np.ndarray, behind: tuple[int, int, int]) -> np.ndarray:
    """Both in 0 ... 255."""
    share = alpha / 255
    return colours * share + np.array(behind) * (1 - share)


def in_srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


DEEP_FILES = {
    "grey PNG": (png(DEEP[..., :1], depth=16, colour_type=0), DEEP[..., :1]),
    "RGB PNG": (png(DEEP[..., :3], depth=16, colour_type=2), DEEP[..., :3]),
    "interlaced PNG": (
        png(DEEP[..., :3], depth=16, colour_type=2, interlaced=True),
        DEEP[..., :3],
    ),
    **{
        f"{name} TIFF {order} planar={planar}": (
            tiff(samples, photometric=photometric, order=order, planar=planar),
            samples,
        )
        for order in "<>"
        for name, samples, photometric, planar in (
            ("grey", DEEP[..., :1], 1, False),
            ("RGB", DEEP[..., :3], 2, False),
            ("RGB", DEEP[..., :3], 2, True),
        )
    },
    "white is zero": (tiff(DEEP[..., :1], photometric=0), 65535 - DEEP[..., :1]),
    "compressed TIFF": (
        by_pillow(Image.fromarray(DEEP[..., 0]), "TIFF", compression="tiff_deflate"),
        DEEP[..., :1],
    ),
    "PGM": (b"P5 11 9 65535\n" + DEEP[..., 0].astype(">u2").tobytes(), DEEP[..., :1]),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_16_bits_are_scaled_to_8_and_counted(name, tmp_path):
    data, samples = DEEP_FILES[name]
    pixels, conversions = read(data, tmp_path)
    assert (pixels == in_8_bits(samples)).all()
    assert conversions == (pictures.DEEP,)


@pytest.mark.parametrize(("colour_type", "colours"), [(6, 3), (4, 1)])
def test_16_bits_with_alpha_are_laid_over_the_background(colour_type, colours, tmp_path):
    samples = np.concatenate([DEEP[..., :colours], DEEP[..., 3:]], axis=2)
    data = png(samples, depth=16, colour_type=colour_type)
    pixels, conversions = read(data, tmp_path, background=Background("ink", INK))
    wanted = over(samples[..., :colours] / 257, samples[..., -1:] / 257, INK)
    assert np.abs(pixels - wanted).max() < 1.1
    assert conversions == (pictures.DEEP, "with transparency laid over ink")


def test_16_bit_cmyk_is_ink_on_white(tmp_path):
    pixels, _ = read(tiff(DEEP, photometric=5), tmp_path)
    wanted = (255 - DEEP[..., :3] / 257) * (255 - DEEP[..., 3:] / 257) / 255
    assert np.abs(pixels - wanted).max() < 1.1


FLOATS = (RNG.random((9, 11, 1)) * 10 - 5).astype(np.float32)
SIGNED = RNG.integers(-(2**15), 2**15, (9, 11, 1), dtype=np.int16)


@pytest.mark.parametrize("order", "<>")
def test_floats_are_scaled_by_the_range_that_they_state(order, tmp_path):
    tags = {340: ("f", [-4.0]), 341: ("f", [4.0])}
    pixels, conversions = read(tiff(FLOATS, photometric=1, order=order, tags=tags), tmp_path)
    wanted = (np.clip(FLOATS, -4, 4) + 4) / 8 * 255
    assert np.abs(pixels - wanted).max() < 0.51
    assert conversions == (pictures.RANGED,)
    pixels, _ = read(tiff(FLOATS, photometric=0, order=order, tags=tags), tmp_path)
    assert np.abs(pixels - (255 - wanted)).max() < 0.51


def test_signed_samples_are_scaled_by_the_range_that_they_state(tmp_path):
    tags = {340: ("h", [-(2**15)]), 341: ("h", [2**15 - 1])}
    pixels, _ = read(tiff(SIGNED, photometric=1, tags=tags), tmp_path)
    assert np.abs(pixels - (SIGNED.astype(float) + 2**15) / 257).max() < 0.51


def test_32_unsigned_bits_are_scaled_to_8(tmp_path):
    samples = RNG.integers(0, 2**32, (9, 11, 1), dtype=np.uint32)
    pixels, conversions = read(tiff(samples, photometric=1), tmp_path)
    assert np.abs(pixels - samples / (2**32 - 1) * 255).max() < 0.51
    assert conversions == (pictures.DEEP,)


def test_12_bits_are_scaled_to_8(tmp_path):
    samples = np.array([[0, 4095], [2048, 15], [1, 3000]])
    first, second = samples[:, :1], samples[:, 1:]
    packed = np.concatenate([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    tags = {256: ("I", [2]), 258: ("H", [12])}
    pixels, conversions = read(
        tiff(packed.astype(np.uint8)[..., None], photometric=1, tags=tags), tmp_path
    )
    assert (pixels == np.rint(samples / 4095 * 255)[..., None]).all()
    assert conversions == (pictures.DEEP,)


def test_numbers_without_a_range_are_refused(tmp_path):
    nan = {340: ("f", [0.0]), 341: ("f", [1.0])}
    backwards = {340: ("f", [1.0]), 341: ("f", [1.0])}
    for data, reason in (
        (tiff(FLOATS, photometric=1), "floating-point numbers without a stated range"),
        (tiff(SIGNED, photometric=1), "signed or 32-bit numbers without a stated range"),
        (tiff(FLOATS * np.nan, photometric=1, tags=nan), "no numbers"),
        (tiff(FLOATS, photometric=1, tags=backwards), "the range it states is 1 to 1"),
        (tiff(FLOATS.astype(np.float64), photometric=1), "a TIFF with samples of a kind"),
        (tiff(np.repeat(FLOATS, 3, 2), photometric=2), "a TIFF with samples of a kind"),
    ):
        with pytest.raises(PictureError, match=reason):
            read(data, tmp_path)


def key(*values: int) -> list[tuple[bytes, bytes]]:
    return [(b"tRNS", struct.pack(f">{len(values)}H", *values))]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_that_means_transparent_shows_the_background(depth, tmp_path):
    highest = 2**depth - 1
    samples = RNG.integers(0, highest + 1, (9, 11, 1))
    samples[3, 4] = 1
    pixels, _ = read(
        png(samples, depth=depth, colour_type=0, chunks=key(1)),
        tmp_path,
        background=Background("ink", INK),
    )
    wanted = np.repeat(np.rint(samples * 255 / highest), 3, axis=2)
    wanted[samples[..., 0] == 1] = INK
    assert (pixels == wanted).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_that_means_transparent_shows_the_background(depth, tmp_path):
    samples = RNG.integers(0, 2**depth, (9, 11, 3))
    samples[3, 4], samples[5, 6] = (1, 2, 3), (1, 2, 4)
    data = png(samples, depth=depth, colour_type=2, chunks=key(1, 2, 3))
    pixels, _ = read(data, tmp_path, background=Background("ink", INK))
    wanted = np.rint(samples * 255 / (2**depth - 1))
    wanted[3, 4] = INK
    assert (pixels == wanted).all()


@pytest.mark.parametrize("alphas", [bytes([0, 255, 128, 7]), bytes([255, 0, 255, 255]), b"\0\x40"])
def test_a_palette_with_transparency_shows_the_background(alphas, tmp_path):
    palette = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    places = RNG.integers(0, 4, (9, 11, 1))
    chunks = [(b"PLTE", palette.tobytes()), (b"tRNS", alphas)]
    data = png(places, depth=2, colour_type=3, chunks=chunks)
    pixels, conversions = read(data, tmp_path, background=Background("ink", INK))
    alpha = np.frombuffer(alphas.ljust(4, b"\xff"), dtype=np.uint8)[places]
    assert np.abs(pixels - over(palette[places[..., 0]], alpha, INK)).max() < 0.51
    assert conversions == ("with transparency laid over ink",)


ALPHA_FILES = {
    "RGBA PNG": png(BYTES, depth=8, colour_type=6),
    "RGBA WebP": by_pillow(Image.fromarray(BYTES), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": tiff(BYTES, photometric=2, tags={338: ("H", [2])}),
    "RGBA ICO": by_pillow(Image.fromarray(BYTES), "ICO", sizes=[(8, 6)]),
}


@pytest.mark.parametrize("name", ALPHA_FILES)
def test_what_is_partly_transparent_is_mixed_with_the_background(name, tmp_path):
    pixels, _ = read(ALPHA_FILES[name], tmp_path, background=Background("ink", INK))
    assert np.abs(pixels - over(BYTES[..., :3], BYTES[..., 3:], INK)).max() < 0.51


def test_grey_with_alpha_is_mixed_with_the_background(tmp_path):
    samples = BYTES[..., 2:]
    pixels, _ = read(png(samples, depth=8, colour_type=4), tmp_path)
    wanted = over(samples[..., :1], samples[..., 1:], (255, 255, 255))
    assert np.abs(pixels - wanted).max() < 0.51


@pytest.mark.parametrize("channels", [2, 4])
def test_premultiplied_alpha_is_added_to_the_background(channels, tmp_path):
    alpha = BYTES[..., 3:] | 64
    samples = np.concatenate([BYTES[..., : channels - 1] // 255 * alpha, alpha], axis=2)
    samples[..., :-1] = BYTES[..., : channels - 1].astype(int) * alpha // 255
    data = tiff(samples, photometric=channels // 2, tags={338: ("H", [1])})
    pixels, _ = read(data, tmp_path, background=Background("ink", INK))
    wanted = samples[..., :-1] + np.array(INK) * (1 - alpha / 255)
    assert np.abs(pixels - wanted).max() < 2.1


def test_an_alpha_that_is_whole_everywhere_is_no_conversion(tmp_path):
    whole = BYTES.copy()
    whole[..., 3] = 255
    pixels, conversions = read(png(whole, depth=8, colour_type=6), tmp_path)
    assert (pixels == whole[..., :3]).all()
    assert conversions == ()


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.3, tag 0x0112: which side of the scene the first row and column are."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1) if orientation in (3, 4, 7, 8) else slice(None)
    columns = slice(None, None, -1) if orientation in (2, 3, 6, 7) else slice(None)
    return pixels[rows, columns]


TURNED_FILES = {
    "PNG": lambda o: png(BYTES[..., :3], depth=8, colour_type=2, chunks=[(b"eXIf", exif(o))]),
    "PNG, late": lambda o: png(
        BYTES[..., :3], depth=8, colour_type=2, late_chunks=[(b"eXIf", exif(o))]
    ),
    "16-bit PNG": lambda o: png(
        BYTES[..., :3] * np.uint16(257), depth=16, colour_type=2, chunks=[(b"eXIf", exif(o))]
    ),
    "TIFF": lambda o: tiff(BYTES[..., :3], photometric=2, tags={274: ("H", [o])}),
    "16-bit TIFF": lambda o: tiff(
        BYTES[..., :3] * np.uint16(257), photometric=2, tags={274: ("H", [o])}
    ),
    "WebP": lambda o: by_pillow(
        Image.fromarray(BYTES[..., :3]), "WEBP", lossless=True, exif=b"Exif\0\0" + exif(o)
    ),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", TURNED_FILES)
def test_a_picture_is_turned_as_its_exif_says(name, orientation, tmp_path):
    pixels, conversions = read(TURNED_FILES[name](orientation), tmp_path)
    wanted = upright(BYTES[..., :3], orientation)
    assert pixels.shape == wanted.shape
    assert (pixels == wanted).all()
    assert (pictures.TURNED in conversions) == (orientation > 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_as_its_exif_says(orientation, tmp_path):
    blocks = np.kron(BYTES[:2, :3, :3] // 128 * 255, np.ones((16, 16, 1), dtype=np.uint8))
    data = by_pillow(
        Image.fromarray(blocks), "JPEG", quality=100, exif=b"Exif\0\0" + exif(orientation)
    )
    pixels, _ = read(data, tmp_path)
    wanted = upright(blocks, orientation)
    assert pixels.shape == wanted.shape
    assert np.abs(pixels[8::16, 8::16] - wanted[8::16, 8::16]).max() < 16


@pytest.mark.parametrize("block", [exif(0), exif(9), b"II*\0\xff\xff\xff\xff", b"junk", b""])
def test_exif_that_says_nothing_turns_nothing(block, tmp_path):
    data = png(BYTES[..., :3], depth=8, colour_type=2, chunks=[(b"eXIf", block)])
    pixels, conversions = read(data, tmp_path)
    assert (pixels == BYTES[..., :3]).all()
    assert conversions == ()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_a_colour_profile_is_converted_to_srgb(kind, tmp_path):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(BYTES[..., :3])
    data = by_pillow(image, kind, icc_profile=rgb_profile(ADOBE, 2.2), **options)
    pixels, conversions = read(data, tmp_path)
    wanted = in_srgb((BYTES[..., :3] / 255) ** 2.2 @ ADOBE.T @ np.linalg.inv(SRGB).T)
    assert np.abs(wanted - BYTES[..., :3]).max() > 20
    assert np.abs(pixels - wanted).max() < 1.5
    assert conversions == (pictures.PROFILE,)


def test_a_grey_profile_is_converted_to_srgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = by_pillow(Image.fromarray(grey), "PNG", icc_profile=grey_profile(1.0))
    pixels, conversions = read(data, tmp_path)
    assert np.abs(pixels - in_srgb(grey[..., None] / 255)).max() < 1
    assert conversions == (pictures.PROFILE,)


def test_colours_are_converted_before_they_are_laid_over_the_background(tmp_path):
    data = by_pillow(Image.fromarray(BYTES), "PNG", icc_profile=rgb_profile(ADOBE, 2.2))
    pixels, _ = read(data, tmp_path, background=Background("ink", INK))
    colours = in_srgb((BYTES[..., :3] / 255) ** 2.2 @ ADOBE.T @ np.linalg.inv(SRGB).T)
    assert np.abs(pixels - over(colours, BYTES[..., 3:], INK)).max() < 1.5


@pytest.mark.parametrize("profile", [b"junk", grey_profile(2.2), rgb_profile(ADOBE, 2.2)[:200]])
def test_a_profile_that_does_not_apply_is_left_out_and_counted(profile, tmp_path):
    data = by_pillow(Image.fromarray(BYTES[..., :3]), "PNG", icc_profile=profile)
    pixels, conversions = read(data, tmp_path)
    assert (pixels == BYTES[..., :3]).all()
    assert conversions == (pictures.BROKEN_PROFILE,)


def test_srgb_itself_is_no_conversion(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = by_pillow(Image.fromarray(BYTES[..., :3]), "PNG", icc_profile=profile)
    pixels, conversions = read(data, tmp_path)
    assert (pixels == BYTES[..., :3]).all()
    assert conversions == ()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_with_a_gamma_of_its_own_is_corrected(depth, tmp_path):
    samples = DEEP[..., :3] >> (16 - depth)
    linear = [(b"gAMA", struct.pack(">I", 100_000))]
    pixels, conversions = read(png(samples, depth=depth, colour_type=2, chunks=linear), tmp_path)
    wanted = 255 * (samples / (2**depth - 1)) ** (1 / 2.2)
    assert np.abs(pixels - wanted).max() < 0.51
    assert pictures.GAMMA in conversions
    for chunks in ([(b"gAMA", struct.pack(">I", 45_455))], [*linear, (b"sRGB", b"\0")]):
        pixels, _ = read(png(samples, depth=depth, colour_type=2, chunks=chunks), tmp_path)
        assert (pixels == np.rint(samples / (2**depth - 1) * 255)).all()


def test_a_profile_of_more_channels_than_the_picture_is_left_out_of_grey(tmp_path):
    data = by_pillow(Image.fromarray(BYTES[..., 0]), "PNG", icc_profile=rgb_profile(ADOBE, 2.2))
    pixels, conversions = read(data, tmp_path)
    assert (pixels == BYTES[..., :1]).all()
    assert conversions == (pictures.BROKEN_PROFILE,)


def test_cmyk_is_ink_on_white(tmp_path):
    blocks = np.kron(BYTES[:2, :3], np.ones((16, 16, 1), dtype=np.uint8))
    wanted = (255 - blocks[..., :3].astype(float)) * (255 - blocks[..., 3:]) / 255
    image = Image.frombytes("CMYK", (48, 32), blocks.tobytes())
    for data in (by_pillow(image, "JPEG", quality=100), tiff(blocks, photometric=5)):
        pixels, conversions = read(data, tmp_path)
        assert np.abs(pixels - wanted)[8::16, 8::16].max() < 4
        assert conversions == ("in CMYK converted to RGB",)


def test_lab_white_is_white_and_lab_grey_has_no_colour(tmp_path):
    samples = np.array([[[255, 0, 0], [128, 0, 0]]], dtype=np.uint8)
    pixels, conversions = read(tiff(samples, photometric=8), tmp_path)
    lightness = 128 / 255 * 100
    grey = in_srgb(np.array(((lightness + 16) / 116) ** 3))
    assert np.abs(pixels[0, 0] - 255).max() <= 1
    assert np.abs(pixels[0, 1] - grey).max() <= 2
    assert conversions == ("in LAB converted to RGB",)


@pytest.mark.parametrize("photometric", [0, 1])
def test_a_tiff_says_whether_zero_is_white(photometric, tmp_path):
    pixels, _ = read(tiff(BYTES[..., :1], photometric=photometric), tmp_path)
    wanted = BYTES[..., :1] if photometric else 255 - BYTES[..., :1]
    assert (pixels == wanted).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_read_by_its_first_frame(kind, tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = by_pillow(first, kind, save_all=True, append_images=[second], **options)
    pixels, conversions = read(data, tmp_path)
    assert (pixels == (255, 0, 0)).all()
    assert conversions == (pictures.FRAMES,)


def test_a_gif_shows_the_background_where_it_is_transparent_or_uncovered(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 0)
    whole = by_pillow(image, "GIF", transparency=0)
    pixels, _ = read(whole, tmp_path, background=Background("ink", INK))
    wanted = np.full((4, 4, 3), (255, 0, 0))
    wanted[0, 1] = INK
    assert (pixels == wanted).all()
    opaque = by_pillow(image, "GIF")
    larger = opaque[:6] + struct.pack("<HH", 6, 5) + opaque[10:]
    pixels, _ = read(larger, tmp_path, background=Background("ink", INK))
    wanted[0, 1] = (0, 0, 255)
    assert (pixels[:4, :4] == wanted).all()
    assert (pixels[4:] == INK).all()
    assert (pixels[:, 4:] == INK).all()


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("white", (255, 255, 255)),
        ("Black", (0, 0, 0)),
        ("#08f", (0, 136, 255)),
        (" #102030 ", (16, 32, 48)),
    ],
)
def test_a_background_is_a_name_or_a_number(text, colour):
    assert Background.of(text).colour == colour


@pytest.mark.parametrize("text", ["", "nocolour", "#12", "#11223344", "16,32,48"])
def test_no_colour_is_no_background(text):
    with pytest.raises(InputError, match="got the background"):
        Background.of(text)


def large_png(width: int, height: int) -> bytes:
    """A header that promises a picture, and no pixels."""
    data = png(np.zeros((1, 1, 1)), depth=1, colour_type=0)
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


JPEG = by_pillow(Image.fromarray(np.kron(BYTES[..., :3], np.ones((9, 9, 1), np.uint8))), "JPEG")
BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "text": (b"not an image", "not one that Pillow reads"),
    "HTML": (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "SVG": (b'<?xml version="1.0"?>\n<svg xmlns=""></svg>', "an SVG drawing"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
    "cut JPEG": (JPEG[:-300], "damaged or cut off"),
    "cut PNG": (png(BYTES, depth=8, colour_type=6)[:120], "damaged or cut off"),
    "cut TIFF": (tiff(BYTES[..., :3], photometric=2)[:100], "damaged|a TIFF"),
    "too large": (large_png(20_000, 10_000), "200000000 pixels.* make it smaller"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_a_picture_says_why(name, tmp_path):
    data, reason = BAD_FILES[name]
    with pytest.raises(PictureError, match=reason):
        read(data, tmp_path)


def test_a_large_picture_within_the_limit_is_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    pixels, _ = read(png(BYTES, depth=8, colour_type=6), tmp_path)
    assert pixels.shape == (6, 8, 3)
    assert not list(recwarn)


def test_what_cannot_be_opened_says_why_and_is_not_waited_for(tmp_path, monkeypatch):
    gone, loop, pipe, plug = (tmp_path / name for name in ("gone", "loop", "pipe", "plug"))
    gone.symlink_to("nowhere.png")
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("plug")
    for path, reason in (
        (gone, r"a link to 'nowhere\.png', which does not exist"),
        (loop, "it cannot be opened .*symbolic links"),
        (pipe, "not a regular file"),
        (plug, "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "absent", "does not exist any more"),
    ):
        with pytest.raises(PictureError, match=reason):
            read_picture(path)


def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PictureError, match=r"cannot be opened \(Permission denied\)"):
        read(JPEG, tmp_path)


def test_a_wrong_suffix_is_no_matter(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(png(BYTES[..., :3], depth=8, colour_type=2))
    assert (np.asarray(read_picture(path).image) == BYTES[..., :3]).all()
