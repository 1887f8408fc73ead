import enum
import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_igpt.callbacks import provenance
from lightning_igpt.callbacks.provenance import code, command_line, file_identity, machine, plain, repository, versions

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


def git(folder, *words):
    subprocess.run(["git", *IDENTITY, "-C", str(folder), *words], check=True, capture_output=True)


def commit(folder, **files):
    """A repository with one commit more, which adds or changes files."""
    folder.mkdir(exist_ok=True)
    git(folder, "init", "-q", "-b", "trunk")
    for name, text in files.items():
        (folder / name).write_text(text)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "more")
    return folder


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("fit --config x.yaml --model.lr 0.1", "fit --config x.yaml --model.lr 0.1"),
        ("fit --hub.token abc --seed 1", "fit --hub.token *** --seed 1"),
        ("fit --hub.token=abc=d,e --seed 1", "fit --hub.token=*** --seed 1"),
        ("--api_KEY abc --Password=x -secret y", "--api_KEY *** --Password=*** -secret ***"),
        ("--use_key --seed 1", "--use_key --seed 1"),
        ("HF_TOKEN=hf_abc python", "HF_TOKEN=*** python"),
        ("https://me:word@host/x s3://bucket/tokens", "https://***@host/x s3://bucket/tokens"),
        ("https://host/x?token=abc&n=1", "https://host/x?token=***&n=1"),
        ("--data.source tokenised/set --model.tokens", "--data.source tokenised/set --model.tokens"),
    ],
)
def test_secrets_are_masked_and_nothing_else(typed, shown):
    assert command_line(typed.split()) == shown.split()


@pytest.mark.parametrize("word", ['{"api_key": "abc def", "n": 1}', "{'api_key':'abc def', 'n': 1}"])
def test_secrets_in_words_of_several_settings_are_masked(word):
    (shown,) = command_line([word])
    assert "abc" not in shown and "def" not in shown and "n" in shown and "1" in shown
    assert "abc" not in command_line(["--wandb.api_key=abc def"])[0]


def test_plain_values_are_such_that_json_and_safe_checkpoints_take(tmp_path):
    class Kind(str, enum.Enum):
        ONE = "one"

    values = {
        1: [np.float32(0.5), np.int64(3), True, None],
        "nan": float("nan"),
        "path": Path("a", "b"),
        "tuple": (1, 2),
        "set": {3, 1},
        "dtype": torch.bfloat16,
        "kind": Kind.ONE,
        "function": torch.relu,
        "class": Path,
        "object": torch.nn.ReLU(),
        "bytes": b"x",
        "token": "abc",
        "keys": ["abc"],
        "n_tokens": 4,
        "version": torch.__version__,
    }
    found = plain(values)
    assert json.loads(json.dumps(found, allow_nan=False)) == found == plain(found)
    torch.save(found, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True) == found
    assert found["1"] == [0.5, 3, True, None] and found["nan"] == "nan" and found["path"] == os.path.join("a", "b")
    assert found["tuple"] == [1, 2] and found["set"] == [1, 3] and found["dtype"] == "torch.bfloat16"
    assert found["object"] == "torch.nn.modules.activation.ReLU" and found["bytes"] == "builtins.bytes"
    assert found["token"] == found["keys"] == "***" and found["n_tokens"] == 4


def test_versions_and_machine_are_told(monkeypatch):
    found = versions()
    assert found["torch"] == torch.__version__ and found["numpy"] == np.__version__ and found["python"][0] == "3"
    monkeypatch.setattr(provenance, "LIBRARIES", ("no-such-library",))
    assert versions()["no-such-library"] is None
    assert machine()["threads"] == torch.get_num_threads() and machine()["processor"]


def test_the_state_of_a_repository(tmp_path):
    folder = commit(tmp_path / "code", **{"a.py": "1\n", "b.py": "1\n"})
    clean = repository(folder)
    assert len(clean["commit"]) == 40 and clean["branch"] == "trunk"
    assert (clean["dirty"], clean["changed"], clean["changes"]) == (False, 0, None)
    (folder / "new.py").write_text("x")  # not part of the repository
    assert repository(folder) == clean
    (folder / "a.py").write_text("2\n")
    first = repository(folder)
    (folder / "a.py").write_text("3\n")
    second = repository(folder)
    assert first["dirty"] and first["changed"] == second["changed"] == 1 and first["changes"] != second["changes"]
    git(folder, "checkout", "-q", "--detach")
    git(folder, "commit", "-q", "-a", "-m", "more")
    assert repository(folder)["commit"] != clean["commit"] and repository(folder)["branch"] is None


def test_no_repository_no_commit_and_no_git(tmp_path, monkeypatch):
    assert repository(tmp_path) is None and repository(tmp_path / "absent") is None
    git(tmp_path, "init", "-q")
    assert repository(tmp_path)["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert repository(tmp_path) is None


def test_git_that_takes_too_long_is_left_alone(tmp_path, monkeypatch):
    folder, program = commit(tmp_path / "code", a="1"), tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(provenance, "TIMEOUT", 0.1)
    assert repository(folder) is None


def test_a_repository_around_an_installed_package_is_not_the_packages(tmp_path, monkeypatch):
    folder = commit(tmp_path / "code", **{"a.py": "1", ".gitignore": "env"})
    (folder / "env").mkdir()
    (folder / "env" / "__init__.py").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(provenance, "PACKAGE", folder / "env")
    assert code()["working_directory"] == repository(folder) and code()["package"] is None
    monkeypatch.setattr(provenance, "PACKAGE", commit(tmp_path / "package", **{"__init__.py": ""}))
    assert code()["package"] == repository(tmp_path / "package")


def test_a_file_is_known_by_its_hash_or_its_date(tmp_path, monkeypatch):
    file = tmp_path / "x.ckpt"
    file.write_bytes(b"weights")
    identity = {"path": str(file), "bytes": 7}
    assert file_identity(file) == identity | {"sha256": hashlib.sha256(b"weights").hexdigest()}
    assert file_identity(tmp_path) == {"path": str(tmp_path)}
    monkeypatch.setattr(provenance, "LARGEST", 6)
    os.utime(file, (0, 0))
    assert file_identity(file) == identity | {"modified": "1970-01-01T00:00:00+00:00"}
