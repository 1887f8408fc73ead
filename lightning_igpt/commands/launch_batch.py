"""How many images a recipe puts into a step, and the settings that keep this number on other devices.

The recipe is read as plain YAML: nothing that it names is imported, and no data are opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_igpt.commands import recipes

BATCH_SIZE = 128  # ImageDataModule's default
OURS = ("PretrainDataModule", "ProbeDataModule", "FineTuneDataModule")
ACCUMULATE, BATCH = "trainer.accumulate_grad_batches", "data.init_args.batch_size"
LIMITS = ("trainer.limit_train_batches", "trainer.limit_val_batches")  # counted in batches of a device
INTERVAL = "trainer.val_check_interval"
# What the launch reads or writes. A name that these begin with stands for a group of them, or shortens one.
DECIDED = ("trainer.devices", "trainer.num_nodes", ACCUMULATE, BATCH, *LIMITS, INTERVAL, "ckpt_path")


@dataclass(frozen=True)
class Batch:
    """What one step of a recipe takes: ``batch_size`` images on each of ``devices``, ``accumulate`` times.

    Args:
        batch_size: Images of a device at a time.
        devices: On all nodes together.
        accumulate: Batches of a device in one step of the optimiser.
        open: Whether the recipe leaves the number of devices to the machine; it is then taken for 1.
        matters: Whether the result depends on it: features that are computed once do not.
    """

    batch_size: int
    devices: int
    accumulate: int
    open: bool = False
    matters: bool = True

    @property
    def together(self) -> int:
        """Images of all devices in one step."""
        return self.batch_size * self.devices * self.accumulate

    def __str__(self) -> str:
        plural = "s" if self.devices > 1 else ""
        return f"{self.batch_size} images x {self.devices} device{plural} x {self.accumulate} accumulated"


@dataclass(frozen=True)
class Share:
    """Settings that divide a recipe's step among other devices.

    Args:
        batch: On those devices.
        changes: Options of ``fit`` that differ from the recipe's, with what the recipe says.
        remarks: What the user should know, a line each.
    """

    batch: Batch
    changes: dict[str, tuple[Any, Any]]
    remarks: list[str]

    @property
    def words(self) -> list[str]:
        """The options for the command line."""
        return [word for name, (_, now) in self.changes.items() for word in (f"--{name}", str(now))]


class Recipe:
    """A recipe, and the further options of ``fit`` that go with it.

    Args:
        config: A file, or the name of a shipped recipe.
        options: Words for ``fit``. Their ``--config`` merge into the recipe; the others stay as they are given.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: It is no YAML, has no data, a section or number in it is none, or an option stands for several.
    """

    def __init__(self, config: str, options: Sequence[str] = ()) -> None:
        given = _pairs(options)
        self.given = {_whole(name): value for name, value in given if name != "config"}
        for name in self.given:
            _check_single(name)
        files = [config, *(value for name, value in given if name == "config")]
        self.sections = _read(files)
        self.batch = self._batch()

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the recipe by its name with dots, such as trainer.devices."""
        value = OmegaConf.select(self.sections, name)
        return default if value is None else value

    def setting(self, name: str, default: int, least: int = 1) -> int:
        """A number, as the options or else the recipe say it.

        Raises:
            ValueError: It is no whole number, or below ``least``.
        """
        return _number(name, self.given.get(name, self.get(name, default)), least)

    def share(self, nodes: int, gpus: int, accumulate: int | None = None) -> Share:
        """Keep the images of a step on ``nodes`` x ``gpus`` devices.

        The batch of a device never becomes larger than the recipe's, which is known to fit into memory: as few batches
        as possible are accumulated, and where that is not enough they become smaller. What options say is not changed.

        Args:
            nodes: Machines.
            gpus: Devices of each.
            accumulate: Batches to accumulate, whatever the memory.

        Raises:
            ValueError: The images cannot be shared out; the message has the numbers.
        """
        was, world = self.batch, nodes * gpus
        if not was.matters:
            return Share(Batch(was.batch_size, world, was.accumulate, matters=False), {}, [])
        size = self.setting(BATCH, 1) if BATCH in self.given else None
        accumulate = self.setting(ACCUMULATE, 1) if ACCUMULATE in self.given else accumulate
        now = Batch(*_divide(was, world, f"{nodes} x {gpus}", size, accumulate))
        wanted = {ACCUMULATE: (was.accumulate, now.accumulate), BATCH: (was.batch_size, now.batch_size)}
        wanted |= self._counts(was, now)
        changes = {name: pair for name, pair in wanted.items() if pair[0] != pair[1] and name not in self.given}
        return Share(now, changes, _remarks(was, now, changes))

    def _batch(self) -> Batch:
        named = self.get("trainer.devices", "auto")
        devices = _devices(named)
        nodes = _number("trainer.num_nodes", self.get("trainer.num_nodes", 1))
        kind = str(self.get("data.class_path", "")).rpartition(".")[2]
        if kind not in OURS and self.get(BATCH) is None:
            raise ValueError(f"the recipe's data, {kind or 'without a class_path'}, has no batch_size to go by")
        # In order and once: however the images are divided, the features are the same.
        once = kind == "ProbeDataModule" and not self.get("data.init_args.shuffle", False)
        return Batch(
            _number(BATCH, self.get(BATCH, BATCH_SIZE)),
            (devices or 1) * nodes,
            _number(ACCUMULATE, self.get(ACCUMULATE, 1)),
            open=devices is None,
            matters=not once,
        )

    def _counts(self, was: Batch, now: Batch) -> dict[str, tuple[Any, Any]]:
        """What counts batches of a device, so that it means as many steps and images as before."""
        factors = {INTERVAL: Fraction(now.accumulate, was.accumulate)}
        factors |= dict.fromkeys(LIMITS, Fraction(was.batch_size * was.devices, now.batch_size * now.devices))
        counts = {name: self.get(name) for name in factors}
        return {
            name: (count, max(1, round(count * factors[name])))
            for name, count in counts.items()
            if isinstance(count, int) and count > 0  # others are fractions of an epoch, or times
        }


