"""Pages run from top to bottom: Python in one namespace, commands in the same process and folder."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from lightning_igpt.__main__ import LIGHTNING_VERBS, main
from tests.docs import toys
from tests.docs.pages import ROOT, blocks
from tests.docs.workplace import bring

LANGUAGES = ("bash", "bibtex", "json", "python", "text", "yaml")
NOT_RUN = {  # programs, and why
    **dict.fromkeys(("pip", "source", "uv"), "they change the environment of the tests"),
    **dict.fromkeys(("pytest", "ruff", "mypy", "sphinx-build", "pre-commit"), "CI runs them"),
    **dict.fromkeys(("sbatch", "export"), "there is no SLURM"),
    "jupyter": "a server",
}
STARTERS = ("srun", "torchrun")  # they start processes of ``fit``, whose words are parsed
PARSED_ONLY = ("demo",)  # a server; tests/commands has its own tests
QUICKSTARTS = {}  # words: the folders that they created


@dataclass
class Command:
    """One command of a line."""

    where: str
    words: list

    @property
    def text(self):
        return shlex.join(self.words)

    @property
    def ours(self):
        """The words after ``lightning-igpt`` or ``-m lightning_igpt``, or None."""
        if self.words[0] in STARTERS or self.words[0] in ("lightning-igpt", "python"):
            for place, word in enumerate(self.words):
                if word in ("lightning-igpt", "lightning_igpt"):
                    return self.words[place + 1 :]
        return None

    @property
    def heavy(self):
        return bool(self.ours and self.ours[0] in toys.HEAVY and "--print_config" not in self.ours)


def commands(block):
    """The commands of a bash block.

    Raises:
        AssertionError: A line has syntax that is not supported here: a pipe, a loop, a substitution.
    """
    if block.text.startswith("#!"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    line = block.line
    for text in re.split(r"(?<!\\)\n", block.text):
        where = f"{block.page}:{line}"
        line += text.count("\n") + 1
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            words = shlex.split(part)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            assert not {"|", ";", "<", ">", "&"} & {*words}, f"{where}: {text!r} is not supported"
            if words:
                yield Command(where, words)


def heavy(page):
    return [
        command for block in blocks(page) if block.language == "bash" for command in commands(block) if command.heavy
    ]


class Page:
    """A page as it is run.

    Args:
        name: The page.
        scratch: A folder for files that the reader does not see.
    """

    def __init__(self, name, scratch):
        self.name, self.scratch = name, scratch
        self.namespace = {"__name__": "__main__"}

    def run(self, *languages):
        """Run the blocks in these languages."""
        for block in blocks(self.name):
            if block.language in languages:
                self.keep(block)
                getattr(self, f"run_{block.language}")(block)

    def parse(self):
        """Parse the heavy commands, with the files that the page itself shows."""
        for block in blocks(self.name):
            self.keep(block)
            for command in commands(block) if block.language == "bash" else ():
                if command.heavy:
                    parse(command)
                elif command.ours and command.ours[0] == "recipes":
                    call(command, command.ours)

    def keep(self, block):
        """Write the file that a block shows."""
        if block.name:
            Path(block.name).write_text(block.text, encoding="utf-8")

    def run_python(self, block):
        """Execute a block; errors name the page's own lines."""
        bring(block.text)
        code = compile("\n" * (block.line - 1) + block.text, self.name, "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, self.namespace)

    def run_bash(self, block):
        for command in commands(block):
            bring(command.text)
            self.run_command(command)

    def run_yaml(self, block):
        """A recipe, or a part of one added to a shipped one, is parsed by ``fit``."""
        loaded = yaml.safe_load(block.text)
        if {*loaded} <= {"seed_everything", "model", "data", "trainer"}:
            path = Path(self.scratch, "block.yaml")
            path.write_text(block.text, encoding="utf-8")
            whole = [] if {"model", "data"} <= {*loaded} else ["--config", "digits_tiny_pretrain"]
            parse(Command(f"{block.page}:{block.line}", ["lightning-igpt", "fit", *whole, "--config", str(path)]))

    def run_command(self, command):
        program = command.words[0]
        if command.ours and (program in STARTERS or command.ours[0] in PARSED_ONLY):
            parse(command)
        elif command.ours and command.ours[0] == "quickstart":
            self.run_quickstart(command)
        elif command.ours:
            call(command, toys.small_words(command.ours, self.scratch))
        else:
            assert program in NOT_RUN, f"{command.where}: {program!r} is unknown; run it, or add it to NOT_RUN"
            if program == "pip":
                check_installable(command)

    def run_quickstart(self, command):
        """Run it, or copy what it wrote when it ran for another page."""
        if (words := tuple(command.ours)) not in QUICKSTARTS:
            module, before = importlib.import_module("lightning_igpt.commands.quickstart"), {*Path().iterdir()}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "NETWORK", replace(module.NETWORK, n_layer=2, n_head=2, n_embd=16))
                patch.setattr(module, "FINETUNE_STEPS", 2)
                call(command, toys.small_words(command.ours, self.scratch))
            QUICKSTARTS[words] = [path.resolve() for path in {*Path().iterdir()} - before]
        for path in QUICKSTARTS[words]:
            if not Path(path.name).exists():
                shutil.copytree(path, path.name)


def call(command, words):
    """What our program prints, run in this process.

    Raises:
        AssertionError: It did not end with status 0.
    """
    out, status = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(words) or 0
        except SystemExit as stop:
            status = stop.code or 0
    assert status == 0, f"{command.where}: status {status} of\n  {command.text}\n{out.getvalue()[-2000:]}"
    return out.getvalue()


def parse(command):
    """Check the words of a command without running it: by ``--print_config``, or against the verb's help."""
    verb, *words = command.ours
    if verb in LIGHTNING_VERBS:
        if "--ckpt_path" in words:  # of a run that has not been made
            del words[(place := words.index("--ckpt_path")) : place + 2]
        call(command, [verb, *(word for word in words if word != "--dry_run"), "--print_config"])
    else:
        text = call(command, [verb, "--help"])
        assert all(word in text for word in words if word.startswith("--")), command.text


def check_installable(command):
    """Every extra and package that ``pip install`` names is one of this project's, or a tool."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in command.words[2:]:
        name, _, extras = word.rstrip("]").partition("[")
        assert name in (".", "-e", "lightning-igpt", "pre-commit", "jupyterlab") or f'"{name}' in project, word
        assert all(f"\n{extra} = [" in project for extra in extras.split(",") if extra), word
