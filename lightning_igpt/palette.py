"""A palette: K colors, and the exact mapping between images and palette ids.

Source: Chen et al., "Generative Pretraining from Pixels" (ICML 2020), section 2.1 (9-bit palette, raster order);
``src/utils.py`` and ``src/run.py`` of github.com/openai/image-gpt (nearest center, decoding).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_igpt.config import plain
from lightning_igpt.files import replacing
from lightning_igpt.images import decode_form, resize_center_crop
from lightning_igpt.lookup import table_for
from lightning_igpt.pictures import to_pil

MAX_COLORS = 32768  # ids fit into int16
PALETTE_COLUMN = "palette"
_OPENAI = Path(__file__).parent / "assets" / "openai_512.npy"
_HF_FILE = "preprocessor_config.json"
_MAX_BYTES = 8_000_000  # of a file of colors; the largest palette takes 4 MB as JSON
_CHANNEL = (np.arange(256) / 127.5 - 1)[:, None].astype(np.float32)  # the values of a channel's bytes
_PIXELS = 1 << 22  # quantized at a time, which bounds the memory of large batches

Colors: TypeAlias = Sequence[Sequence[float]] | NDArray[Any] | Tensor
TokenRows: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]


class Palette:
    """K colors. Immutable; compared and hashed by their float32 bytes; a pickle holds only the colors.

    Args:
        colors: (K,3) array, tensor or nested list in [-1,1], red, green, blue, 2 <= K <= 32,768; stored as float32. Or
            (256,1), the values of the bytes 0 to 255: the palette ``rgb``, of which a pixel is three tokens.

    Raises:
        ValueError: The colors are not as above, or a color occurs twice, so that its second id could never be used.
    """

    __slots__ = ("_array", "_sha256")

    def __init__(self, colors: Colors) -> None:
        self._array = _checked(plain(colors))  # (K, 3) float32, read-only
        self._sha256 = hashlib.sha256(self._array.astype("<f4").tobytes()).hexdigest()

    @classmethod
    def load(cls, spec: Palette | str | Path | Colors) -> Palette:
        """The palette for a name, a file, a hub id or colors.

        Args:
            spec: A palette; ``"openai"`` (the 512 released colors); ``"gray:K"`` (K even steps from black to white);
                ``"rgb"`` (the bytes of the channels, three tokens per pixel); (K,3) colors in [-1,1]; a ``.npy`` file
                of these; a Hugging Face folder, its ``preprocessor_config.json``, or its hub id ``owner/name``. Names
                take precedence over paths, and paths over hub ids.

        Raises:
            FileNotFoundError: A path does not exist.
            ValueError: ``spec`` is none of these, or the colors are not valid.
        """
        if isinstance(spec, Palette):
            return spec
        if isinstance(spec, str) and re.fullmatch(r"openai|rgb|gray:\d{1,5}", spec):
            return _named(spec)
        return _from_file(str(spec)) if isinstance(spec, str | Path) else cls(spec)

    @property
    def colors(self) -> Tensor:
        """(K,3) float32 in [-1,1], red, green, blue, or (256,1) of ``rgb``; a copy."""
        return torch.from_numpy(self._array.copy())

    @property
    def rgb(self) -> Tensor:
        """The bytes of each color in an image, uint8 (K, 3), ``rint(127.5 * (c + 1))``, as a copy; of ``rgb`` grays."""
        values = np.rint(127.5 * (self._array.astype(np.float64) + 1)).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(values.repeat(self.tokens_per_pixel, axis=1))

    @property
    def tokens_per_pixel(self) -> int:
        """3 for ``rgb``, else 1."""
        return 3 // int(self._array.shape[1])

    @property
    def is_exact(self) -> bool:
        """Whether a token is a byte, of a channel (``rgb``) or of a gray pixel (``gray:256``), and so one dimension."""
        return self in (_named("rgb"), _named("gray:256"))

    @property
    def sha256(self) -> str:
        """Hex digest of the little-endian float32 bytes of the colors, row by row."""
        return self._sha256

    @property
    def spec(self) -> str | list[list[float]]:
        """A plain value for hyperparameters and YAML; :meth:`load` returns an equal palette for it."""
        return next((name for name in ("openai", "rgb", f"gray:{len(self)}") if _named(name) == self), self.to_list())

    def to_list(self) -> list[list[float]]:
        """K rows of three Python floats, of ``rgb`` of one, exact."""
        return self._array.tolist()  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write the float32 colors to a file that ends in ``.npy``; create its folder if necessary."""
        path = Path(path)
        if path.suffix != ".npy":
            raise ValueError(f"a palette is saved as a .npy file, not as {path.name!r}")
        with replacing(path) as temporary:
            np.save(temporary, self._array)

    def quantize(self, images: Tensor) -> Tensor:
        """The id of the color nearest to every pixel.

        Nearest in squared Euclidean distance between ``byte / 127.5 - 1`` and the colors, in float64; the lowest id
        wins a tie. Looked up in a table of all 2^24 colors, built once and cached on disk; ``rgb`` takes the bytes.

        Args:
            images: uint8 (B,3,H,W) on any device; anything else is a TypeError or ValueError.

        Returns:
            int64 (B,H*W) on the same device, in raster order; of ``rgb`` (B,3*H*W), a pixel's channels in succession.
        """
        check_images(images)
        if self.tokens_per_pixel == 3:
            return images.permute(0, 2, 3, 1).long().flatten(1)
        red, green, blue = images.unbind(1)  # (B, H, W)
        codes = red.int().bitwise_left_shift_(8).bitwise_or_(green).bitwise_left_shift_(8).bitwise_or_(blue)
        table: Tensor = table_for(self, images.device)
        return table.index_select(0, codes.flatten()).long().view(codes.shape).flatten(1)  # the fastest gather

    def dequantize(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """The images of palette ids.

        Args:
            tokens: (B,T) of any integer type, ids below K, as ``quantize`` returns them for (B,3,size,size).
            size: Side of the images in pixels; by default what T says.

        Returns:
            uint8 (B,3,size,size) on the same device.

        Raises:
            TypeError, ValueError: The tokens are not integers, T does not fit the size, or an id is outside 0..K-1 (on
                CUDA devices not checked, which would synchronize; there a device-side assertion fails).
        """
        size = side_of(tokens, size, self.tokens_per_pixel)
        tokens = tokens.long()
        if tokens.device.type != "cuda" and tokens.numel():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= len(self):
                raise ValueError(f"tokens run from {low} to {high}; the {len(self)} colors have ids 0..{len(self) - 1}")
        pixels = self.rgb[:, : self._array.shape[1]].to(tokens.device).index_select(0, tokens.flatten())
        return pixels.view(tokens.shape[0], size, size, 3).permute(0, 3, 1, 2).contiguous()

    def to_images(self, tokens: TokenRows, size: int | None = None) -> list[Image.Image]:
        """:meth:`dequantize` to PIL images of mode RGB; ``tokens`` (B,T) or (T,) may also be an array or lists."""
        return [to_pil(image) for image in self.dequantize(token_rows(tokens), size).cpu()]

    def transform(self, image_column: str = "image", size: int = 32) -> PaletteTransform:
        """:meth:`quantize` for ``with_transform`` and ``map(batched=True)`` of a Hugging Face dataset."""
        return PaletteTransform(self, image_column, size)

    def rmse(self, images: Tensor) -> float:
        """Root mean square error per channel, in 0..255, of ``dequantize(quantize(images))`` for uint8 (B,3,H,W)."""
        shown = self.rgb[:, : self._array.shape[1]].to(images.device)[self.quantize(images)]  # (B, T, 3), of rgb 1
        error = shown.flatten(1).float() - images.permute(0, 2, 3, 1).flatten(1).float()
        return float(error.square().mean(dtype=torch.float64).sqrt())

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def __eq__(self, other: object) -> bool:
        return self.sha256 == other.sha256 if isinstance(other, Palette) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Palette({len(self)} colors, sha256 {self._sha256[:12]})"

    def __reduce__(self) -> tuple[type[Palette], tuple[NDArray[np.float32]]]:
        return Palette, (self._array,)


@lru_cache(maxsize=8)
def _named(name: str) -> Palette:
    if name in ("openai", "rgb"):
        return Palette(_CHANNEL if name == "rgb" else np.load(_OPENAI, allow_pickle=False))
    return Palette(np.linspace(-1, 1, int(name.removeprefix("gray:")))[:, None].repeat(3, axis=1))


def _from_file(spec: str) -> Palette:
    path = _path_of(spec)
    if path.suffix not in (".npy", ".json") or path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is not a palette: neither a .npy file nor Hugging Face's {_HF_FILE} of a few MB")
    try:
        if path.suffix == ".npy":
            return Palette(np.load(path, allow_pickle=False))
        return Palette(json.loads(path.read_text("utf-8"))["clusters"])
    except Exception as error:  # NumPy and json each have many errors for damage
        raise ValueError(f"{path} is not a palette: {type(error).__name__}: {str(error)[:300]}") from error


def _path_of(spec: str) -> Path:
    """The file that a path, a folder or a hub id refers to."""
    path = Path(spec).expanduser()
    path = path / _HF_FILE if path.is_dir() else path
    if path.is_file():
        return path
    is_path = path.suffix in (".npy", ".json") or spec.startswith((".", "/", "~"))
    if is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        forms = "a palette is 'openai', 'gray:K', 'rgb', a .npy file, a Hugging Face folder, a hub id or colors"
        raise (FileNotFoundError if is_path else ValueError)(f"there is no palette {str(path)!r}; {forms}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(spec, _HF_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no folder {spec!r}, and {_HF_FILE} is not on the hub: {error}") from error


def _checked(colors: Colors) -> NDArray[np.float32]:
    """The colors as a read-only (K,3) float32 copy."""
    try:
        shape = tuple(np.shape(colors))  # before a copy: a tensor from a file may claim any size
        if shape != (256, 1) and (len(shape) != 2 or shape[1] != 3 or not 2 <= shape[0] <= MAX_COLORS):
            raise ValueError(f"their shape is {shape}")
        if isinstance(colors, Tensor):
            colors = (colors.double() if colors.is_floating_point() else colors).detach().cpu().numpy()
        with np.errstate(over="ignore"):  # becomes infinite, an error below
            array: NDArray[np.float32] = np.asarray(colors).astype(np.float32, order="C", casting="same_kind")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"colors must be real numbers (K, 3), 2 <= K <= {MAX_COLORS}: {error}") from error
    array = array + np.float32(0)  # turns -0 into 0
    if not (np.abs(array) <= 1).all():  # NaN, too
        low, high = array.min(), array.max()
        raise ValueError(f"colors must lie in [-1, 1], not [{low:g}, {high:g}]; convert bytes by array / 127.5 - 1")
    if array.shape[1] == 1 and not np.array_equal(array, _CHANNEL):
        raise ValueError("colors (256, 1) must be the values of the bytes 0 to 255, as in the palette 'rgb'")
    first = np.unique(array, axis=0, return_index=True)[1]
    if len(first) < len(array):
        second = np.setdiff1d(np.arange(len(array)), first)[0]
        raise ValueError(f"color {second}, {array[second].tolist()}, repeats an earlier color; remove it")
    array.flags.writeable = False
    return array


