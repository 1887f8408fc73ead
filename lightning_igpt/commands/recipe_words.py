"""The command line of Lightning's verbs without Lightning: its help, and checks before torch is imported."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from jsonargparse import get_loader

from lightning_igpt.commands import help as shared
from lightning_igpt.commands import recipes
from lightning_igpt.commands.arguments import SEEDS, one_line_errors, reader
from lightning_igpt.commands.help import PACKAGE, PROGRAM, Source, did_you_mean, parameters, texts, usage_error

CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")  # values of Lightning's ckpt_path that are no paths
RESUME = "fit: Resume a run from this checkpoint, or the newest in this folder; auto searches default_root_dir."
SEED = f"Seed for initialization, data order and sampling, 0 to {SEEDS - 1}; true picks one at random. Default: 0."
WHAT = (  # names, what stands for the value, explanation
    ("-c --config", "RECIPE", "A YAML file or shipped recipe; later files override earlier ones, options all."),
    ("--model", "CLASS", "PretrainModule, ProbeModule or FineTuneModule; its options are --model.NAME."),
    ("--data", "CLASS", "PretrainDataModule, ProbeDataModule or FineTuneDataModule; its options are --data.NAME."),
    ("--resume", "auto|PATH", RESUME),
    ("--ckpt_path", "CHECKPOINT", "Checkpoint of this recipe: fit resumes from it, the other verbs evaluate it."),
    ("--random_weights", "true", "validate, test, predict: Run an untrained network, as a baseline."),
    ("--seed_everything", "N", SEED),
    ("--dry_run", "", "Outline the run, with sizes and, for fit, memory and time, without training or writing."),
    ("--trust", "NAME", "A further package, module, class or URL that the recipe may name."),
    ("--model.help", "CLASS", "The options of a class; likewise --data.help and --trainer.callbacks.help."),
    ("-h --help", "", "Show this help and exit."),
    ("--print_config", "", "Print all options and their values as YAML, and exit."),
    ("--print_completion", "SHELL", "Print a script that completes options: shtab-bash, shtab-zsh (needs shtab)."),
)
CLASSES = r"(lightning_igpt\..*)?(Pretrain|Probe|FineTune)(Data)?Module"  # this package's
OURS = {  # files that define the options of --model and --data
    "model": ("modules/pretrain", "modules/probe", "modules/finetune"),
    "data": ("data/datamodule", "data/pretrain", "data/probe", "data/finetune"),
}
FIRST = ("default_root_dir", "accumulate_grad_batches", "num_nodes", "logger")  # Lightning's options needed most


def trainers() -> tuple[Any, Any]:
    """make_trainer, and Lightning's Trainer, whose options it passes on, as functions without bodies."""
    spec = importlib.util.find_spec("lightning")
    file = Path(str(spec and spec.origin)).parent / "pytorch" / "trainer" / "trainer.py"
    return Source(PACKAGE / "trainer.py")["make_trainer"], Source(file)["__init__"]


def page(verb: str) -> str:
    """The text of ``--help``: what runs, the trainer's options needed most, and names of the others."""
    prog = f"{PROGRAM} {verb}"
    usage = f"{prog} --config RECIPE{' --ckpt_path CHECKPOINT' * (verb != 'fit')} [options]"
    text = shared.Parser(prog=prog, usage=usage, description=shared.LIGHTNING_VERBS[verb].capitalize())
    ours, theirs = trainers()
    further, about, known = texts(theirs), texts(ours), parameters(theirs) | parameters(ours)
    trainer = {name: about[name] for name in parameters(ours) if name not in ("module", "data")}
    trainer |= {name: further.pop(name).partition(". ")[0] for name in FIRST}
    values = {name: reader(known[name].annotation)["metavar"] or "VALUE" for name in trainer}
    rows = [(f"--trainer.{name}", values[name], words) for name, words in trainer.items()]
    for heading, options in {"what to run": WHAT, "the trainer": rows}.items():
        group = text.add_argument_group(heading)
        for names, value, words in options:
            takes: dict[str, Any] = {"metavar": value} if value else {"action": "store_true"}
            group.add_argument(*names.split(), help=words.replace("%", "%%"), **takes)
    others = " ".join(name for name in further if name not in trainer)
    others = fill(others, shared.columns() - 2, break_on_hyphens=False)
    text.add_argument_group("further options of Lightning's Trainer, as --trainer.NAME", others)
    return text.format_help()


