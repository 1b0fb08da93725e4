"""A picture file as a viewer shows it: 8-bit RGB, upright, over a background, by its first frame.

Pillow's own conversion to RGB clips 16-bit and floating-point samples, forgets transparency, and
leaves orientation, colour profiles and gamma to its caller.

Shape legend: H W sides, C channels.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from depthvar.errors import InputError

DEEP = "of more than 8 bits scaled to 8"
RANGED = "of numbers scaled from their stated range"
TURNED = "turned as their EXIF says"
FRAMES = "of several frames by the first"
PROFILE = "with a colour profile converted to sRGB"
BROKEN_PROFILE = "with an unusable colour profile left out"
GAMMA = "with a gamma of their own corrected"

_DISPLAY_GAMMA = 2.2
_GAMMA_TOLERANCE = 0.05
"""PNG's own decoders take a gamma this near to that of a display for the same (libpng)."""
_SRGB_TOLERANCE = 2
"""A profile that moves no colour by more is sRGB under another name."""
_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_SWAPPED = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
# TIFF tags
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LOWEST, _HIGHEST = 258, 262, 339, 340, 341
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class PictureError(Exception):
    """A file that gives no picture; the message is the reason, to follow the file's name."""


@dataclass(frozen=True)
class Picture:
    """8-bit RGB without transparency, and what was converted to get there."""

    image: Image.Image
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class Background:
    """What shows where a picture is transparent: red, green and blue of 0 ... 255."""

    name: str
    colour: tuple[int, int, int]

    @staticmethod
    def of(text: str) -> Background:
        """A colour by name, as `#rgb` or as `#rrggbb`. Errors: `InputError`."""
        try:
            colour = ImageColor.getrgb(text.strip())
            if len(colour) == 3:
                return Background(text.strip(), colour)
        except ValueError:
            pass
        raise InputError(
            f"got the background {text!r}, wanted a colour by name, '#rgb' or '#rrggbb': correct it"
        )


WHITE = Background("white", (255, 255, 255))


def read_picture(path: Path, background: Background = WHITE) -> Picture:
    """The picture in a file; what is transparent shows the background.

    Samples of more than 8 bits are scaled from their full range, floats and signed ones from the
    range that their TIFF states (SMinSampleValue, SMaxSampleValue).
    Errors: `PictureError` for whatever is no picture, is damaged, or has no range to scale from.
    """
    data = _file_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, of damaged metadata that is passed over
            return _decoded(data, background)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(_unidentified(data)) from error
    except Image.DecompressionBombError as error:
        size = str(error).partition(", could")[0]
        raise PictureError(f"{size[:1].lower()}{size[1:]}, make it smaller") from error
    except Exception as error:  # Pillow's decoders raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"damaged or cut off ({reason})") from error