def check_images(images: object) -> None:
    """Raise TypeError unless ``images`` is a uint8 tensor, and ValueError unless its shape is (B,3,H,W)."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        cure = "; convert values in [0, 1] by (images * 255).round().to(torch.uint8)"
        raise TypeError(f"images must be a uint8 tensor (B, 3, H, W), not {kind_of(images)}{cure}")
    if images.ndim != 4 or images.shape[1] != 3:
        cure = "; use images[None] for one image, images.expand(-1, 3, -1, -1) for gray ones"
        raise ValueError(f"images must have shape (B, 3, H, W), not {tuple(images.shape)}{cure}")


@dataclass(frozen=True)
class PaletteTransform:
    """Batches of images to palette ids, for ``with_transform``, ``set_transform`` and ``map(batched=True)``.

    Each image is a PIL image, ``{"bytes", "path"}`` as ``Image(decode=False)`` returns it, the bytes of an image file,
    a path, or a uint8 array (H,W) or (H,W,3); its center square is resized to ``size`` pixels a side, at least 1.
    Equal transforms have equal pickles, by which the cache of ``map`` recognizes them.
    """

    palette: Palette
    image_column: str = "image"
    size: int = 32

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; an image has a side of at least 1 pixel")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Tokenize one batch: lists of equal length by column.

        A ``dict`` (from ``with_transform`` and streams) is changed in place and returned: the new columns replace the
        images. For any other mapping (from ``Dataset.map``) only the new columns are returned, which ``map`` adds:
        ``tokens``, uint16 array (B, T) as of ``quantize``; ``palette``, for each row the palette's SHA-256.
        BadImageError, TypeError or ValueError name the image or the column that cannot be used.
        """
        if taken := {"tokens", PALETTE_COLUMN} & set(batch):
            raise ValueError(f"the batch already has the columns {sorted(taken)}; rename them or omit this transform")
        if self.image_column not in batch:
            raise ValueError(f"there is no image column {self.image_column!r}; the batch has {list(batch)}")
        # A lazy batch of datasets records that a column was decoded, and map would then encode its images again.
        images = copy.copy(batch)[self.image_column]
        if images is None or isinstance(images, Image.Image | Mapping | bytes | str):
            raise TypeError(f"column {self.image_column!r} holds one image, not a batch; use map(..., batched=True)")
        pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
        for place, value in enumerate(images):
            pixels[place] = np.asarray(resize_center_crop(decode_form(value, f"image {place} of the batch"), self.size))
        tokens = quantize_in_one_thread(self.palette, pixels.transpose(0, 3, 1, 2)).view(np.uint16)
        columns = {"tokens": tokens, PALETTE_COLUMN: [self.palette.sha256] * len(pixels)}
        if not isinstance(batch, dict):
            return columns
        del batch[self.image_column]
        batch.update(columns)
        return batch


