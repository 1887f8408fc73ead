"""Reference pages of the command line, made from the parsers that the verbs themselves use.

A parser is had by calling the verb and stopping where it would parse its words, so whatever a verb does to build one is
in the pages too.
"""

import re
from dataclasses import dataclass
from unittest import mock

import jsonargparse

from lightning_igpt import callbacks, data, modules
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands.lightning_parser import EXTRA

SUPPRESSED = "==SUPPRESS=="
SHARED = "trainer."  # options that the verbs of Lightning share, and that have a page of their own
LONGEST = 60  # type or default that is shown
MEANINGS = {  # where the parser has what Lightning and jsonargparse tell programmers
    "--config": "A recipe: a YAML file, or the name of a shipped one. Several merge from left to right.",
    "--print_config": "Print what would run, as YAML, and stop.",
    "--seed_everything": "Seed of weights and of whatever is drawn; `true` takes one at random.",
    "--model": "The module: `PretrainModule`, `ProbeModule`, `FineTuneModule`, or one of your own with `--trust`. Its "
    "arguments follow as `--model.init_args.NAME`: [](modules.md).",
    "--data": "The data module: `PretrainDataModule`, `ProbeDataModule`, `FineTuneDataModule`, or one of your own. Its "
    "arguments follow as `--data.init_args.NAME`: [](data-modules.md).",
    "--ckpt_path": "A checkpoint: `fit` goes on from it, the other verbs run what it holds.",
}
OF_OPTIONS = {"--config": "A YAML file with options of this command.", "--print_config": "Print the options and stop."}
CLASSES = {
    "modules": ("Modules", "model", [modules.PretrainModule, modules.ProbeModule, modules.FineTuneModule]),
    "data-modules": (
        "Data modules",
        "data",
        [data.PretrainDataModule, data.ProbeDataModule, data.FineTuneDataModule],
    ),
    "callbacks": (
        "Callbacks",
        "trainer.callbacks",
        [made for made in map(callbacks.__dict__.get, callbacks.__all__) if isinstance(made, type)],
    ),
}


@dataclass(frozen=True)
class Option:
    """An option as a page shows it: its names, the type of its value, the default and what it means."""

    names: tuple
    kind: str
    default: str
    required: bool
    meaning: str

    @property
    def positional(self):
        """Whether it is given without its name."""
        return not self.names[0].startswith("-")

    def lines(self):
        """An item of a definition list."""
        after = [f"*{self.kind}*"] if self.kind else []
        after += ["required"] if self.required else [f"default `{self.default}`"] if self.default else []
        meaning = self.meaning.replace("\n", "\n  ") or "Not documented."
        return [
            f"{', '.join(f'**`{name}`**' for name in self.names)}{' ' * bool(after)}{', '.join(after)}",
            f": {meaning}",
            "",
        ]


class Stop(BaseException):
    """Carries a parser past every handler of errors."""


def parser_of(verb):
    """The parser of a verb; one of Lightning's brings those of all four as sub-commands."""

    def parse_args(parser, *args, **options):
        raise Stop(parser)

    with mock.patch.object(jsonargparse.ArgumentParser, "parse_args", parse_args):
        try:
            main([verb])
        except Stop as stop:
            return stop.args[0]
    raise LookupError(f"{verb} did not parse its words with jsonargparse")


def parts_of(parser):
    """The parsers of a verb's sub-verbs with a line on each; one without a name where it has none."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            return {name: (part, helps.get(name) or "") for name, part in action.choices.items()}
    return {"": (parser, "")}


def options_of(parser, lightning=False):
    """The options of a parser, in its order."""
    formatter = parser._get_formatter()
    told = MEANINGS if lightning else OF_OPTIONS
    found = []
    for action in parser._actions:
        names = tuple(name for name in action.option_strings if not name.endswith("+"))
        if "help" in action.dest.split(".") or SUPPRESSED in (action.help, action.dest) or names == ("--trainer",):
            continue
        meaning, kind, default, required = taken_apart(formatter._expand_help(action) if action.help else "")
        if names and names[-1] in told and (lightning or "--print_config" in parser._option_string_actions):
            meaning, kind = told[names[-1]], ""
        found.append(Option(names or (action.dest,), kind, default, required or bool(action.required), meaning))
    return found


def taken_before(options):
    """What Lightning's verbs take off their words before the parser sees them."""
    parts = [(*entry.name.partition(" ")[::2], entry.text) for entry in EXTRA]
    known = {option.names[0] for option in options}
    return [Option((flag,), value, "", False, text) for flag, value, text in parts if flag not in known]