def _file_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise PictureError("not a regular file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            target = os.readlink(path)
            raise PictureError(f"a link to {target!r}, which does not exist") from error
        raise PictureError("it does not exist any more") from error
    except OSError as error:
        raise PictureError(f"it cannot be opened ({error.strerror or error})") from error
    if not data:
        raise PictureError("the file is empty, 0 bytes")
    return data


def _unidentified(data: bytes) -> str:
    """What a file is that Pillow does not take for a picture."""
    head = data[:1024].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in its place, run git lfs pull"
    if b"<svg" in head:
        return "an SVG drawing, wanted pixels"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page in its place"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "a HEIC picture, wanted JPEG, PNG, WebP or TIFF"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF with samples of a kind that Pillow does not read, wanted 8 or 16 bits"
    return "its format is not one that Pillow reads"


def _decoded(data: bytes, background: Background) -> Picture:
    image: Image.Image = Image.open(io.BytesIO(data))
    rawmode, box, done = _rawmode(image), _frame_box(image), []
    if _is_turned(image):
        done.append(TURNED)
    if _has_more_frames(data):
        done.append(FRAMES)
    image = _upright(image)
    exponent = _gamma_exponent(image.info)
    if image.mode == "F" or image.mode.startswith("I"):
        colour, alpha, how = _wide_grey(image, exponent)
        done.append(how)
    elif (samples_HWC := _sixteen_bits(image, data, rawmode)) is not None:
        colour, alpha = _sixteen_bit_layers(image, samples_HWC, exponent)
        done.append(DEEP)
    else:
        colour, alpha = _layers(image, rawmode)
        if box is not None:
            alpha = _alpha_inside(box, alpha or Image.new("L", image.size, 255))
        if exponent != 1:
            colour = colour.convert("RGB").point(_byte_table(255, exponent).tolist() * 3)
        if ";16" in rawmode:
            done.append(DEEP)
    if exponent != 1:
        done.append(GAMMA)
    if colour.mode not in ("1", "L", "RGB"):
        done.append(f"in {colour.mode} converted to RGB")
    colour, how_managed = _in_srgb(colour, image.info)
    done += how_managed
    if alpha is not None and alpha.getextrema()[0] != 255:
        behind = Image.new("RGB", colour.size, background.colour)
        colour = Image.composite(colour, behind, alpha)
        done.append(f"with transparency laid over {background.name}")
    return Picture(colour, tuple(done))


def _rawmode(image: Image.Image) -> str:
    """How the samples lie in the file, before it is loaded: `RGB;16B`, say."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _frame_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Where the first frame of a GIF lies if it leaves parts of the canvas uncovered."""
    tiles = getattr(image, "tile", None)
    if image.format != "GIF" or not tiles or tiles[0][1] == (0, 0, *image.size):
        return None
    box: tuple[int, int, int, int] = tiles[0][1]
    return box


def _alpha_inside(box: tuple[int, int, int, int], alpha: Image.Image) -> Image.Image:
    """An alpha with nothing outside of a box."""
    inside = Image.new("L", alpha.size)
    inside.paste(alpha.crop(box), box)
    return inside


def _is_turned(image: Image.Image) -> bool:
    with suppress(Exception):  # a viewer passes over EXIF that it cannot read
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    return False


def _has_more_frames(data: bytes) -> bool:
    """On a file of its own: to count frames is to leave the first."""
    with suppress(Exception):  # a frame that is never shown may be damaged
        return bool(getattr(Image.open(io.BytesIO(data)), "is_animated", False))
    return False


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # as in `_is_turned`
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _gamma_exponent(info: Mapping[Any, Any]) -> float:
    """The power that takes a PNG's samples to a display's; a profile or sRGB mark comes first."""
    gamma = info.get("gamma")
    if not gamma or "srgb" in info or info.get("icc_profile"):
        return 1.0
    exponent = 1 / (_DISPLAY_GAMMA * gamma)
    return 1.0 if abs(exponent - 1) < _GAMMA_TOLERANCE else exponent


def _byte_table(highest: int, exponent: float) -> np.ndarray:
    """The byte of every sample 0 ... highest, uint8."""
    return _to_bytes(np.arange(highest + 1) / highest, exponent)


def _to_bytes(fractions: np.ndarray, exponent: float) -> np.ndarray:
    bytes_: np.ndarray = np.rint(fractions**exponent * 255).astype(np.uint8)
    return bytes_


def _wide_grey(image: Image.Image, exponent: float) -> tuple[Image.Image, Image.Image | None, str]:
    """Grey of 16 or 32 bits or of floats: 8 bits, the alpha of a colour key, and how."""
    tags: Any = getattr(image, "tag_v2", {})
    samples_HW = np.asarray(image)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.uint8(255) * (samples_HW != key))
    stated = tags.get(_LOWEST), tags.get(_HIGHEST)
    if image.mode.startswith("I;16"):
        low, high, how = 0.0, 2.0 ** int(np.ravel(tags.get(_BITS, 16))[0]) - 1, DEEP
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        low, high, how = 0.0, 2.0**16 - 1, DEEP
    elif None not in stated:
        low, high = (float(np.ravel(value)[0]) for value in stated)
        how = RANGED
    elif image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        samples_HW = samples_HW.view(np.uint32)
        low, high, how = 0.0, 2.0**32 - 1, DEEP
    else:
        kind = "floating-point numbers" if image.mode == "F" else "signed or 32-bit numbers"
        raise PictureError(
            f"{kind} without a stated range (SMinSampleValue, SMaxSampleValue), save it with 8 or "
            "16 bits"
        )
    if not (np.isfinite([low, high]).all() and low < high):
        raise PictureError(f"the range it states is {low:g} to {high:g}, save it with 8 or 16 bits")
    if np.isnan(samples_HW).any():
        raise PictureError("samples that are no numbers (NaN)")
    fractions_HW = (np.clip(samples_HW.astype(np.float64), low, high) - low) / (high - low)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        fractions_HW = 1 - fractions_HW
    return Image.fromarray(_to_bytes(fractions_HW, exponent)), alpha, how


