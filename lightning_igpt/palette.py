"""A palette: K colours, and the exact way from pictures to palette ids and back.

Not here: fitting a palette to images (``kmeans.py``), other image modes (``rgb.py``), the search for the
nearest colours (``lookup.py``).

Source: Chen et al., "Generative Pretraining from Pixels" (ICML 2020), section 2.1 (9-bit palette, raster
order); ``src/utils.py`` and ``src/run.py`` of github.com/openai/image-gpt (nearest centre, decoding).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_igpt.lookup import cached_table
from lightning_igpt.palette_files import read_colors, write_colors
from lightning_igpt.pictures import to_pil
from lightning_igpt.tokenizing import PaletteTransform, TokenRows, kind_of, side_of, token_rows

MAX_COLORS = 32768  # ids fit into int16
_OPENAI = Path(__file__).parent / "assets" / "openai_512.npy"

Colors: TypeAlias = Sequence[Sequence[float]] | NDArray[Any] | Tensor


class Palette:
    """K colours. Immutable, equal and hashable by their float32 bytes; a pickle holds the colours alone.

    Args:
        colors: (K,3) array, tensor or nested list of red, green and blue in [-1,1], 2 <= K <= 32,768; kept as
            float32. No colour may occur twice: ties go to the lowest id, so the second could never be used.

    Raises:
        ValueError: The shape, the number of colours or a value is not as above, or a colour occurs twice.
    """

    __slots__ = ("_array", "_bytes", "_sha256")

    def __init__(self, colors: Colors) -> None:
        self._array = _checked(colors)  # (K, 3) float32, read-only
        self._bytes = self._array.astype("<f4").tobytes()
        self._sha256 = hashlib.sha256(self._bytes).hexdigest()

    @classmethod
    def load(cls, spec: Palette | str | Path | Colors) -> Palette:
        """Turn what a user may write for ``palette`` into a palette.

        Args:
            spec: A palette; ``"openai"`` (the 512 released colours); ``"gray:K"`` (K even steps from black to
                white); (K,3) colours in [-1,1]; a ``.npy`` file of such; a Hugging Face folder, or its
                ``preprocessor_config.json``, with ``clusters``; a hub id ``owner/name`` of such a folder. A
                path that exists wins over a hub id. The names win over a path: write ``./openai`` for that.

        Raises:
            FileNotFoundError: It looks like a path, but nothing is there.
            ValueError: It is none of these, or holds no valid colours.
        """
        if isinstance(spec, Palette):
            return spec
        if isinstance(spec, Path) or (isinstance(spec, str) and spec != "openai" and not _is_gray(spec)):
            return _from_file(str(spec))
        if not isinstance(spec, str):
            return cls(spec)
        return _openai() if spec == "openai" else cls(_gray(int(spec.removeprefix("gray:"))))

    @property
    def colors(self) -> Tensor:
        """(K,3) float32 in [-1,1], red, green, blue; a fresh copy."""
        return torch.from_numpy(self._array.copy())

    @property
    def rgb(self) -> Tensor:
        """(K,3) uint8, ``rint(127.5 * (c + 1))``: the bytes of each colour in a picture; a fresh copy."""
        return torch.from_numpy(np.rint(127.5 * (self._array.astype(np.float64) + 1)).clip(0, 255).astype(np.uint8))

    @property
    def sha256(self) -> str:
        """Hex digest of the little-endian float32 bytes of the colours, row by row, without a file header."""
        return self._sha256

    @property
    def spec(self) -> str | list[list[float]]:
        """A plain value for hyperparameters and YAML; :meth:`load` turns it back into this very palette."""
        if self == _openai():
            return "openai"
        if np.array_equal(self._array, _gray(len(self))):
            return f"gray:{len(self)}"
        return self.to_list()

    def to_list(self) -> list[list[float]]:
        """K rows of three Python floats; float32 gives the same bytes back."""
        return [[float(value) for value in row] for row in self._array]

    def save(self, path: str | Path) -> None:
        """Write the (K,3) float32 colours to a ``.npy`` file, creating its folder.

        A checksum follows them in the file, where :meth:`load` looks and NumPy does not.

        Raises:
            ValueError: The name does not end in ``.npy``.
        """
        path = Path(path)
        if path.suffix != ".npy":
            raise ValueError(f"a palette is saved as a .npy file, not as {path.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_colors(path, self._array)

    def quantize(self, images: Tensor) -> Tensor:
        """The id of the nearest colour of every pixel.

        Nearest in squared Euclidean distance between ``byte / 127.5 - 1`` and the colours, in float64; the
        lowest id wins a tie. The answers come from a table of all 2^24 colours, built once, cached on disk.

        Args:
            images: uint8 (B,3,H,W) on any device.

        Returns:
            int64 (B,H*W) on the same device, in raster order.

        Raises:
            TypeError: Not a tensor of bytes.
            ValueError: Not of shape (B,3,H,W).
        """
        check_images(images)
        red, green, blue = images.unbind(1)  # (B, H, W)
        codes = red.int().bitwise_left_shift_(8).bitwise_or_(green).bitwise_left_shift_(8).bitwise_or_(blue)
        table: Tensor = _table(self, images.device)
        ids = table.index_select(0, codes.flatten())  # (B*H*W,) int16; of torch's gathers the fastest by far
        return ids.long().view(codes.shape).flatten(1)

    def dequantize(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """The picture that ids stand for.

        Args:
            tokens: (B,T) of any integer type, ids below K, T = size * size in raster order.
            size: Side of the picture in pixels; the square root of T by default.

        Returns:
            uint8 (B,3,size,size) on the same device.

        Raises:
            TypeError: The tokens are not integers.
            ValueError: T is not ``size * size``, or an id is outside 0..K-1. On a CUDA device the ids are not
                inspected, which would wait for the device; there a wrong id trips a device-side assertion.
        """
        size = side_of(tokens, size)
        tokens = tokens.long()
        if tokens.device.type != "cuda" and tokens.numel():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high >= len(self):
                raise ValueError(
                    f"tokens reach from {low} to {high}, but {len(self)} colours have ids 0..{len(self) - 1}"
                )
        rgb: Tensor = _rgb(self, tokens.device)
        pixels = rgb.index_select(0, tokens.flatten())  # (B*T, 3)
        return pixels.view(tokens.shape[0], size, size, 3).permute(0, 3, 1, 2).contiguous()

    def to_images(self, tokens: TokenRows, size: int | None = None) -> list[Image.Image]:
        """The pictures that ids stand for, as :meth:`dequantize`, whose errors it raises.

        Args:
            tokens: (B,T) or a single row (T,) of integers: a tensor, an array or lists.
            size: Side of the pictures in pixels; the square root of T by default.

        Returns:
            B images of mode RGB; one for a single row.
        """
        return [to_pil(image) for image in self.dequantize(token_rows(tokens), size).cpu()]

    def transform(self, image_column: str = "image", size: int = 32) -> PaletteTransform:
        """:meth:`quantize` for ``with_transform`` and ``map(batched=True)`` of a Hugging Face data set.

        Args:
            image_column: Column of images.
            size: Side of the pictures in pixels, at least 1.
        """
        return PaletteTransform(self, image_column, size)

    def rmse(self, images: Tensor) -> float:
        """What the palette costs: root mean square error per channel of ``dequantize(quantize(images))``, in 0..255.

        Args:
            images: uint8 (B,3,H,W).

        Raises:
            TypeError, ValueError: As :meth:`quantize`.
        """
        check_images(images)
        pixels = images.movedim(1, 0).reshape(1, 3, 1, -1)
        rgb: Tensor = _rgb(self, images.device)
        error = rgb.index_select(0, self.quantize(pixels)[0]).T.float() - pixels[0, :, 0].float()  # (3, B*H*W)
        return float(error.square().mean(dtype=torch.float64).sqrt())

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def __eq__(self, other: object) -> bool:
        return self._bytes == other._bytes if isinstance(other, Palette) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        return f"Palette({len(self)} colours, sha256 {self._sha256[:12]})"

    def __reduce__(self) -> tuple[type[Palette], tuple[NDArray[np.float32]]]:
        return Palette, (self._array,)


# A traced build could round differently, and the cache would keep its table.
@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=8)
def _table(palette: Palette, device: torch.device) -> Tensor:
    """(2^24,) int16: shared by equal palettes, one copy per device."""
    if device.type == "cpu":
        return torch.from_numpy(cached_table(palette._array, palette.sha256))
    table: Tensor = _table(palette, torch.device("cpu"))
    return table.to(device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=8)
def _rgb(palette: Palette, device: torch.device) -> Tensor:
    return palette.rgb.to(device)


@lru_cache(maxsize=1)
def _openai() -> Palette:
    return Palette(np.load(_OPENAI, allow_pickle=False))


def _from_file(spec: str) -> Palette:
    stored = read_colors(spec)
    try:
        palette = Palette(stored.colors)
    except ValueError as error:
        raise ValueError(f"{stored.where} holds no palette: {error}") from error
    if stored.sha256 not in (None, palette.sha256):
        raise ValueError(
            f"{stored.where} is damaged: its colours have the hash {palette.sha256[:12]}, but it was written with "
            f"{str(stored.sha256)[:12]}; copy or download it again"
        )
    return palette


def _is_gray(spec: str) -> bool:
    return re.fullmatch(r"gray:\d{1,5}", spec) is not None


def _gray(count: int) -> NDArray[np.float32]:
    return np.repeat(np.linspace(-1, 1, count)[:, None], 3, axis=1).astype(np.float32)


def _checked(colors: Colors) -> NDArray[np.float32]:
    """The colours as a read-only (K,3) float32 copy."""
    if isinstance(colors, str):
        raise ValueError(f"Palette takes colours; write Palette.load({colors!r}) for a name or a path")
    if isinstance(colors, Tensor | np.ndarray):
        _check_shape(tuple(colors.shape))  # before anything is copied: the tensors of a file may claim any size
        if colors.is_complex() if isinstance(colors, Tensor) else np.iscomplexobj(colors):
            raise ValueError("colours are real numbers, but these are complex")
    try:
        values = colors.detach().cpu().double().numpy() if isinstance(colors, Tensor) else colors
        with np.errstate(over="ignore"):  # infinite then, and refused
            array: NDArray[np.float32] = np.array(values, dtype=np.float32, order="C")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"colours must be K rows of three numbers: {error}") from error
    array = array + np.float32(0)  # makes one zero of -0 and 0
    _check_shape(array.shape)
    if not np.isfinite(array).all():
        raise ValueError(f"colour {int(np.argmin(np.isfinite(array).all(axis=1)))} is not finite")
    if array.min() < -1 or array.max() > 1:
        raise ValueError(
            f"colours must lie in [-1, 1], but these reach from {array.min():g} to {array.max():g}; "
            "bytes become colours by array / 127.5 - 1"
        )
    _, first, counts = np.unique(array, axis=0, return_index=True, return_counts=True)
    if len(first) < len(array):
        again = np.flatnonzero((array == array[first[counts > 1][0]]).all(axis=1))
        raise ValueError(f"colours {again[0]} and {again[1]} are the same, so id {again[1]} could never be used")
    array.flags.writeable = False
    return array


def _check_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or shape[1] != 3:
        raise ValueError(f"colours must have shape (K, 3), not {shape}")
    if not 2 <= shape[0] <= MAX_COLORS:
        raise ValueError(f"a palette has 2 to {MAX_COLORS} colours, not {shape[0]}")


def check_images(images: object) -> None:
    """Insist on uint8 (B,3,H,W), and say how to get there.

    Raises:
        TypeError: Not a tensor of bytes.
        ValueError: Another shape.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a uint8 tensor (B, 3, H, W), not {kind_of(images)}")
    if images.dtype != torch.uint8:
        cure = "; if they lie in [0, 1]: (images * 255).round().to(torch.uint8)" if images.is_floating_point() else ""
        raise TypeError(f"images must be bytes (torch.uint8), not {images.dtype}{cure}")
    shape = tuple(images.shape)
    if len(shape) == 4 and shape[1] == 3:
        return
    cure = ""
    if len(shape) == 3:
        cure = "; one image becomes a batch by images[None]"
    elif len(shape) == 4 and shape[3] == 3:
        cure = "; put the channels second: images.permute(0, 3, 1, 2)"
    elif len(shape) == 4 and shape[1] == 1:
        cure = "; grey becomes RGB by images.expand(-1, 3, -1, -1)"
    raise ValueError(f"images must have shape (B, 3, H, W), not {shape}{cure}")
