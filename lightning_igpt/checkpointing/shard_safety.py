"""Whether a checkpoint opens without running code, told before anything opens it.

Lightning 2.6 leaves some checkpoints to plain pickle, which does whatever a file says, whatever ``weights_only`` says:
a whole file under FSDPStrategy, and of the folders that FSDPStrategy and ModelParallelStrategy write both the file
``.metadata`` and each value in the shards that is no tensor.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch

from lightning_igpt.checkpointing.index import INDEX as INDEX
from lightning_igpt.checkpointing.index import Entry, read_index
from lightning_igpt.checkpointing.intact import check_intact
from lightning_igpt.weights.safety import read_torch

EXTRA = "meta.pt"  # of a sharded checkpoint: Lightning's state but for weights and optimisers
ADDRESS = re.compile(r"(^|::)(https?|ftps?|sftp):/", re.IGNORECASE)  # fsspec chains file systems with ::

DEEPSPEED = (
    "is a checkpoint of DeepSpeed's, which opens its files by plain pickle: they could run code. If you trust who made "
    "it: to go on with the run under DeepSpeed, say so in Python by strategy.weights_only = False, on the strategy "
    "that the Trainer is given; for the weights alone, make one file of it by lightning.pytorch.utilities.deepspeed."
    "convert_zero_checkpoint_to_fp32_state_dict(folder, file), and name that file in pretrained="
)


def check_opens_safely(path: str | Path) -> None:
    """Raise where opening a checkpoint could run code, as every strategy of Lightning opens it.

    A file must be one that torch's safe unpickler takes. A folder must be a whole sharded checkpoint: its list of
    tensors, its other state and each value in its shards are read without calling anything that they name. Object
    stores, such as ``s3://``, are not looked into: Lightning reads them only through torch's loader, which has to be
    told ``weights_only=True``.

    This protects from files made by strangers. It does not protect from a stranger who can write to the folder, and
    exchanges a file between the check and the loading.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is fetched from an address, could run code, or is damaged.
    """
    text = str(path)
    if ADDRESS.search(text):
        raise ValueError(f"{text}: checkpoints are not fetched from addresses; download the file and name its path")
    path = Path(path)
    if "://" in text and not path.exists():
        return
    if path.is_dir():
        check_shards(path)
    else:
        _check_file(path)


def check_shards(folder: Path) -> list[Entry]:
    """What a sharded checkpoint holds, once it is known to be whole and to open without running code.

    Raises:
        ValueError: As check_opens_safely.
    """
    absent = [name for name in (INDEX, EXTRA) if not (folder / name).is_file()]
    if absent and is_deepspeed(folder):
        raise ValueError(f"{folder} {DEEPSPEED}")
    inside = list(folder.rglob("*.ckpt")) if absent else []
    if inside:
        newest = max(inside, key=lambda path: path.stat().st_mtime)
        raise ValueError(
            f"{folder} is no checkpoint, but a folder that holds some; name one, such as {newest}, or go on from the "
            f"newest by fit --resume {folder}"
        )
    if absent:
        raise ValueError(
            f"{folder} is no whole sharded checkpoint: it holds no {' and no '.join(absent)}. Name a checkpoint that "
            "FSDPStrategy or ModelParallelStrategy wrote to its end"
        )
    others = sorted(path.name for path in folder.glob(f"*{INDEX}") if path.name != INDEX)
    if others:  # torch's reader falls back to these
        raise ValueError(f"{folder} holds {others[0]}, which Lightning does not write and pickle would open")
    check_intact(folder / EXTRA)
    read_torch(folder / EXTRA)
    found = read_index(folder)
    files: dict[str, list[Entry]] = {}
    for entry in found:
        files.setdefault(entry.file, []).append(entry)
    for name, entries in files.items():
        _check_shard(folder / name, entries)
    return found


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder looks like one that DeepSpeed's engine saved, or like the one of a step within it."""
    marks = ("zero_to_fp32.py", "*_model_states.pt", "*_optim_states.pt", "*/*_model_states.pt", "*/*_optim_states.pt")
    return any(next(folder.glob(mark), None) is not None for mark in marks)


def _check_file(path: Path) -> None:
    if path.suffix == ".safetensors":  # torch.load would read such a file by other means than the strategies do
        raise ValueError(f"{path} holds weights alone, no state of a run; start from it with pretrained=")
    read_torch(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    # torch.load looks at the start of a file, but FSDPStrategy at its end, where a second archive may hide.
    if not is_zip and _ends_in_archive(path):
        raise ValueError(f"{path} is two files in one, of which the second could run code")


def _ends_in_archive(path: Path) -> bool:
    try:
        torch.PyTorchFileReader(str(path))
    except RuntimeError:
        return False
    return True


def _check_shard(path: Path, entries: list[Entry]) -> None:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no whole sharded checkpoint: it holds no {path.name}")
    size, needed = path.stat().st_size, max(entry.offset + entry.length for entry in entries)
    if size < needed:
        raise ValueError(f"{path} is cut short: it has {size} bytes of at least {needed}")
    with path.open("rb") as file:
        for entry in entries:
            if entry.is_tensor:  # torch reads those with weights_only=True itself
                continue
            file.seek(entry.offset)
            try:
                torch.load(io.BytesIO(file.read(entry.length)), map_location="cpu", weights_only=True)
            except Exception as error:  # as in read_torch
                raise ValueError(
                    f"{path} cannot be opened with weights_only=True: {entry.name} in it holds Python objects, which "
                    "could run code, or is damaged"
                ) from error
