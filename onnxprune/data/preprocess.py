"""From image files to what a network was trained on."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from onnxprune.data.batches import Input
from onnxprune.errors import UserError, printable
from onnxprune.model import Array

if TYPE_CHECKING:
    from PIL import Image

Layout = Literal["nchw", "nhwc"]
Colour = Literal["rgb", "bgr", "grey"]
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that runs another program
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CROP = 224 / 256  # of the short side, in the evaluation recipe of ImageNet models
LARGEST_SIDE = 2**14
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Unreadable(Exception):
    """One image that cannot be used; the message says why."""


def pillow() -> Any:
    """The module `PIL.Image`, which only images need."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("images need Pillow: pip install 'onnxprune[images]'") from None
    return Image


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes an input: decoded, resized (bilinear), cropped, `(x / 255 - mean) / std`, laid out.

    `mean` and `std` are single or per channel, in units of the 0 to 1 range, in the order red, green, blue
    whatever the order fed. `crop` is the share of the short side that is kept, in the centre (0.875 for ImageNet models); None
    stretches the whole image to the size. What is None is taken from the model: the layout and the channels
    from where its input has an extent of 1, 3 or 4, the size from the other extents. Where one side is open it
    follows the image's proportions. Integer inputs get 0 to 255. Alpha is dropped unless there are 4 channels;
    orientation tags are not applied (as in torchvision).
    """

    name: str = "imagenet"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float | None = CROP
    size: tuple[int, int] | None = None  # height, width
    layout: Layout | None = None
    colour: Colour | None = None

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """A preset, then settings: `-1-1,size=224,layout=nhwc,mean=0.5:0.5:0.5,std=0.5,bgr,crop=0.9`.

        Settings: `size=N` or `size=HxW`, `layout=nchw|nhwc`, `mean=` and `std=` (one value or one for each
        channel, between colons), `rgb|bgr|grey`, `resize` (stretch), `crop` or `crop=SHARE`. Without a preset
        at the front they change `0-1`. Raises `UserError`.
        """
        parts = [part.strip() for part in text.split(",")]
        result = PRESETS["0-1"]
        if parts[0].lower() in PRESETS:
            result = PRESETS[parts.pop(0).lower()]
        for part in parts:
            result = dataclasses.replace(result, **_setting(part))
        return result

    @classmethod
    def default(cls, value: Input) -> Preprocess:
        """ImageNet's for three channels, 0 to 1 otherwise: a guess, which the user is told."""
        return PRESETS["imagenet" if 3 in _channel_axes(value).values() else "0-1"]

    def settings(self) -> dict[str, Any]:
        """For reports."""
        return {
            "preset": self.name,
            "mean": list(self.mean),
            "std": list(self.std),
            "crop": self.crop,
            "size": None if self.size is None else list(self.size),
            "layout": self.layout,
            "colour": self.colour,
        }

    def __str__(self) -> str:
        """What `parse` reads."""
        size = "" if self.size is None else f",size={self.size[0]}x{self.size[1]}"
        layout = "" if self.layout is None else f",layout={self.layout}"
        mean, std = (":".join(repr(v) for v in values) for values in (self.mean, self.std))
        crop = "resize" if self.crop is None else f"crop={self.crop!r}"
        colour = "" if self.colour is None else f",{self.colour}"
        return f"{self.name}{size}{layout},mean={mean},std={std},{crop}{colour}"

    def resolve(self, value: Input, model: str) -> Pipeline:
        """The settings with what is taken from the input of the model. Raises `UserError`."""
        where = f"{model}: input '{printable(value.name)}' ({value})"
        if len(value.dims) != 4:
            raise UserError(f"{where} takes no images; it would have four axes")
        axes = _channel_axes(value)
        layout = self.layout or (next(iter(axes)) if len(axes) == 1 else None)
        if layout is None:
            raise UserError(
                f"{where}: the layout is not plain from the shape; add layout=nchw or layout=nhwc"
            )
        channels = axes.get(layout)
        if channels is None:
            open_axis = value.dims[1 if layout == "nchw" else 3]
            if open_axis is not None:
                raise UserError(f"{where} has {open_axis} channels as {layout}; images have 1, 3 or 4")
            channels = 1 if self.colour == "grey" else 3
        if (channels == 1) != ((self.colour or "grey") == "grey") and self.colour is not None:
            raise UserError(f"{where} takes {channels} channels, which are not {self.colour}")
        sides = value.dims[2:] if layout == "nchw" else value.dims[1:3]
        wanted: tuple[int | None, int | None] = (sides[0], sides[1])
        if self.size is not None:
            if any(side not in (None, n) for side, n in zip(sides, self.size, strict=True)):
                raise UserError(f"{where} does not take the size {self.size[0]}x{self.size[1]}")
            wanted = self.size
        elif wanted == (None, None):
            if self.name != "imagenet":
                raise UserError(
                    f"{where}: the image size is open; add size=N or size=HxW to the preprocessing"
                )
            wanted = (224, 224)
        mean, std = (_per_channel(v, channels, where) for v in (self.mean, self.std))
        return Pipeline(self, value, layout, channels, wanted, self.colour == "bgr", mean, std)


