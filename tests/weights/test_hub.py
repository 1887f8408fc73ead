"""push_to_hub and hub ids against a stand-in for the hub on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, push_to_hub, save_pretrained
from tests.networks import random_network


class Hub(BaseHTTPRequestHandler):
    """The few answers that huggingface_hub asks for when it makes a repository and commits files."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/me/cats"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"{self.server.address}/me/cats/commit/abc", "commitOid": "abc"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self.send_error(404)

    def do_GET(self):
        self._answer({"sha": "abc", "siblings": [], "id": "me/cats"})

    def _answer(self, values):
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.created, server.asked = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_push_uploads_what_save_writes(tmp_path, hub):
    network, palette, card = random_network(), Palette.load("gray:20"), {"steps": 12}
    for name in ("cats", "me/cats@main", "https://example.org/me/cats"):
        with pytest.raises(ValueError, match="must be 'owner/name'"):
            push_to_hub(name, network, palette)
    assert not hub.asked
    address = push_to_hub("me/cats", network, palette, card=card, private=True, token="hf_secret")
    assert address.endswith("/me/cats/commit/abc")
    assert hub.created[0]["name"] == "cats" and hub.created[0]["organization"] == "me"
    assert all(authorization == "Bearer hf_secret" for _, authorization in hub.asked)
    save_pretrained(tmp_path / "local", network, palette, card=card)
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert hub.files == local and set(local) >= {"config.json", "model.safetensors", "README.md"}


def test_a_hub_id_may_name_a_revision(tmp_path, monkeypatch):
    save_pretrained(tmp_path, random_network(), Palette.load("gray:20"))
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for source, expected in [("me/cats", None), ("me/cats@v1.0", "v1.0"), ("me/cats@refs/pr/3", "refs/pr/3")]:
        assert source in load_pretrained(source).origin
        assert asked.pop() == ("me/cats", expected)