def _sixteen_bits(image: Image.Image, data: bytes, rawmode: str) -> np.ndarray | None:
    """All 16 bits of several channels, uint16 (H, W, C), of which Pillow gives the upper 8.

    The file is read a second time with its bytes named in the other order. None for 8 bits, and
    where Pillow has no name for the other order.
    """
    if image.format not in ("PNG", "TIFF"):
        return None
    if rawmode == "LA;16B":
        pairs_HW4 = np.asarray(_reread(data, "RGBA")).astype(np.uint16)
        return pairs_HW4[..., 0::2] << 8 | pairs_HW4[..., 1::2]
    tags: Any = getattr(image, "tag_v2", {})
    if len(rawmode) == 1 and rawmode == image.mode[0] and max(np.ravel(tags.get(_BITS, 8))) == 16:
        order = "B" if tags.prefix == b"MM" else "L"
        bytes_of = [np.asarray(_reread(data, f";16{o}")) for o in (order, _SWAPPED[order])]
    elif rawmode[:-1] in ("RGB;16", "RGBA;16", "RGBX;16", "CMYK;16"):
        swapped = rawmode[:-1] + _SWAPPED[rawmode[-1]]
        bytes_of = [np.asarray(image), np.asarray(_reread(data, swapped))]
    else:
        return None
    upper_HWC, lower_HWC = (part.astype(np.uint16) for part in bytes_of)
    return upper_HWC << 8 | lower_HWC


def _reread(data: bytes, rawmode: str) -> Image.Image:
    """The picture with its samples taken for `rawmode`, or each plane's letter with that suffix."""
    image: Any = Image.open(io.BytesIO(data))
    tiles = []
    for tile in image.tile:
        first, *others = [tile.args] if isinstance(tile.args, str) else tile.args
        name = first + rawmode if rawmode.startswith(";") else rawmode
        tiles.append(tile._replace(args=(name, *others) if others else name))
    image.tile = tiles
    return _upright(image)


def _sixteen_bit_layers(
    image: Image.Image, samples_HWC: np.ndarray, exponent: float
) -> tuple[Image.Image, Image.Image | None]:
    """Colour and alpha in 8 bits; a colour key is compared in all 16."""
    num_colours = {2: 1, 3: 3, 4: 4 if image.mode == "CMYK" else 3}[samples_HWC.shape[2]]
    colours_HWC = samples_HWC[..., :num_colours]
    key, alpha = image.info.get("transparency"), None
    if num_colours < samples_HWC.shape[2]:
        alpha = Image.fromarray(_byte_table(2**16 - 1, 1.0)[samples_HWC[..., -1]])
    elif key is not None:
        alpha = Image.fromarray(np.uint8(255) * (colours_HWC != key).any(axis=2))
    bytes_HWC = _byte_table(2**16 - 1, exponent)[colours_HWC]
    bands = [Image.fromarray(bytes_HW) for bytes_HW in np.moveaxis(bytes_HWC, 2, 0)]
    return Image.merge({1: "L", 3: "RGB", 4: "CMYK"}[num_colours], bands), alpha


def _layers(image: Image.Image, rawmode: str) -> tuple[Image.Image, Image.Image | None]:
    """Colour and alpha of a picture of 8 bits or fewer."""
    if image.mode == "L" and rawmode in ("L;2", "L;4") and "transparency" in image.info:
        # Pillow spreads these samples over 0 ... 255, but not the colour key
        image.info["transparency"] *= 255 // (2 ** int(rawmode[-1]) - 1)
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    is_keyed = image.mode in ("1", "L", "P", "RGB") and image.has_transparency_data
    if is_keyed or image.mode == "PA":
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image.convert("RGB") if image.mode in ("P", "RGBX") else image, None


def _in_srgb(colour: Image.Image, info: Mapping[Any, Any]) -> tuple[Image.Image, list[str]]:
    """The colours in sRGB, and what was done with a colour profile."""
    if colour.mode in ("1", "YCbCr"):
        colour = colour.convert("L" if colour.mode == "1" else "RGB")
    profile = info.get("icc_profile", b"")
    if profile == b"":
        return colour.convert("RGB"), []
    try:
        transform = _transform(profile, colour.mode)
    except Exception:  # no profile, or one of other channels: Pillow and littlecms raise many types
        return colour.convert("RGB"), [BROKEN_PROFILE]
    if transform is None:
        return colour.convert("RGB"), []
    converted: Image.Image = transform.apply(colour)
    return converted, [PROFILE]


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that changes nothing to speak of."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != _COLOUR_SPACES[mode]:
        raise ValueError(f"a profile of {space} on a picture in {mode}")
    # littlecms tabulates a curve of grey too coarsely for its darks unless told not to
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    srgb = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, srgb, mode, "RGB", flags=flags)
    if mode == "CMYK":
        return transform
    levels = range(0, 256, 15)
    colours = [(r, g, b) for r in levels for g in levels for b in levels]
    if mode == "L":
        colours = [(grey, grey, grey) for grey in range(256)]
    ramp = Image.fromarray(np.array([colours], dtype=np.uint8)).convert(mode)
    moved = np.asarray(transform.apply(ramp)).astype(int) - np.asarray(ramp.convert("RGB"))
    return None if np.abs(moved).max() <= _SRGB_TOLERANCE else transform