@dataclass(frozen=True)
class Pipeline:
    """Preprocessing for one input of a model."""

    settings: Preprocess
    input: Input
    layout: Layout
    channels: int
    size: tuple[int | None, int | None]
    bgr: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def report(self) -> dict[str, Any]:
        """The settings in force, those taken from the model included."""
        colour = "grey" if self.channels == 1 else "bgr" if self.bgr else "rgb"
        return {
            **self.settings.settings(),
            "mean": list(self.mean),
            "std": list(self.std),
            "size": list(self.size),
            "layout": self.layout,
            "colour": colour,
        }

    def __str__(self) -> str:
        height, width = ("any" if side is None else side for side in self.size)
        colour = self.report()["colour"]
        if self.input.dtype.kind in "iu":
            values = "0 to 255"
        else:
            mean, std = (":".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
            values = f"mean {mean}, std {std}"
        return f"{self.settings.name}: {height}x{width} {self.layout} {colour}, {values}"

    def open(self, source: Path | BinaryIO) -> Array:
        """The input from an image file, without a batch axis. Raises `Unreadable`."""
        module = pillow()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", module.DecompressionBombWarning)
                warnings.filterwarnings("ignore", category=UserWarning)  # about odd metadata
                with module.open(source, formats=FORMATS) as image:
                    image.load()
                    return self(image)
        except (module.DecompressionBombWarning, module.DecompressionBombError):
            raise Unreadable(f"has more than {module.MAX_IMAGE_PIXELS:,} pixels") from None
        except module.UnidentifiedImageError:
            raise Unreadable("is no image of a known format") from None
        except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
            text = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise Unreadable(f"cannot be read ({text[:120] or type(error).__name__})") from None
        except (TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError, Warning) as error:
            raise Unreadable(
                f"is damaged ({type(error).__name__})"
            ) from None  # what broken files make of Pillow

    def __call__(self, image: Image.Image) -> Array:
        """The input from a decoded image."""
        if image.mode.startswith("I;16"):
            image = pillow().fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = self._sized(image.convert(_MODES[self.channels]))
        pixels = np.asarray(image)
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        values: Array = pixels  # to be refused later where the input is of int8
        if self.input.dtype.kind not in "iu":
            mean, std = np.array([self.mean, self.std], dtype=np.float32)
            values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        if self.bgr:
            values = values[..., [2, 1, 0, *range(3, self.channels)]]
        return np.ascontiguousarray(values if self.layout == "nhwc" else values.transpose(2, 0, 1))

    def _sized(self, image: Image.Image) -> Image.Image:
        module = pillow()
        width, height = image.size
        down, across = self.size
        if down is None or across is None:  # one side is open
            if across is None:
                assert down is not None
                across = max(round(width * down / height), 1)
            else:
                down = max(round(height * across / width), 1)
            if max(down, across) > LARGEST_SIDE:
                raise Unreadable(f"is too long and narrow ({width}x{height})")
            return image.resize((across, down), module.Resampling.BILINEAR)
        if self.settings.crop is None:
            return image.resize((across, down), module.Resampling.BILINEAR)
        # the largest centred box of the target's proportions, less the border that is cropped
        scale = min(width / across, height / down) * self.settings.crop
        w, h = across * scale, down * scale
        left, top = (width - w) / 2, (height - h) / 2
        return image.resize((across, down), module.Resampling.BILINEAR, box=(left, top, left + w, top + h))


def _channel_axes(value: Input) -> dict[Layout, int]:
    """Layouts in which the input has 1, 3 or 4 channels, and how many."""
    if len(value.dims) != 4:
        return {}
    pairs: list[tuple[Layout, int | None]] = [("nchw", value.dims[1]), ("nhwc", value.dims[3])]
    return {layout: n for layout, n in pairs if n in (1, 3, 4) and n is not None}


def _per_channel(values: Sequence[float], channels: int, where: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return tuple(values) * channels
    if channels == 1:
        return (float(np.mean(values)),)
    raise UserError(f"{where} takes {channels} channels, and mean or std have {len(values)} values")


def _setting(part: str) -> dict[str, Any]:
    key, sign, text = (piece.strip().lower() for piece in part.partition("="))
    if not sign and key in ("rgb", "bgr", "grey", "gray"):
        return {"colour": key.replace("gray", "grey")}
    if not sign and key in ("resize", "crop"):
        return {"crop": CROP if key == "crop" else None}
    try:
        if key == "layout" and text in ("nchw", "nhwc"):
            return {"layout": text}
        if key == "size":
            sides = [int(side) for side in text.split("x")]
            if 1 <= len(sides) <= 2 and all(0 < side <= LARGEST_SIDE for side in sides):
                return {"size": (sides[0], sides[-1])}
        if key == "crop" and 0 < float(text) <= 1:
            return {"crop": float(text)}
        if key in ("mean", "std"):
            values = tuple(float(value) for value in text.split(":"))
            if all(math.isfinite(v) and (key == "mean" or v > 0) for v in values) and len(values) <= 4:
                return {key: values}
    except ValueError:
        pass
    raise UserError(
        f"--preprocess: '{printable(part)}' is no preset ({', '.join(PRESETS)}) and none of size=224, size=HxW, "
        "layout=nchw|nhwc, mean=a:b:c, std=a:b:c, rgb, bgr, grey, resize, crop=0.875"
    )


PRESETS = {
    "imagenet": Preprocess(),
    "0-1": Preprocess("0-1", (0.0,), (1.0,), None),
    "-1-1": Preprocess("-1-1", (0.5,), (0.5,), None),
}
