"""The parser of every verb: help that can be read, and mistakes told in one line.

Not here: the layout of the help (``help_text.py``), its examples (``examples.py``); calling a function with what was
parsed (``arguments.py``).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser

from lightning_igpt.commands.examples import EXAMPLES
from lightning_igpt.commands.help_text import (
    Entry,
    Section,
    entry_of,
    layout,
    leaves_of,
    plain,
    width_of_terminal,
)
from lightning_igpt.spelling import there_is_no

PRINT_CONFIG = "Print all options as YAML, as they would be taken, and exit."
OPTIONS_FILE = "YAML file with any of these options."


class VerbParser(ArgumentParser):  # type: ignore[misc]
    """jsonargparse's, with help that can be read and errors of one line."""

    required_dests: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()  # options that are taken from the command line before it is parsed

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Remember what must be given: jsonargparse takes the marks away while it parses, and prints help then."""
        for part in [self, *(part for part, _ in subcommands(self).values())]:
            if not part.required_dests:
                part.required_dests = frozenset(one.dest for one in visible(part) if is_needed(one))
        return super().parse_args(*args, **options)

    @property
    def words(self) -> str:
        """Program, verb and sub-verb."""
        return words_of(self)

    @property
    def about(self) -> str:
        """What the verb does."""
        return str(self.description or "")

    def format_help(self, *_: Any) -> str:
        """The text of ``--help``; of one class, where jsonargparse has made this parser for ``--model.help`` or so."""
        if getattr(self, "_inner_parser", False):
            name = self.about.rpartition("=")[2]
            entries = [entry_of(action, switches=False) for action in visible(self)]
            return layout("", "", [Section(f"options of {name}", entries)], (), width_of_terminal())
        needed = self.needed()
        rest = [one for one in visible(self) if one not in needed and not isinstance(one, ActionConfigFile)]
        verbs = subcommands(self)
        sections = [
            Section("verbs", [Entry(name, plain(text)) for name, (_, text) in verbs.items()]),
            Section("needed", [entry_of(action) for action in needed]),
            *([] if verbs else self.sections(rest)),
            Section("also", self._always()),
        ]
        examples = EXAMPLES.get(self.words.partition(" ")[2], ())
        return layout(self.usage_line(), self.about, sections, examples, width_of_terminal())

    def needed(self) -> list[argparse.Action]:
        """What must be given."""
        return [one for one in visible(self) if is_needed(one) or one.dest in self.required_dests]

    def sections(self, actions: list[argparse.Action]) -> list[Section]:
        """The options that need not be given, under their headings."""
        return [Section("options", [entry_of(action) for action in actions])]

    def usage_line(self) -> str:
        """How to call it: what is needed, and no list of all that is possible."""
        verbs = subcommands(self)
        if verbs:
            return f"{self.words} {{{','.join(verbs)}}} ..."
        parts = [entry_of(action).name for action in self.needed()]
        given = [entry_of(one).name for one in visible(self) if not one.option_strings and one not in self.needed()]
        options = any(one.option_strings for one in visible(self) if one not in self.needed())
        return " ".join([self.words, *parts, *given, *["[options]"] * options])

    def format_usage(self) -> str:
        """The first line of the help."""
        return f"usage: {self.usage_line()}\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Tell wrong usage in one line, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = verb_meant(getattr(ex, "subcommand_parser", None) or self, message)
        print(f"{parser.words}: {mistake(parser, message)}", file=sys.stderr)
        raise SystemExit(2)

    def _always(self) -> list[Entry]:
        found = [Entry("-h, --help", "Show this help and exit.")]
        if subcommands(self):
            return found
        for action in self._actions:
            if isinstance(action, ActionConfigFile) and not is_recipe(action):
                found.append(Entry("--config FILE", OPTIONS_FILE))
            if "--print_config" in action.option_strings:
                found.append(Entry("--print_config", PRINT_CONFIG))
        return found


def words_of(parser: argparse.ArgumentParser) -> str:
    """Program, verb and sub-verb, as they are typed."""
    inner = getattr(parser, "_inner_parser", False)  # made by jsonargparse for the help of a class
    return "lightning-igpt" if inner else str(parser.prog).replace(" [options]", "")


def is_recipe(action: argparse.Action) -> bool:
    """Whether ``--config`` takes recipes; else it is jsonargparse's file of options."""
    return "recipe" in (action.help or "")


