"""Pages run from top to bottom: Python in one namespace, commands in the same process and folder."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_igpt import benchmarks
from lightning_igpt.__main__ import main
from tests.docs import toys
from tests.docs.pages import blocks
from tests.docs.shell import Command, Ended, call, commands, ended, parse
from tests.docs.unrun import NOT_RUN, PARSED_ONLY
from tests.docs.workplace import OF_TENSORFLOW, bring, tensorflow

LANGUAGES = ("bash", "bibtex", "console", "json", "python", "text", "toml", "yaml")
REAL = ("cat", "cp", "diff", "echo", "find", "grep", "head", "ls", "mkdir", "mv", "rm", "sort", "tail", "touch", "wc")
LOCAL = re.compile(r"https?://(localhost|127\.0\.0\.1)[:/]")
SAME = ("plan", "recipes")  # verbs that print the same numbers everywhere
QUICKSTARTS = {}  # words: the folders that they made
NEAR = 4  # a ```text block so many lines below another block shows its output


class Page:
    """A page as it is run.

    Args:
        name: The page.
        scratch: A folder for what the reader does not see.
    """

    def __init__(self, name, scratch):
        self.name, self.scratch = name, scratch
        self.namespace = {"__name__": "__main__"}
        self.programs = set()  # files whose Python has run where it stands
        self.environments = set()  # folders that lines which are not run would have made
        self.printed = None  # by the block before; None if it was run at toy size, or not at all

    def run(self, *languages):
        """Run the blocks in these languages, or all of them."""
        for block in blocks(self.name, *languages):
            if block.language == "text":
                if self.printed is not None and block.above <= NEAR:
                    compare(block, *self.printed)
                self.printed = None
            else:
                self.printed = getattr(self, f"run_{block.language}")(block)

    def parse(self):
        """Have the heavy commands understood, with the files that lie here and those that the page itself shows."""
        for block in blocks(self.name):
            self.keep(block)
            for command in commands(block) if block.language in ("bash", "console") else ():
                if command.heavy:
                    if not any("/" in word and not Path(word).exists() for word in command.configs):  # a run's own
                        parse(command)
                elif command.ours and command.ours[0] == "recipes":
                    self.run_ours(command)

    def run_python(self, block):
        """Execute a block; errors name the page's own lines."""
        bring(block.text)
        self.keep(block)
        code, out = compile("\n" * (block.line - 1) + block.text, self.name, "exec"), io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, self.namespace)
        return out.getvalue(), False

    def run_bash(self, block):
        shown, exact = "", True
        for command in commands(block):
            bring(command.text)
            printed = self.run_command(command)
            if printed is None:
                shown = None
            elif shown is not None:
                shown, exact = shown + printed, exact and bool(command.ours) and command.ours[0] in SAME
        if block.language == "console" and shown is not None:
            output = "".join(f"{line}\n" for line in block.text.splitlines() if not line.startswith("$ "))
            compare(block, shown, exact, output)
        return None if shown is None else (shown, exact)

    run_console = run_bash

    def run_yaml(self, block):
        """Parse; a recipe, or a part of one beside a shipped one, is to be understood by ``fit``."""
        self.keep(block)
        loaded = yaml.safe_load(block.text)
        assert isinstance(loaded, dict | list), f"{block.page}:{block.line}: this YAML holds nothing"
        if isinstance(loaded, dict) and {*loaded} <= {"seed_everything", "model", "data", "trainer"}:
            path = Path(self.scratch, "block.yaml")
            path.write_text(block.text, encoding="utf-8")
            whole = [] if {"model", "data"} <= {*loaded} else ["--config", "digits_tiny_pretrain"]
            words = ["lightning-igpt", "fit", *whole, "--config", str(path)]
            parse(Command(f"{block.page}:{block.line}", words))

    def run_json(self, block):
        yaml.safe_load(block.text)

    def run_toml(self, block):
        self.keep(block)

    def run_bibtex(self, block):
        assert block.text.startswith("@")

    def keep(self, block):
        """Write the file that a block shows."""
        if block.name:
            Path(block.name).parent.mkdir(parents=True, exist_ok=True)
            Path(block.name).write_text(block.text, encoding="utf-8")
            self.programs.add(block.name)

    def run_command(self, command):
        """Run a command, or check one that is not run; returns what it printed, or None where the reader sees other.

        Raises:
            AssertionError: It failed, it is of an unknown kind, or what it needs is not there.
        """
        command.words = [os.path.expandvars(word) for word in command.words]
        program, *rest = command.words
        if command.ours is not None:
            return self.run_ours(command)
        if program == "export":
            os.environ.update(word.split("=", 1) for word in rest)  # the fixture takes it back
        elif program == "cd":
            os.chdir("." if rest[0] in self.environments else rest[0])
        elif program in REAL or (program == "curl" and any(LOCAL.match(word) for word in rest)):
            return self.run_program(command)
        elif program in ("python", "python3"):
            return self.run_interpreter(command, rest)
        else:
            self.check(command, program)
            return None
        return ""

    def run_ours(self, command):
        if command.ours[0] in PARSED_ONLY:
            return parse(command)
        if command.ours[0] == "quickstart":
            return self.run_quickstart(command)
        words = toys.small_words(command.ours, self.scratch)
        with pytest.MonkeyPatch.context() as patch:
            if OF_TENSORFLOW in command.words:  # not always: TensorBoard takes what it finds for the real one
                patch.setitem(sys.modules, "tensorflow", tensorflow())
            shown = call(command, main, words)
        return None if command.heavy else shown

    def run_quickstart(self, command):
        """Run it, or copy what it wrote when it ran for another page."""
        if (words := tuple(command.ours)) not in QUICKSTARTS:
            with pytest.MonkeyPatch.context() as patch:
                module = importlib.import_module("lightning_igpt.commands.quickstart")
                patch.setattr(module, "NETWORK", replace(module.NETWORK, n_layer=2, n_head=2, n_embd=16))
                before = {*Path().iterdir()}
                call(command, main, toys.small_words(command.ours, self.scratch))
            QUICKSTARTS[words] = [path.resolve() for path in {*Path().iterdir()} - before]
        for path in QUICKSTARTS[words]:
            if not Path(path.name).exists():
                shutil.copytree(path, path.name)

    def run_program(self, command):
        done = subprocess.run(command.words, capture_output=True, text=True, timeout=20, check=False)
        ended(command, done.returncode, done.stdout + done.stderr)
        if command.output_file:
            Path(command.output_file).write_text(done.stdout)
        return done.stdout

    def run_interpreter(self, command, rest):
        if rest[0] == "-m" and rest[1].startswith(f"{benchmarks.__name__}."):
            name = rest[1].rpartition(".")[2]
            assert Path(benchmarks.__path__[0], f"{name}.py").exists(), f"{command.where}: there is no benchmark {name}"
            call(command, importlib.import_module(rest[1]).main, [*rest[2:], *toys.BENCHMARKS[name]])
        elif rest[0] == "-m" and rest[1] == "venv":
            self.environments.add(rest[2])
        elif rest[0] == "-m":
            self.check(Command(command.where, rest[1:]), rest[1])
        elif rest[0] not in self.programs:
            assert Path(rest[0]).exists(), f"{command.where}: no block above writes {rest[0]}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", rest)
                return call(command, lambda: runpy.run_path(rest[0], run_name="__main__") and 0)
        return None

    def check(self, command, program):
        """Check a command that is not run."""
        assert program in NOT_RUN, (
            f"{command.where}: {program!r} is of an unknown kind in\n  {command.text}\n"
            "let tests/docs/running.py run it (REAL), or say in tests/docs/unrun.py why not and what is checked instead"
        )
        try:
            NOT_RUN[program][1](command, self.environments)
        except (AssertionError, LookupError) as error:
            raise Ended(f"{command.where}: {command.text}\n{error}") from error


def compare(block, printed, exact, shown=None):
    """Find the lines that a page shows, in their order, among those printed; numbers may differ unless ``exact``.

    ``...`` stands for anything, within a line or in the place of lines.

    Raises:
        AssertionError: A line is not there.
    """
    remaining = iter([plain(line, exact) for line in printed.splitlines()])
    for line in (block.text if shown is None else shown).splitlines():
        wanted = plain(line, exact)
        if wanted.strip(". "):
            pattern = re.compile(".*".join(map(re.escape, wanted.split("..."))))
            found = any(pattern.search(candidate) for candidate in remaining)
            assert found, f"{block.page}:{block.line} shows\n  {line}\nwhich is not so printed:\n{printed}"


def plain(line, exact):
    line = " ".join(line.split())
    return line if exact else re.sub(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?", "#", line)