def taken_apart(text):
    """Meaning, type, default and whether it is required, of a help text that ends in ``(type: int, default: 1)``."""
    end = re.search(r"\s*\(((?:required, |type: |default: ).*)\)$", text, re.DOTALL)
    facts, meaning = (end[1], text[: end.start()]) if end else ("", text)
    kind = re.search(r"type: (.*?)(?:, default: |, known subclasses: |$)", facts, re.DOTALL)
    default = re.search(r"default: (.*?)(?:, known subclasses: |$)", facts, re.DOTALL)
    shown = (plain_type(kind[1]) if kind else "", shown_default(default[1]) if default else "")
    shown = (shown[0] if len(shown[0]) <= LONGEST else "several types", shown[1])
    return markdown(meaning), *shown, facts.startswith("required")


def plain_type(text):
    """A type for readers: ``int, or one of a and b`` as ``int | a | b``; that it may be null is told by the default."""
    text = text.strip()
    whole = re.fullmatch(r"(\w+)\[(.*)\]", text, re.DOTALL)
    if len(split(text, "|")) > 1:
        parts = [plain_type(part) for part in split(text, "|")]
    elif whole and whole[1] in ("Union", "Optional", "Literal"):
        parts = [plain_type(part) for part in split(whole[2], ",")]
    elif whole:
        inner = ", ".join(plain_type(part) for part in split(whole[2], ","))
        return f"{whole[1].lower()} of {inner}" if whole[1].lower() in ("list", "tuple", "iterable") else whole[1]
    else:
        return text.strip("'\"").rpartition(".")[2] if not re.fullmatch(r"'.*'|[\d.]+", text) else text.strip("'")
    return " | ".join(dict.fromkeys(part for part in parts if part not in ("null", "None", "Untyped")))


def split(text, sign):
    """Split at a sign outside of brackets and quotes."""
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == "'"
        depth += (letter in "[({") - (letter in "])}")
        if letter == sign and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def shown_default(text):
    """The default, or nothing where it says nothing."""
    text = " ".join(text.split())
    return "" if text in ("null", "None") or "Unknown" in text or len(text) > LONGEST else text


def markdown(text):
    """Sphinx's roles and double backticks as Markdown, and nothing that it would take for a tag or a link."""
    text = re.sub(r":[\w:]+:`~?\.?([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*<\[{])", r"\\\1", part) for part in parts[::2]]
    return "\n".join(" ".join(line.split()) for line in "".join(parts).strip().splitlines() if line.strip())


def verb_page(verb):
    """The page of a verb with its sub-verbs."""
    lightning = verb in LIGHTNING_VERBS
    parts = parts_of(parser_of(verb))
    parts = {"": parts[verb]} if lightning else parts
    summary = {**LIGHTNING_VERBS, **OWN_VERBS}[verb]
    lines = [f"# {verb}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
    for name, (parser, told) in parts.items():
        if name:
            lines += [f"## {verb} {name}", "", markdown(told or parser.description or ""), ""]
        options = options_of(parser, lightning)
        options = [option for option in options if not option.names[0].startswith(f"--{SHARED}")]
        options += taken_before(options) if lightning else []
        given = [option.names[0] for option in options if option.positional]
        usage = " ".join(filter(None, ["lightning-igpt", verb, name, *given, "[options]"]))
        lines += ["```text", usage, "```", ""]
        lines += ["`--trainer.NAME` sets an option of the trainer: [](trainer.md).", ""] * lightning
        lines += [line for option in options for line in option.lines()]
    return "\n".join(lines)


def trainer_page():
    """What the trainer takes under every verb of Lightning's."""
    parser, _ = parts_of(parser_of("fit"))["fit"]
    options = [option for option in options_of(parser) if option.names[0].startswith(f"--{SHARED}")]
    lines = ["# Trainer", "", "Under `fit`, `validate`, `test` and `predict`; in a recipe, below `trainer`.", ""]
    return "\n".join(lines + [line for option in options for line in option.lines()])


def class_options(made):
    """What a class takes, as a recipe or the command line gives it."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(made, as_group=False, fail_untyped=False)
    return options_of(parser)


def classes_page(name):
    """What the classes of a kind take."""
    title, option, classes = CLASSES[name]
    lines = [
        f"# {title}",
        "",
        f"In a recipe below `init_args`, on the command line as `--{option}.init_args.NAME`.",
        "",
    ]
    for made in classes:
        lines += [f"## {made.__name__}", "", markdown((made.__doc__ or "").partition("\n")[0]), ""]
        for one in class_options(made):
            bare = tuple(name.removeprefix("--") for name in one.names)
            lines += Option(bare, one.kind, one.default, one.required, one.meaning).lines()
    return "\n".join(lines)


def pages():
    """All pages by name, as the table of contents has them."""
    made = {verb: verb_page(verb) for verb in [*LIGHTNING_VERBS, *OWN_VERBS]}
    return made | {"trainer": trainer_page()} | {name: classes_page(name) for name in CLASSES}
