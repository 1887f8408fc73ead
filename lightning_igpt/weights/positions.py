"""A network for another image size: its table of positions is stretched or shrunk, all else stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT


def interpolate_positions(table: Tensor, image_size: int) -> Tensor:
    """Stretch or shrink a table of positions in two dimensions, bicubic, averaging where it shrinks.

    Row t of the table belongs to the pixel that is predicted at t, in raster order, so the table is an image of
    ``n_embd`` channels.

    Args:
        table: (S * S, D), float.
        image_size: The new side.

    Returns:
        (image_size * image_size, D); the table itself where the size stays.
    """
    side = round(len(table) ** 0.5)
    if side == image_size:
        return table
    grid = table.T.reshape(1, -1, side, side)  # (1, D, S, S)
    grid = F.interpolate(grid, size=(image_size, image_size), mode="bicubic", antialias=image_size < side)
    return grid.flatten(2)[0].T.contiguous()


def adapt_network(network: ImageGPT, config: ImageGPTConfig) -> ImageGPT:
    """The same weights under a config that differs in ``image_size`` or ``dropout`` alone; parameters are shared."""
    state = network.state_dict()
    state["wpe.weight"] = interpolate_positions(state["wpe.weight"], config.image_size)
    with torch.device("meta"):
        adapted = ImageGPT(config)
    adapted.load_state_dict(state, assign=True)
    return adapted.requires_grad_(True)
