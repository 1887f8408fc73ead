"""push_to_hub and hub ids, with huggingface_hub's calls replaced by records of their arguments."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, push_to_hub, save_pretrained
from tests.networks import random_network


def test_push_uploads_what_save_writes(tmp_path, monkeypatch):
    network, palette, card, uploaded = random_network(), Palette.load("gray:20"), {"steps": 12}, {}

    def upload(*, repo_id, folder_path, commit_message):
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/abc")

    made = create_autospec(HfApi)
    made.return_value.upload_folder.side_effect = upload
    monkeypatch.setattr("huggingface_hub.HfApi", made)
    for name in ("cats", "me/cats@main", "https://example.org/me/cats"):
        with pytest.raises(ValueError, match="must be 'owner/name'"):
            push_to_hub(name, network, palette)
    assert not made.called
    address = push_to_hub("me/cats", network, palette, card=card, private=True, token="hf_secret")
    assert address == "https://hub/me/cats/commit/abc" and made.call_args.kwargs["token"] == "hf_secret"
    made.return_value.create_repo.assert_called_once_with("me/cats", private=True, exist_ok=True)
    save_pretrained(tmp_path / "local", network, palette, card=card)
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert uploaded == local and uploaded.keys() >= {"config.json", "model.safetensors", "README.md"}


def test_a_hub_id_may_name_a_revision(tmp_path, monkeypatch):
    save_pretrained(tmp_path, random_network(), Palette.load("gray:20"))
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for source, expected in [("me/cats", None), ("me/cats@v1.0", "v1.0"), ("me/cats@refs/pr/3", "refs/pr/3")]:
        loaded = load_pretrained(source)
        assert loaded.origin == f"hub repository {source}" and loaded.path is None
        assert asked.pop() == ("me/cats", expected)
