"""Sideshows of training, as Lightning callbacks."""

from lightning_igpt.callbacks.completions import CompletionGrid, captions, completion_rows

__all__ = ["CompletionGrid", "captions", "completion_rows"]
