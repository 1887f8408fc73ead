"""``lightning-igpt launch``: a recipe on a cluster, as a SLURM script or as the command of torchrun.

Not here: how a step's images are shared out (``launch_batch.py``); the text of the script (``launch_script.py``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_type_hints

from lightning_igpt.commands.arguments import one_line_errors
from lightning_igpt.commands.launch_batch import ACCUMULATE, BATCH, Recipe, apart, spelled
from lightning_igpt.commands.launch_script import (
    NAME,
    REQUEUE,
    SCRIPT,
    comment,
    directives,
    one_line,
    quoted,
    seconds,
    whole_commands,
)
from lightning_igpt.commands.parsers import VerbParser
from lightning_igpt.commands.places import check_file

PROGRAM = "lightning-igpt"
LATEST_SIGNAL = 65535  # seconds, SLURM's limit
SWITCHES = ("--submit", "--overwrite")
# In the store that torchrun shares among attempts, processes that start again find the addresses of dead ones, and wait
# for them: https://github.com/pytorch/pytorch/issues/135712
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


def slurm(
    config: str,
    nodes: int,
    gpus: int,
    time: str,
    partition: str | None = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    cpus_per_gpu: int | None = None,
    mem: str | None = None,
    job_name: str | None = None,
    signal_seconds: int = 120,
    setup: str | None = None,
    container: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    submit: bool = False,
    options: Sequence[str] = (),
) -> None:
    """Write a script for sbatch, in which a recipe trains, is requeued when its time is up, and goes on.

    The images of a step stay as many as in the recipe, on however many devices. What follows -- goes to fit as it is.

    Args:
        config: A recipe, by file or name.
        nodes: Machines.
        gpus: GPUs of each machine.
        time: Longest time of a part of the run, as SLURM writes it: minutes, hours:minutes:seconds, days-hours, ...; 0
            or UNLIMITED sets no limit.
        partition: SLURM's partition.
        account: Whose account is charged.
        qos: Quality of service.
        constraint: Features of the machines, such as a100.
        cpus_per_gpu: CPU cores of each process. Default: the recipe's num_workers, and one.
        mem: Memory of each machine, such as 256G; 0 takes all.
        job_name: Name of the job and its log. Default: the recipe's.
        signal_seconds: When to save and leave before the time is up. A step, a checkpoint and, with WeightAveraging, a
            validation must fit in.
        setup: Shell commands to run first, such as "module load cuda; source venv/bin/activate".
        container: Image that Apptainer runs the program in; the recipe must be visible there.
        out: File to write. Missing folders are made. Default: the script is printed.
        overwrite: Replace a file that is there already.
        submit: Hand the script to sbatch, which must be on this machine.
        options: Further options of fit.

    Raises:
        FileExistsError: The file to write is there.
        FileNotFoundError: There is no such recipe, or no sbatch to submit to.
        OSError: The file cannot be written.
        ValueError: A value cannot be written into the script, or the images of a step cannot be shared by the devices.
    """
    if out is not None:
        check_file(out, "--out", "job.sh")
    recipe = _recipe(config, options)
    name = re.sub(r"[^\w.+-]", "-", Path(config).stem, flags=re.ASCII) if job_name is None else job_name
    if not NAME.fullmatch(name):
        raise ValueError(f"job_name is {name!r}; take letters, digits and . _ + - only")
    _check_signal(signal_seconds, time)
    if cpus_per_gpu is None:
        cpus_per_gpu = recipe.setting("data.init_args.num_workers", 0, 0) + 1
    _at_least_one(nodes=nodes, gpus=gpus, cpus_per_gpu=cpus_per_gpu)
    sizes = {"nodes": nodes, "ntasks-per-node": gpus, "gpus-per-node": gpus, "cpus-per-task": cpus_per_gpu, "mem": mem}
    queue = {"time": time, "partition": partition, "account": account, "qos": qos, "constraint": constraint}
    files = {"job-name": name, "output": f"{name}-%j.out", "signal": f"SIGUSR1@{signal_seconds}"}
    share = recipe.share(nodes, gpus)
    inside = ["apptainer", "exec", "--nv", one_line("container", container)] if container else []
    command = [*inside, PROGRAM, *_fit(config, nodes, gpus, share.words, options)]
    script = SCRIPT.format(
        directives=directives({**files, **sizes, **queue}),
        remarks=comment([f"Recipe: {config}", *share.remarks]),
        seconds=signal_seconds,
        setup=whole_commands(one_line("setup", setup or "# Nothing is to be set up.")),
        cpus=cpus_per_gpu,
        command=quoted(command),
    ) + (REQUEUE if container else "")
    _tell(share.remarks)
    _hand_over(script, out, overwrite=overwrite, submit=submit)


def torchrun(
    config: str, nodes: str, gpus: int, rendezvous: str, max_restarts: int = 3, options: Sequence[str] = ()
) -> None:
    """Print the command that starts a recipe on every machine by torchrun, which starts it again when a process dies.

    Args:
        config: A recipe, by file or name.
        nodes: Machines; from:to lets the group go on with fewer and take in more.
        gpus: GPUs of each machine.
        rendezvous: host:port of one of the machines, where they find each other.
        max_restarts: How often the group starts anew after a failure.
        options: Further options of fit, after --.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A value is out of range, or the images of a step cannot be shared by the devices.
    """
    recipe = _recipe(config, options)
    fewest, most = _range(nodes)
    host, _, port = rendezvous.rpartition(":")
    if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:]+\]", host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"rendezvous is {rendezvous!r}; it must be HOST:PORT, such as node1:29500")
    if max_restarts < 0:
        raise ValueError(f"max_restarts is {max_restarts}; it must be at least 0")
    _at_least_one(gpus=gpus)
    share = recipe.share(fewest, gpus)
    remarks = [*share.remarks]
    if fewest == most:
        work = _fit(config, fewest, gpus, share.words, options)
    else:
        remarks += _elastic(recipe, range(fewest, most + 1), gpus, share.batch.accumulate)
        work = ["launch", "worker", *_configs([config]), "--accumulate", str(share.batch.accumulate)]
        work += ["--", *options] if options else []
    group = [f"--nnodes={nodes}", f"--nproc-per-node={gpus}", f"--max-restarts={max_restarts}"]
    group += ["--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", f"--rdzv-id={Path(config).stem}"]
    command = quoted([OWN_STORE, "torchrun", *group, "-m", "lightning_igpt", *work])
    print(comment([f"The same on every machine, one of which is {host}.", *remarks]), command, sep="\n")
    _tell(remarks)


def worker(config: str, accumulate: int | None = None, options: Sequence[str] = ()) -> None:
    """Train a recipe on as many devices as torchrun has started processes for; what an elastic group runs.

    Args:
        config: A recipe, by file or name.
        accumulate: Batches to accumulate for a step, the same in groups of every size.
        options: Further options of fit, after --.

    Raises:
        ValueError: torchrun has not started this process, or the images of a step cannot be shared by the devices.
    """
    recipe = _recipe(config, options)
    try:
        world, local, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"))
    except (KeyError, ValueError):
        raise ValueError(f"worker is started by torchrun; {PROGRAM} launch torchrun prints how") from None
    share = recipe.share(world // local, local, accumulate)
    if rank == 0:
        _tell(share.remarks)
    words = _fit(config, world // local, local, share.words, options)
    # In the place of this process: the signals that torchrun sends it shall reach the run.
    os.execv(sys.executable, [sys.executable, "-m", "lightning_igpt", *words])


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    own, options = list(words), []
    if "--" in own:
        own, options = own[: own.index("--")], spelled(own[own.index("--") + 1 :])
    verbs = {function.__name__: function for function in (slurm, torchrun, worker)}
    parser = VerbParser(prog=f"{PROGRAM} launch", description="Train a recipe on a cluster.", allow_abbrev=False)
    subcommands = parser.add_subcommands(dest="verb", required=True)
    for verb, function in verbs.items():
        text = str(function.__doc__).partition("\n")[0]
        part = VerbParser(description=f"{text} What follows -- goes to fit.", allow_abbrev=False)
        part.add_function_arguments(function, as_group=False, skip={"options"})
        subcommands.add_subcommand(verb, part, help=text)
    with one_line_errors(f"{PROGRAM} launch"):
        own = _spelled_out(own)
        if own and own[0] in verbs:
            _check_numbers(verbs[own[0]], own)
        chosen = parser.parse_args(own)
        verbs[chosen.verb](**chosen[chosen.verb].as_dict(), options=options)
    return 0


def _spelled_out(words: Sequence[str]) -> list[str]:
    """--job-name as --job_name, -c as --config, and a switch alone as true."""
    found = []
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            word = f"--{flag[2:].replace('-', '_')}{equals}{value}"
        if word in SWITCHES and after.startswith("--"):
            word = f"{word}=true"
        found.append("--config" if word == "-c" else word)
    return found


def _check_numbers(function: Callable[..., None], words: Sequence[str]) -> None:
    """Raise ValueError for a number with a colon, which YAML takes for one to the base of 60: 1:4 for 64."""
    numbers = {f"--{name}" for name, kind in get_type_hints(function).items() if kind in (int, int | None)}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else after
        if flag in numbers and ":" in value:
            raise ValueError(
                f"{flag[2:]} is {value!r}; it must be a whole number. Only the nodes of launch torchrun may be a range"
            )


def _recipe(config: str, options: Sequence[str]) -> Recipe:
    for word in [config, *options]:
        one_line("an option", word)
    recipe = Recipe(config, options)
    for name, instead in {"trainer.devices": "--gpus", "trainer.num_nodes": "--nodes"}.items():
        if name in recipe.given:
            raise ValueError(f"--{name} follows --, but the launch decides it: say {instead} before --")
    if "ckpt_path" in recipe.given or recipe.get("ckpt_path"):
        raise ValueError(
            "ckpt_path names one checkpoint, to which every restart would go back; --resume auto takes the newest. "
            "Start from its weights with model.init_args.pretrained, or put it where the run saves"
        )
    return recipe


def _fit(config: str, nodes: int, gpus: int, changes: Sequence[str], options: Sequence[str]) -> list[str]:
    devices = ["--trainer.num_nodes", str(nodes), "--trainer.devices", str(gpus)]
    resume = [] if any(word.partition("=")[0] == "--resume" for word in options) else ["--resume", "auto"]
    files, rest = apart(options)  # a recipe takes back what stands before it, so all of them come first
    return ["fit", *_configs([config, *files]), *devices, *resume, *changes, *rest]


def _configs(files: Sequence[str]) -> list[str]:
    """The options for these files; a name that begins with a dash would be taken for an option of its own."""
    return [word for file in files for word in ([f"--config={file}"] if file.startswith("-") else ["--config", file])]


def _elastic(recipe: Recipe, sizes: Sequence[int], gpus: int, accumulate: int) -> list[str]:
    """What to know of a group whose size may change."""
    if BATCH in recipe.given or ACCUMULATE in recipe.given:
        raise ValueError("batch_size and accumulate_grad_batches follow the size of an elastic group; leave them out")
    unable = []
    for nodes in sizes:
        try:
            recipe.share(nodes, gpus, accumulate)
        except ValueError:
            unable.append(str(nodes))
    lines = [f"Groups of every size accumulate {accumulate} and divide the rest, so the order of the images stays."]
    if unable:
        lines.append(f"A group of {' or '.join(unable)} machines ends with an error: it cannot share a step evenly.")
    return lines


def _range(nodes: str) -> tuple[int, int]:
    fewest, colon, most = nodes.partition(":")
    if not fewest.isdecimal() or not (most if colon else fewest).isdecimal():
        raise ValueError(f"nodes is {nodes!r}; it must be a number, or a range such as 1:4")
    first, last = int(fewest), int(most or fewest)
    if not 1 <= first <= last:
        raise ValueError(f"nodes is {nodes!r}; it must be at least 1, and the second number not below the first")
    return first, last


def _check_signal(signal_seconds: int, time: str) -> None:
    limit = seconds(time)
    latest = min(LATEST_SIGNAL, limit - 1) if limit else LATEST_SIGNAL
    if latest < 1:
        raise ValueError(f"time is {time!r}, a second: too short to save and leave before it is up")
    if not 1 <= signal_seconds <= latest:
        raise ValueError(f"signal_seconds is {signal_seconds}; it must be from 1 to {latest}, the time being {time}")


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def _hand_over(script: str, out: str | None, *, overwrite: bool, submit: bool) -> None:
    sbatch = shutil.which("sbatch")
    if submit and sbatch is None:
        raise FileNotFoundError("submit is true, but there is no sbatch here; write the script with --out and take it")
    if out is not None:
        if Path(out).exists() and not overwrite:
            raise FileExistsError(f"{out} exists; pass --overwrite true to replace it")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(script, encoding="utf-8")
        print(f"wrote {out}", flush=True)
    elif not submit:
        print(script, end="")
    if submit and sbatch is not None:
        done = subprocess.run([sbatch], input=script, text=True, check=False)
        if done.returncode:
            raise OSError(f"sbatch ended with status {done.returncode}; the job is not submitted")


def _tell(remarks: Sequence[str]) -> None:
    for line in remarks:
        print(f"{PROGRAM} launch: {line}", file=sys.stderr)