def quantize_in_one_thread(palette: Palette, pixels: NDArray[np.uint8]) -> NDArray[np.int16]:
    """The ids (B, T) of uint8 pixels (B,3,H,W), part by part, in a process that ``map`` may have forked.

    OpenMP's thread pool does not survive a fork: a parallel loop in the child would block on threads that only
    the parent has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = torch.split(torch.from_numpy(pixels), max(1, _PIXELS // (pixels.shape[2] * pixels.shape[3])))
        return torch.cat([palette.quantize(part).short() for part in parts]).numpy()
    finally:
        torch.set_num_threads(threads)


def token_rows(tokens: TokenRows) -> Tensor:
    """Ids as ``datasets`` may return them, (B,T) or a single row (T,), as one tensor (B,T) with unchanged dtype."""
    if not isinstance(tokens, Tensor):
        array = np.array(tokens)  # a copy: arrays of datasets are read-only
        tokens = torch.from_numpy(array if array.size else array.astype(np.int64))
    return tokens if tokens.ndim != 1 else tokens[None] if len(tokens) else tokens.view(0, 0)


def side_of(tokens: object, size: int | None = None, tokens_per_pixel: int = 1) -> int:
    """The side in pixels of the images that (B,T) ids fill; TypeError or ValueError where they fill none."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be an integer tensor, not {kind_of(tokens)}")
    size = isqrt(tokens.shape[-1] // tokens_per_pixel) if size is None and tokens.ndim else size or 0
    if tokens.ndim != 2 or tokens_per_pixel * size * size != tokens.shape[1]:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} are not (B, T) with T = {tokens_per_pixel} * {size}^2")
    return size


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else type(value).__name__