def check(words: Sequence[str]) -> None:
    """Print the help, or exit where an option does not exist, or a recipe or a checkpoint that is named."""
    verb, prog = words[0], f"{PROGRAM} {words[0]}"
    if {"-h", "--help"} & {*words}:
        print(page(verb), end="")
        raise SystemExit(0)
    options = list(_options(words[1:]))
    names = {name for name, _ in options}
    runs = not any(name.startswith("print_") for name in names)
    with one_line_errors(prog):
        recipes_given = [_recipe(value, prog) for name, value in options if name in ("c", "config") and value]
        parts = {"trainer": {"help"}.union(*map(parameters, trainers()))} | {
            top: _inner(top, [recipe.get(top) for recipe in recipes_given] + [v for n, v in options if n == top])
            for top in OURS
            if any(name.startswith(f"{top}.") for name in names)
        }
        for name, value in options:
            _check_name(name.rstrip("+"), parts, prog)
            rest = name.partition(".")[2].removeprefix("init_args.")
            if name in ("ckpt_path", "resume") and not {"resume", "ckpt_path"} <= names:
                check_checkpoint(**{name.removeprefix("ckpt_"): value})
            elif runs and value != "null" and rest in ("source", "pretrained"):
                shared.check_paths({rest: value})


def _check_name(name: str, parts: dict[str, set[str]], prog: str) -> None:
    known = {name.lstrip("-").partition(".")[0] for names, *_ in WHAT for name in names.split()} | {"trainer"}
    top, _, rest = name.partition(".")
    inner = rest.removeprefix("init_args.").partition(".")[0]
    choices = parts.get(top) or {inner}
    if top not in known or inner not in choices | {""}:
        names = [f"--{top}.{word}" for word in choices if top in known]
        usage_error(prog, f"there is no option --{name}{did_you_mean(f'--{top}.{inner}', names)}")


def _inner(top: str, classes: list[Any]) -> set[str]:
    """The options of this package's classes for --model or --data; empty, that is any, unless only those are named."""
    named = [str(value.get("class_path", "") if isinstance(value, dict) else value or "") for value in classes]
    if not any(named) or not all(re.fullmatch(CLASSES, name) for name in named if name):
        return set()
    functions = [Source(PACKAGE / f"{file}.py")["__init__"] for file in OURS[top]]
    return {"class_path", "init_args", "dict_kwargs", "help"}.union(*map(parameters, functions))


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names without hyphens, and values, of the options in a command."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if word.startswith("--") or word == "-c":
            name, is_joined, value = word.lstrip("-").partition("=")
            yield name, value if is_joined else following


def _recipe(value: str, prog: str) -> dict[str, Any]:
    path = Path(value) if Path(value).exists() else recipes.find(value)
    try:  # a pipe can be read once only
        recipe = get_loader("yaml")(path.read_bytes().decode("utf-8", "replace") if path.is_file() else "")
    except Exception as error:  # PyYAML's
        usage_error(prog, f"{path} is no YAML: {error}")
    return recipe if isinstance(recipe, dict) else {}


def check_checkpoint(path: str | None = None, resume: str | None = None) -> None:
    """Raise FileNotFoundError where ``ckpt_path`` or ``resume`` is a path that does not exist."""
    if path and path.split(":")[0] not in CHECKPOINT_WORDS and "://" not in path and not Path(path).exists():
        raise FileNotFoundError(f"ckpt_path {path} does not exist; it names the checkpoint of a run")
    if resume and resume.lower() != "auto" and not Path(resume).expanduser().exists():
        raise FileNotFoundError(f"--resume {resume} does not exist; name a checkpoint or a run folder, or auto")
