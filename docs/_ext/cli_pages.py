"""Reference pages of the command line: the help of every verb, and what modules, data modules and callbacks take."""

import contextlib
import inspect
import io
import os
from unittest import mock

from lightning.pytorch import Trainer

from lightning_igpt import callbacks, data, modules
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands.arguments import parameter_texts
from lightning_igpt.commands.help import EXAMPLES
from lightning_igpt.trainer import make_trainer

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


def help_of(words):
    """What a verb prints for ``--help`` in a terminal of 80 columns."""
    out = io.StringIO()
    columns = mock.patch.dict(os.environ, {"COLUMNS": "80"})
    with columns, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
    return out.getvalue()


def verb_page(verb):
    """The page of a verb with its sub-verbs."""
    summary = {**LIGHTNING_VERBS, **OWN_VERBS}[verb]
    lines = [f"# {verb}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
    parts = [name for name in EXAMPLES if name.split()[0] == verb]
    for name in parts:
        lines += [f"## {name}", ""] * (len(parts) > 1) + ["```text", help_of(name).rstrip(), "```", ""]
    return "\n".join(lines)


def parameters_of(made, skip=()):
    """What a function, or a class with its bases, takes, as items of a definition list."""
    sources = [base for base in made.__mro__ if "__init__" in vars(base)] if isinstance(made, type) else [made]
    lines, seen = [], {"self", *skip}
    for source in sources:
        texts, parameters = parameter_texts(source), inspect.signature(source).parameters
        for name, parameter in parameters.items():
            if name in seen or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            seen.add(name)
            facts = [] if parameter.annotation is parameter.empty else [f"`{parameter.annotation}`"]
            facts += ["required"] if parameter.default is parameter.empty else [f"default `{parameter.default}`"]
            lines += [f"**`{name}`** {', '.join(facts)}", f": {texts.get(name) or 'Not documented.'}", ""]
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return lines


def trainer_page():
    """What the trainer takes under every verb of Lightning's."""
    lines = ["# Trainer", "", "Under `fit`, `validate`, `test` and `predict`; in a recipe, below `trainer`.", ""]
    lines += parameters_of(make_trainer, skip=("module", "data"))
    lines += ["## Options of Lightning's Trainer", "", *parameters_of(Trainer.__init__)]
    return "\n".join(lines)


def classes_page(name):
    """What the classes of a kind take."""
    title, option, classes = CLASSES[name]
    lines = [f"# {title}", "", f"In a recipe below `init_args`, on the command line as `--{option}.NAME`.", ""]
    for made in classes:
        lines += [f"## {made.__name__}", "", (made.__doc__ or "").partition("\n")[0], "", *parameters_of(made)]
    return "\n".join(lines)


def pages():
    """All pages by name, as the table of contents has them."""
    made = {verb: verb_page(verb) for verb in [*LIGHTNING_VERBS, *OWN_VERBS]}
    return made | {"trainer": trainer_page()} | {name: classes_page(name) for name in CLASSES}
