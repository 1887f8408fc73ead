"""Where a probe keeps pooled features between the pass over the images and the fit.

In memory up to a limit; beyond it in one temporary file per layer, read back as a memory map. The files have no names,
so none outlives the process, however it ends.
"""

from __future__ import annotations

import logging
import tempfile
from typing import IO

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


class FeatureStore:
    """Rows of features that grow by batches and are read by columns, one layer at a time.

    Args:
        max_bytes: Features that are kept in memory; when they become more, all of them move to files in the folder for
            temporary files (Python's ``tempfile``, which follows TMPDIR).
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._labels: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._chunks: list[Tensor] = []  # float32 (K, B, D) each, what is in memory
        self._files: list[IO[bytes]] = []  # one per column
        self._rows, self._width, self._bytes = 0, 0, 0

    def __len__(self) -> int:
        return self._rows

    @property
    def on_disk(self) -> bool:
        """Whether the features lie in files."""
        return bool(self._files)

    @property
    def labels(self) -> Tensor:
        """The labels of all rows, int64 (N,)."""
        return torch.cat(self._labels)

    @property
    def numbers(self) -> Tensor:
        """The sample numbers of all rows, int64 (N,)."""
        return torch.cat(self._numbers)

    def add(self, features: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Append rows.

        Args:
            features: Float (B, K, D), for K columns; kept as float32.
            labels: int64 (B,).
            numbers: int64 (B,), what tells the rows apart.

        Raises:
            OSError: The folder for temporary files is full.
        """
        chunk = features.detach().float().cpu().transpose(0, 1).contiguous()  # (K, B, D)
        self._labels.append(labels.cpu())
        self._numbers.append(numbers.cpu())
        self._rows, self._width = self._rows + chunk.shape[1], chunk.shape[2]
        self._bytes += chunk.numel() * chunk.element_size()
        self._chunks.append(chunk)
        if self.on_disk or self._bytes > self.max_bytes:
            self._write()

    def column(self, index: int) -> Tensor:
        """One layer's features of all rows, contiguous float32 (N, D) on the CPU; not to be written to."""
        if not self.on_disk:
            return torch.cat([chunk[index] for chunk in self._chunks])
        # Copy on write, because torch warns of maps that are only to be read.
        return torch.from_numpy(np.memmap(self._files[index], np.float32, "c", shape=(self._rows, self._width)))

    def close(self) -> None:
        """Forget all rows and free memory and files; columns in use stay valid."""
        for file in self._files:
            file.close()
        self._labels, self._numbers, self._chunks, self._files = [], [], [], []
        self._rows, self._width, self._bytes = 0, 0, 0

    def _write(self) -> None:
        """Move the rows that are in memory to the files."""
        if not self.on_disk:
            self._files = [tempfile.TemporaryFile() for _ in self._chunks[0]]  # noqa: SIM115 - close() closes them
            log.info("features move from memory to %s: they exceed %d bytes", tempfile.gettempdir(), self.max_bytes)
        try:
            for chunk in self._chunks:
                for file, rows in zip(self._files, chunk, strict=True):
                    file.write(rows.numpy().data)
                    file.flush()
        except OSError as error:
            raise OSError(
                f"the features, {self._bytes:,} bytes so far, do not fit into {tempfile.gettempdir()}; set TMPDIR to a "
                f"folder with more room, ask for fewer layers, or use solver=sgd, which keeps none ({error})"
            ) from error
        self._chunks = []