def is_needed(action: argparse.Action) -> bool:
    """Whether it must be given."""
    return bool(action.required) or (not action.option_strings and action.nargs not in ("?", "*"))


def visible(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options and arguments that users may give, those for help and the like left out."""
    for action in parser._actions:
        names = action.option_strings
        internal = names and (names[-1] in ("--help", "--print_config") or names[-1].endswith(".help"))
        hidden = action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction)
        if not (internal or hidden or type(action).__name__ == "_ActionConfigLoad"):
            yield action


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[Any, str]]:
    """The parsers of the sub-verbs, and what is said of each."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {one.dest: one.help or "" for one in action._choices_actions}
            return {name: (part, texts.get(name, "")) for name, part in action.choices.items()}
    return {}


def mistake(parser: argparse.ArgumentParser, message: str) -> str:
    """What argparse and jsonargparse say of wrong usage, in one line for people.

    Args:
        parser: That of the verb or sub-verb.
        message: Theirs.
    """
    see = f"See {words_of(parser)} --help"
    for kind in (_wrong_inside, _unknown, _missing, _wrong_value):
        if found := kind(parser, message, see):
            return found
    return f"{' '.join(message.split())}. {see}"


def verb_meant(parser: Any, message: str) -> Any:
    """The parser of the sub-verb where that of its verb complains: ``show.name`` is missing."""
    found = re.match(r"the following arguments are required: (\w+)\.", message)
    return subcommands(parser).get(found[1], (parser, ""))[0] if found else parser


def _unknown(parser: argparse.ArgumentParser, message: str, see: str) -> str | None:
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        given = found[1].split()
        option = next((word for word in given if word.startswith("-")), None)
        if option is None:
            return f"{' '.join(given)!r} is one word too many. {see}"
        known = [*options_of(parser), *getattr(parser, "beside", ())]
        return there_is_no("option", option.partition("=")[0], known, see)
    if found := re.match(r"ambiguous option: (\S+) could match (.*)", message, re.DOTALL):
        names = [name for name in re.findall(r"--[\w.+-]+", found[2]) if name != "--print_shtab"]  # jsonargparse's own
        if len(names) == 1:
            return f"{found[1]} is short for {names[0]}; write it out. {see}"
        return f"{found[1]} is short for several options: {', '.join(names)}; write out the one meant. {see}"
    if found := re.search(r"invalid choice: '(.*?)' \(choose from", message):
        verbs = list(subcommands(parser))
        if verbs:
            return there_is_no("verb", found[1], verbs, f"It is one of {', '.join(verbs)}. {see}")
        name, words = message.partition(":")[0].removeprefix("argument "), re.findall(r"'([^']*)'", message)
        return f"{name} is {found[1]!r}; it must be {' or '.join(_comma(words[1:]))}. {see}"
    if found := re.search(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message):
        name = found[1].rsplit(".", 1)[-1]
        key = _key(message)
        rest = f"{see.removesuffix(' --help')} --{key}.help {name}"
        told = there_is_no("option", found[2], parameters_of(_class(parser, key, name)), rest)
        return f"{key} is a {name}: {told}"
    if found := re.search(r"(?:Option|not accept option) '([\w.]+)'", message):
        known = [name.lstrip("-") for name in options_of(parser)]
        return there_is_no("option", found[1].removeprefix(f"{_verb(parser)}."), known, see)
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        asked = re.match(r"--([\w.]+)\.help: ", message)
        key = asked[1] if asked else _key(message)
        return f"--{key}: {there_is_no('class', found[1], classes_of(parser, key), see)}"
    return None


def _missing(parser: argparse.ArgumentParser, message: str, see: str) -> str | None:
    if found := re.match(r"the following arguments are required: (.*)", message):
        keys = found[1].split(", ")
        keys = [key.removeprefix(f"{_verb(parser)}.") for key in keys]
        if {"model", "data"} & {*keys}:
            given = _listed(f"--{key}" for key in keys)
            return f"{given} missing; name a recipe that has them by --config. See lightning-igpt recipes list"
        actions = {action.dest: action for action in parser._actions}
        shown = [_shown(actions.get(key), key) for key in keys]
        return f"{_listed(shown)} missing. {see}"
    if "but it was not provided" in message:
        return f"say which verb of it: {', '.join(subcommands(parser))}. {see}"
    return None


def _wrong_value(parser: argparse.ArgumentParser, message: str, see: str) -> str | None:
    key = _key(message)
    action = next((one for one in parser._actions if one.dest == key), None)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if action is None or value is None:
        return None
    wanted = _wanted(getattr(action, "_typehint", None))
    return wanted and f"{_shown(action, key).split(' ')[0]} is {value[1]!r}; it must be {wanted}. {see}"


def _wrong_inside(parser: argparse.ArgumentParser, message: str, see: str) -> str | None:
    """Of a plain option of a class; None where a class lies in a class, and all that jsonargparse says is needed."""
    found = re.search(
        r"Problem with given class_path '([\w.]+)':\s+Parser key \"(\w+)\":.*?(?:Got value|Given value): ([^\n]*)",
        message,
        re.DOTALL,
    )
    if found is None or message.count("Parser key") != 2:
        return None
    key, name = _key(message), found[1].rsplit(".", 1)[-1]
    wanted = _wanted(_hint_of(_class(parser, key, name), found[2]))
    more = f"{see.removesuffix(' --help')} --{key}.help {name}"
    return wanted and f"--{key}.{found[2]} is {found[3]!r}; it must be {wanted}. {more}"


def _hint_of(kind: type | None, name: str) -> Any:
    """The type of a parameter of a class or of its bases; None where it cannot be known."""
    for base in kind.__mro__ if kind is not None else ():
        try:
            hints = get_type_hints(base.__dict__.get("__init__"))
        except (NameError, TypeError):  # a name that is there for type checkers only, or no method at all
            continue
        if name in hints:
            return hints[name]
    return None


def _wanted(hint: Any) -> str | None:
    """What a plain type takes, in words; None for one that takes more than words, numbers and true or false."""
    leaves = list(leaves_of(hint))
    if any(isinstance(one, type) and one not in (int, float, bool, str, list, tuple) for one in leaves):
        return None
    words = [str(one) for one in leaves if not isinstance(one, type)]
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    wanted = words + [text for kind, text in kinds.items() if kind in leaves and not (kind is int and float in leaves)]
    return " or ".join(_comma(wanted)) if wanted else None


def _comma(words: list[str]) -> list[str]:
    return [", ".join(words[:-1]), words[-1]] if len(words) > 1 else words


def _shown(action: argparse.Action | None, key: str) -> str:
    if action is None:
        return f"--{key}"
    return action.option_strings[-1] if action.option_strings else key


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'}"


def _key(message: str) -> str:
    found = re.search(r'Parser key "([\w.]+)"', message)
    return found[1] if found else ""


def _verb(parser: argparse.ArgumentParser) -> str:
    return str(parser.prog).rsplit(" ", 1)[-1]


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The names of all options, with their dashes."""
    return [name for action in visible(parser) for name in action.option_strings if name.startswith("--")]


def classes_of(parser: argparse.ArgumentParser, key: str) -> list[str]:
    """Names of the classes that an option takes, as far as they are imported."""
    return [one.__name__ for one in _classes(parser, key)]


def _classes(parser: argparse.ArgumentParser, key: str) -> list[type]:
    action = next((one for one in parser._actions if one.dest == key), None)
    found: list[type] = [one for one in leaves_of(getattr(action, "_typehint", None)) if isinstance(one, type)]
    for one in found:
        below: list[type] = [] if one.__module__ == "builtins" else one.__subclasses__()
        found += [kind for kind in below if kind not in found]
    return [one for one in found if not one.__name__.startswith("_")]


def _class(parser: argparse.ArgumentParser, key: str, name: str) -> type | None:
    return next((one for one in _classes(parser, key) if one.__name__ == name), None)


def parameters_of(kind: type | None) -> list[str]:
    """What the constructors of a class and of its bases take."""
    names: list[str] = []
    for base in kind.__mro__ if kind is not None else ():
        code = getattr(base.__dict__.get("__init__"), "__code__", None)
        names += [] if code is None else code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return names
