"""Lines of bash and console blocks, taken apart, and what it means for one to end well."""

import argparse
import contextlib
import functools
import io
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import jsonargparse
import pytest

from lightning_igpt import cli
from lightning_igpt.__main__ import LIGHTNING_VERBS, main
from tests.docs import toys


@dataclass
class Command:
    """One command of a line."""

    where: str
    words: list
    environment: dict = field(default_factory=dict)
    output_file: str | None = None
    status: int = 0  # that the page says it ends with

    @property
    def text(self):
        return shlex.join(self.words)

    @property
    def ours(self):
        """The words after ``lightning-igpt``, or None."""
        if self.words[0] == "lightning-igpt":
            return self.words[1:]
        return self.words[3:] if self.words[:3] == ["python", "-m", "lightning_igpt"] else None

    @property
    def configs(self):
        """What follows ``--config``."""
        pairs = zip(self.words, self.words[1:], strict=False)
        return [after for word, after in pairs if word in toys.CONFIGS] + [
            word.partition("=")[2] for word in self.words if word.startswith("--config=")
        ]

    @property
    def heavy(self):
        return bool(self.ours and self.ours[0] in toys.HEAVY and not {"--help", "--print_config"} & {*self.ours})


def lines_of(block):
    """(line number, line) with continued lines joined, comments left out, and of a console what follows ``$``."""
    number, joined = block.line, ""
    for offset, line in enumerate(block.text.splitlines()):
        if block.language == "console" and not joined:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        number = number if joined else block.line + offset
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1]
        else:
            if joined and not joined.startswith("#"):
                yield number, joined
            joined = ""


def commands(block):
    """The commands of a block.

    Raises:
        AssertionError: A line has what is not understood here: a pipe, a loop, a substitution.
    """
    for number, line in lines_of(block):
        where = f"{block.page}:{number}"
        said = re.search(r"#.*exit status (\d+)", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split, lexer.commenters = True, "#"
        parts = [[]]
        for word in lexer:
            if word in ("&&", ";"):
                parts.append([])
            else:
                assert not re.fullmatch(r"[|&;<()]+", word), f"{where}: {word!r} in {line!r} is not understood"
                parts[-1].append(word)
        for words in filter(None, parts):
            yield _command(where, words, int(said[1]) if said else 0)


def _command(where, words, status):
    target = None
    for sign in (">", ">>"):
        if sign in words:
            target, words = words[words.index(sign) + 1], words[: words.index(sign)]
            target = None if target.startswith(("~", "/")) else target  # the reader's own files stay as they are
    environment = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words[0].partition("=")
        words = words[1:]
    if not words:  # as export does it, near enough
        words = ["export", *(f"{name}={value}" for name, value in environment.items())]
    return Command(where, words, environment, target, status)


class Ended(AssertionError):
    """A command of a page did not end as the page says."""


def ended(command, status, output):
    if status != command.status:
        tail = "\n".join(output.splitlines()[-30:])
        raise Ended(f"{command.where}: status {status}, not {command.status}, of\n  {command.text}\n{tail}")


def call(command, function, *args):
    """What a function prints that ends as a program does, and is run as one: status 0, or the one that is said."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        for name, value in command.environment.items():
            patch.setenv(name, value)
        try:
            status = function(*args) or 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            print("" if isinstance(stop.code, int | None) else stop.code)
        except Exception as error:
            raise Ended(f"{command.where}: {type(error).__name__} in\n  {command.text}\n{error}") from error
    ended(command, status, out.getvalue())
    if command.output_file:
        Path(command.output_file).write_text(out.getvalue())
    return out.getvalue()


class Parsed(BaseException):
    """The words were understood."""


def parse(command):
    """Have the words of ``lightning-igpt`` understood by the verb's own parser, and nothing done."""
    verb, *words = command.ours
    if verb in LIGHTNING_VERBS and "--print_config" not in words and "--trust" not in words:
        call(command, lambda: lightning_parser(verb).parse_args([word for word in words if word != "--dry_run"]) and 0)
        return

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            patch.setattr(kind, "parse_args", functools.partialmethod(parsed_only, kind.parse_args))
        call(command, main, command.ours)


def parsed_only(parser, parse_args, *args, **options):
    """Parse, and stop."""
    raise Parsed(parse_args(parser, *args, **options))


@functools.cache
def lightning_parser(verb):
    """The parser of one of Lightning's verbs, which takes longer to build than to use."""
    return jsonargparse.capture_parser(lambda: cli.RecipeCLI(verb, []))