def _divide(was: Batch, world: int, devices: str, size: int | None, accumulate: int | None) -> tuple[int, int, int]:
    """Batch size, devices and accumulation that take as many images as before."""
    if size is not None and accumulate is not None:
        return size, world, accumulate
    told = f"a step of {was.together} images (the recipe's {was}) cannot be shared by {world} devices ({devices})"
    if was.together % world:
        near = [number for number in range(1, was.together + 1) if was.together % number == 0]
        below, above = [one for one in near if one < world][-1:], [one for one in near if one > world][:1]
        few = " or ".join(str(one) for one in below + above)
        raise ValueError(f"{told}: take {few} devices, or change batch_size in the recipe")
    share = was.together // world
    fixed = size if size is not None else accumulate
    if fixed is not None and share % fixed:
        name = "batch_size" if size is not None else "accumulate_grad_batches"
        raise ValueError(f"{told} with {name} {fixed}: each device has {share} images; {name} must divide them")
    if size is None and accumulate is None:
        accumulate = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= was.batch_size)
    accumulate = share // size if accumulate is None and size is not None else accumulate
    assert accumulate is not None
    return share // accumulate, world, accumulate


def _remarks(was: Batch, now: Batch, changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    lines = []
    if was.open:
        lines.append("The recipe names no number of devices; its step is taken for that of one.")
    if now.together != was.together:
        lines.append(f"A step takes {now.together} images ({now}), the recipe's takes {was.together} ({was}).")
    elif changes:
        lines.append(f"A step takes {now.together} images as in the recipe ({was}), but here {now}.")
    if changes:
        told = [f"{name.rpartition('.')[2]} {before} -> {after}" for name, (before, after) in changes.items()]
        lines.append(f"Changed for it: {', '.join(told)}.")
    if now.batch_size * now.devices != was.batch_size * was.devices:
        one, other = was.batch_size * was.devices, now.batch_size * now.devices
        lines.append(f"A run begun with {one} images at a time does not go on with {other}: their order would change.")
    return lines


def spelled(options: Sequence[str]) -> list[str]:
    """Options of ``fit`` with their names as it has them: underscores for dashes, ``--config`` for what shortens it.

    Values stay as they are.
    """
    found = []
    for word in options:
        name, equals, value = word.partition("=")
        if re.fullmatch(r"--[\w.+-]+", name):  # anything else is a value, also where it begins with dashes
            name = f"--{name[2:].replace('-', '_')}"
            name = "--config" if name != "--c" and "--config".startswith(name) else name
        elif word.startswith("-c") and " " not in word:  # -c FILE, -cFILE and -c=FILE
            name, value = "--config", word[2:].removeprefix("=")
            equals = "=" if value else ""
        found.append(f"{name}{equals}{value}")
    return found


def apart(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that ``--config`` names, and the other words."""
    files: list[str] = []
    rest: list[str] = []
    remaining = iter(options)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == "--config":
            files.append(value if equals else next(remaining, ""))
        else:
            rest.append(word)
    return files, rest


def _check_single(name: str) -> None:
    """Raise ValueError for an option that sets several values at once, or shortens one that the launch reads."""
    hidden = [whole for whole in DECIDED if whole.startswith(name) and whole != name]
    if hidden:
        raise ValueError(
            f"--{name} follows --, but the launch must read what stands in it: name single options in full, "
            f"such as --{hidden[-1]}"
        )


def _read(files: Sequence[str]) -> DictConfig:
    merged = OmegaConf.create()
    for file in files:
        loaded = recipes.read(file)
        for name in ("data", "model"):
            if isinstance(loaded.get(name), str):
                loaded[name] = {"class_path": loaded[name]}
        for name in ("data", "model", "trainer", "data.init_args"):
            section = OmegaConf.select(loaded, name)
            if section is not None and not isinstance(section, DictConfig):
                raise ValueError(f"{file} is no recipe: {name} is {section}; it must be a section of names and values")
        try:
            merged.merge_with(loaded)
        except OmegaConfBaseException as error:
            told = str(error).splitlines()[0]
            raise ValueError(f"{file} does not fit to {', '.join(files)}: {told}") from error
    if merged.get("data") is None or merged.get("model") is None:
        raise ValueError(f"{', '.join(files)} cannot be trained: a recipe has the sections model, data and trainer")
    return merged


def _pairs(options: Sequence[str]) -> list[tuple[str, str]]:
    """(name without dashes, value) of all options."""
    found: list[tuple[str, str]] = []
    for word, after in zip(options, [*options[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--") or name == "-c":
            value = value if equals else "" if after.startswith("--") else after
            found.append(("config" if name == "-c" else name[2:], value))
    return found


def _whole(name: str) -> str:
    """--data.batch_size and --data.dict_kwargs.batch_size mean data.init_args.batch_size; + appends to a list."""
    first, dot, rest = name.removesuffix("+").partition(".")
    if first in ("data", "model") and rest.partition(".")[0] == "dict_kwargs":
        rest = f"init_args{rest.removeprefix('dict_kwargs')}"
    if first in ("data", "model") and dot and rest.partition(".")[0] not in ("init_args", "class_path", "help"):
        return f"{first}.init_args.{rest}"
    return f"{first}{dot}{rest}"


def _devices(named: Any) -> int | None:
    """How many devices a trainer is told to take; None where the machine decides."""
    if OmegaConf.is_list(named):
        return len(named)
    if isinstance(named, str) and "," in named:
        return len([part for part in named.split(",") if part.strip()])
    return None if str(named) in ("auto", "-1") else _number("trainer.devices", named)


def _number(name: str, value: Any, least: int = 1) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise ValueError(f"{name} is {value!r}; it must be a whole number") from None
    if number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    return number
