"""Completion scripts, asked in the shells themselves."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_igpt
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands import recipes
from lightning_igpt.commands.completion import SHELLS, TABLE, script
from lightning_igpt.commands.completion_table import table

PACKAGE = str(Path(lightning_igpt.__file__).parents[1])
LINES = {
    "re": {"report", "recipes"},
    "recipes ": {"list", "show", "copy"},
    "recipes show digits_tiny_p": {"digits_tiny_pretrain", "digits_tiny_probe"},
    "fit --config cifar10_tiny_p": {"cifar10_tiny_pretrain", "cifar10_tiny_probe"},
    "fit --trainer.max_": {"--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"},
    "fit --model P": {"PretrainModule", "ProbeModule"},
    "fit --model.pre": {"--model.pretrained"},
    "fit --dry": {"--dry_run"},
    "plan --network igpt_t": {"igpt_tiny"},
    "plan --device_kind h20": {"h200"},
    "convert --to safe": {"safetensors"},
    "launch slurm --nod": {"--nodes"},
    "score --pretrained my": {"my.ckpt"},
    "palette fit ph": {"photos"},
    "report ": {"photos"},
    "fit --data.init_args.so": {"--data.init_args.source", "--data.init_args.source_weights"},
    "fit --trainer.callbacks Comp": {"CompileBlocks", "CompletionGrid"},
    "complete --device c": {"cpu", "cuda"},
}
BASH = """
tab() {
  COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
  $(complete -p lightning-igpt | sed 's/.*-F \\([^ ]*\\).*/\\1/') lightning-igpt "${@: -1}" "${@: -2:1}"
  echo "${COMPREPLY[*]}"
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "my.ckpt").touch()
    return tmp_path


def need(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")


def test_the_table_is_that_of_the_parsers():
    found = json.loads(json.dumps(table(LIGHTNING_VERBS, OWN_VERBS)))
    cure = "python -m lightning_igpt.commands.completion_table"
    assert found == json.loads(TABLE.read_text(encoding="utf-8")), f"options have changed; run {cure}"


def test_bash(folder):
    need("bash")
    calls = []
    for line in LINES:
        words = [*line.split(), ""] if line.endswith(" ") else line.split()
        calls.append("tab lightning-igpt " + " ".join(f"'{word}'" for word in words))
    text = "\n".join([script("bash"), BASH, *calls])
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert dict(zip(LINES, ({*line.split()} for line in done.stdout.splitlines()), strict=True)) == LINES


def test_bash_answers_without_python(folder):
    need("bash")
    text = "\n".join([script("bash"), BASH, "PATH=/nowhere_but_sed", "tab lightning-igpt fit --trainer.ma"])
    text = text.replace("PATH=/nowhere_but_sed", f"PATH={Path(shutil.which('sed')).parent}; python() {{ exit 9; }}")
    start = time.perf_counter()
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, check=True)
    assert "--trainer.max_steps" in done.stdout
    assert time.perf_counter() - start < 3  # the machine may be busy; alone it takes a twentieth of a second


def test_fish(folder):
    need("fish")
    calls = [f"echo (complete -C 'lightning-igpt {line}' | string split -f1 \\t | string join ' ')" for line in LINES]
    (folder / "script.fish").write_text(script("fish"))
    text = "\n".join(["source script.fish", *calls])
    done = subprocess.run(["fish", "--no-config", "-c", text], capture_output=True, text=True, check=True)
    found = dict(zip(LINES, ({*line.split()} for line in done.stdout.splitlines()), strict=True))
    for line, expected in LINES.items():
        assert expected <= {name.rstrip("/") for name in found[line]}, line


def test_zsh(folder):
    need("zsh")
    text = 'autoload -Uz compinit; compinit -u -D; eval "$(cat script.zsh)"; echo ${_comps[lightning-igpt]}'
    (folder / "script.zsh").write_text(script("zsh"))
    assert subprocess.run(["zsh", "-n", "script.zsh"], check=True).returncode == 0
    done = subprocess.run(["zsh", "-f", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_shtab_lightning_igpt" and done.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_knows_all_verbs_and_recipes(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*LIGHTNING_VERBS, *OWN_VERBS, *recipes.names()])


def test_printing_it_imports_nothing_heavy():
    code = "import sys; from lightning_igpt.__main__ import main; main(['completion', 'bash']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": PACKAGE}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "lightning", "datasets", "numpy"} & {*done.stdout.rpartition("\n")[0].split("\n")[-1].split()}


def test_another_shell_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "bsh"])
    assert "shell is 'bsh'; it must be bash, zsh or fish" in capsys.readouterr().err
