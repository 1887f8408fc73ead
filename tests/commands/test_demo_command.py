import contextlib
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.commands import demo
from lightning_igpt.commands.demo import MAX_BYTES, PAGE, refusal
from lightning_igpt.commands.demo_studio import Ask, Studio
from lightning_igpt.commands.images import read_images
from lightning_igpt.config import EMBEDDED, ImageGPTConfig
from lightning_igpt.images import decode
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import surprise_map
from lightning_igpt.sampling import complete, inpaint, score
from lightning_igpt.weights import ModelCard, Pretrained
from tests.demo_server import ask, request, serving
from tests.networks import random_network

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
COLOR = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 512}


def studio(palette="openai", data=None, **fields):
    config = ImageGPTConfig(**COLOR | {"image_size": 8} | fields)
    return Studio(Pretrained(random_network(config), Palette.load(palette), "random", card=ModelCard(data=data)), CPU)


@pytest.fixture(scope="module")
def digits():
    return studio("gray:16", "digits", vocab_size=16)


@pytest.fixture(scope="module")
def photos():
    return studio()


@pytest.fixture(scope="module")
def bert():
    return studio(objective="bert")


@pytest.fixture(scope="module")
def port(digits, photos):
    with serving(digits, photos) as port:
        yield port


def first_picture(room):
    return room.start()["pictures"][0]["tokens"]


def drawn(lines, tokens, n_samples):
    """The samples (n, T) that the lines tell, -1 where they tell nothing; a pixel may be told only once."""
    samples = torch.full((n_samples, len(tokens)), -1)
    for line in lines:
        for sample, positions, ids in zip(samples, line["positions"], line["tokens"], strict=True):
            assert (sample[positions] == -1).all()
            sample[positions] = torch.tensor(ids, dtype=torch.long)
    return samples


def test_rows_come_one_by_one_and_are_those_of_complete(digits, port):
    tokens = first_picture(digits)
    settings = {"n_samples": 3, "temperature": 0.9, "top_k": 8, "top_p": 0.95}
    status, lines = ask(port, "/0/draw", tokens=tokens, keep_rows=5, seed=7, **settings)
    assert status == 200 and lines[0] == {"begun": True} and lines[-1]["seconds"] >= 0
    rows = [list(range(8 * row, 8 * row + 8)) for row in (5, 6, 7)]
    assert [line["positions"] for line in lines[1:-1]] == [[row] * 3 for row in rows]
    assert [line["done"] for line in lines[1:-1]] == pytest.approx([1 / 3, 2 / 3, 1])
    prompt = torch.tensor([tokens[:40]])
    expected = complete(digits.network, prompt, generator=torch.Generator().manual_seed(7), **settings)[0]
    assert torch.equal(drawn(lines[1:-1], tokens, 3)[:, 40:], expected[:, 40:])
    assert ask(port, "/0/draw", tokens=tokens, keep_rows=5, seed=7, **settings)[1][1:-1] == lines[1:-1]
    assert ask(port, "/0/draw", tokens=tokens, keep_rows=5, seed=8, **settings)[1][1:-1] != lines[1:-1]


@pytest.mark.parametrize("kind", ["photos", "bert"])
def test_painted_holes_are_filled_as_inpaint_does(kind, request):
    room, lines, hole = request.getfixturevalue(kind), [], [9, 10, 17, 18, 40]
    tokens = first_picture(room)
    room.draw(Ask(tokens, hole=hole, n_samples=2, steps=3, seed=1), lines.append, threading.Event())
    known = torch.ones(2, 64, dtype=torch.bool)
    known[:, hole] = False
    options = {"steps": 3, "generator": torch.Generator().manual_seed(1)}
    expected = inpaint(room.network, torch.tensor([tokens] * 2), known, **options)
    found = drawn(lines[1:-1], tokens, 2)
    assert torch.equal(found[:, hole], expected[:, hole])
    assert (found[known] == -1).all(), "only the hole is told"
    assert len(lines) - 2 == (3 if kind == "bert" else 5)  # steps, or rows from the first hole's to the last's
    assert lines[-2]["done"] == 1


def test_surprise_is_that_of_score(digits, port):
    tokens = first_picture(digits)
    status, [found] = ask(port, "/0/score", tokens=tokens)
    nats = score(digits.network, torch.tensor([tokens]))[0]
    assert status == 200 and found["nats"] == pytest.approx(nats.tolist())
    assert found["mean"] == pytest.approx(nats.mean().item()) and found["uniform"] == pytest.approx(np.log(16))
    assert found["bits"] == pytest.approx(found["mean"] / np.log(2))
    heat = surprise_map(nats.view(8, 8), limit=found["high"])
    assert found["heat"] == heat.flatten(1).T.tolist()


def test_bert_has_no_surprise(bert):
    with serving(bert) as port:
        assert not json.loads(request(port, "GET", "/start")[2])["networks"][0]["autoregressive"]
        status, [found] = ask(port, "/0/score", tokens=first_picture(bert))
    assert status == 400 and "no surprise of each pixel" in found["error"]


def test_the_page_is_given_fitting_pictures(digits, photos, port):
    told = json.loads(request(port, "GET", "/start")[2])
    first, second = told["networks"]
    palette = digits.loaded.palette
    found = torch.tensor([picture["tokens"] for picture in first["pictures"]])
    assert torch.equal(found, palette.quantize(read_images("digits", 8, limit=10)[0]))
    assert first["colors"] == palette.rgb.tolist() and told["max_bytes"] == MAX_BYTES
    assert [picture["name"] for picture in second["pictures"]] == ["astronaut", "cat", "coffee", "rocket"]
    with Image.open(urlopen(second["pictures"][1]["whole"])) as whole:
        assert whole.size == (256, 170)
    status, [answer] = ask(port, "/2/score", tokens=[0] * 64)
    assert status == 400 and answer["error"] == "there is no network 2 of 2; load the page again"
    assert ask(port, "/1/score", tokens=second["pictures"][0]["tokens"])[1][0]["uniform"] == pytest.approx(np.log(512))


def upload(port, content):
    status, _, answer = request(port, "POST", "/0/image", content, content_type="application/octet-stream")
    return status, json.loads(answer)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_an_upload_is_read_as_files_are(digits, port, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned
    content = encoded(Image.effect_noise((40, 60), 90).convert("RGB"), "JPEG", exif=exif)
    (tmp_path / "photo.jpg").write_bytes(content)
    pixels = read_images(str(tmp_path / "photo.jpg"), 8)[0]
    status, answer = upload(port, content)
    assert status == 200 and answer["tokens"] == digits.loaded.palette.quantize(pixels)[0].tolist()
    with Image.open(urlopen(answer["whole"])) as whole:
        assert whole.size == (60, 40)


def test_pillows_warnings_stay_out_of_the_log(digits, recwarn):
    damaged = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"
    content = encoded(Image.new("RGB", (9, 9)), "JPEG", exif=damaged)
    decode(content)
    assert [str(warning.message)[:12] for warning in recwarn] == ["Corrupt EXIF"]
    recwarn.clear()
    digits.read(content)
    assert not len(recwarn)


def test_bad_uploads_are_told(port):
    for content, message in (
        (b"<html>404</html>", "the file is not an image of a known format"),
        (encoded(Image.effect_noise((30, 30), 90))[:-200], "cannot be decoded"),
    ):
        status, answer = upload(port, content)
        assert status == 400 and message in answer["error"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"Content-Length: {MAX_BYTES + 1}", ""], 413),
        (["Content-Length: 9", "Transfer-Encoding: chunked", "", "100000"], 411),
    ],
)
def test_too_much_is_refused_before_it_is_read(lines, status, port):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = ["POST /0/image HTTP/1.1", f"Host: 127.0.0.1:{port}", *lines, ""]
        connection.sendall("\r\n".join(head).encode())
        assert int(connection.recv(100).split()[1]) == status


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nX-", b"POST /0/score HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]
)
def test_requests_that_do_not_end_are_closed(sent, digits, monkeypatch):
    monkeypatch.setattr(demo, "PATIENCE", 1)
    with serving(digits) as port, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", port)
        open_ones = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(70)]
        for connection in open_ones:
            connection.sendall(sent)
        assert request(port, "GET", "/start")[0] == 200  # meanwhile
        for connection in open_ones:
            while connection.recv(1000):
                pass


WRONG = [
    ({"tokens": [0] * 63}, "63 pixels; this network reads 8 x 8 = 64"),
    ({"tokens": [16] * 64}, "this network has 16 colors"),
    ({"n_samples": 9}, "n_samples is 9"),
    ({"keep_rows": 8}, "keep_rows is 8; it must be from 0 to 7"),
    ({"keep_rows": None}, "give keep_rows, or a hole"),
    ({"keep_rows": None, "hole": []}, "a hole with at least one position"),
    ({"keep_rows": None, "hole": [64]}, "hole has positions from 64 to 64"),
    ({"keep_rows": None, "hole": [3], "top_k": 2}, "top_k and top_p are for"),
    ({"temperature": -1}, "temperature is -1"),
    ({"top_p": 0}, "top_p is 0"),
    ({"seed": -1}, "seed is -1"),
]


@pytest.mark.parametrize(("wrong", "told"), WRONG)
def test_wrong_asks_are_told(digits, wrong, told):
    lines, values = [], {"tokens": first_picture(digits), "keep_rows": 4} | wrong
    digits.draw(Ask(**values), lines.append, threading.Event())
    assert lines[0] == {"begun": True} and told in lines[-1]["error"] and len(lines) == 2


def test_foreign_names_and_origins_are_refused(port):
    own = f"127.0.0.1:{port}"
    assert request(port, "GET", "/", host=own)[0] == 200
    assert request(port, "GET", "/", host=f"localhost:{port}")[0] == 200
    status, headers, content = request(port, "GET", "/start", host=f"evil.example:{port}")
    assert status == 403 and "does not answer to the name" in json.loads(content)["error"]
    assert "access-control-allow-origin" not in headers
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{port}"):
        for path in ("/0/image", "/0/draw", "/0/score"):
            assert request(port, "POST", path, "{}", origin=origin)[0] == 403, (origin, path)
    assert request(port, "POST", "/0/score", "{}", origin=f"http://{own}", content_type="application/json")[0] == 422


@pytest.mark.parametrize(
    ("named", "host", "answers"),
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("LocalHost", "127.0.0.1", True),
        ("[::1]:8000", "127.0.0.1", True),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("[::1", "127.0.0.1", False),
        ("box.lan:8000", "Box.lan", True),
        ("evil.example", "0.0.0.0", False),
    ],
)
def test_which_names_are_answered(named, host, answers):
    assert refusal("GET", {"host": named}, host)[0] == (200 if answers else 403)


def test_the_page_is_one_file_that_fetches_nothing(port):
    status, headers, content = request(port, "GET", "/")
    page = content.decode()
    assert status == 200 and page == PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[\w-]+\.\w|<(link|script|img)[^>]+(href|src)=(?!\"data:,\")|@import|url\(", page)
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert request(port, "GET", "/docs")[0] == request(port, "GET", "/openapi.json")[0] == 404


def test_a_request_that_goes_away_ends_its_drawing(caplog):
    room = studio(image_size=48, n_layer=4)  # 48 rows, each of them longer than a closed connection stays unnoticed
    body = json.dumps({"tokens": first_picture(room), "keep_rows": 0, "n_samples": 8})
    with serving(room) as port, caplog.at_level(logging.INFO):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/0/draw", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert b"begun" in answer.readline()
        answer.close()
        connection.close()
        status, lines = ask(port, "/0/draw", tokens=first_picture(room), keep_rows=47, n_samples=1)
        assert status == 200 and "seconds" in lines[-1]
    assert "drawing ended: the browser has disconnected" in caplog.text


def test_one_drawing_at_a_time():
    room, now, most = studio(), [], []
    draw = room.draw

    def watched(*given):
        now.append(1)
        most.append(len(now))
        draw(*given)
        now.pop()

    room.draw = watched
    with serving(room) as port, ThreadPoolExecutor(4) as pool:
        asks = [pool.submit(ask, port, "/0/draw", tokens=first_picture(room), keep_rows=0) for _ in range(4)]
        lines = [job.result()[1][1:-1] for job in asks]
    assert most == [1, 1, 1, 1] and lines == [lines[0]] * 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pretrained", "nowhere.ckpt"], r"nowhere\.ckpt does not exist"),
        (["--port", "70000"], "port 70000"),
        (["--device", "moon"], "device 'moon'"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=told) as stop:
        main(["demo", "--port", "0", *words])
    assert "\n" not in stop.value.code and stop.value.code.startswith("lightning-igpt demo: ")


def test_a_port_in_use_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"cannot listen on 127\.0\.0\.1, port {port}: .*choose another --port"):
            main(["demo", "--port", str(port)])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--pretrained", "no/thing"])
    assert "\n" not in stop.value.code and 'pip install ".[demo]"' in stop.value.code


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped():
    words = [sys.executable, "-m", "lightning_igpt", "demo", "--port", "0", "--host", "0.0.0.0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = [process.stdout.readline() for _ in range(3)]
        named = ", ".join(f"{name}, the embedded network of {what}" for name, what in EMBEDDED.items())
        assert said[0] == f"{named}, on cpu\n"
        assert said[1].startswith("warning: everyone who can reach 0.0.0.0 can use the page")
        port = int(re.fullmatch(r"open http://0\.0\.0\.0:(\d+) \(Ctrl-C stops it\)\n", said[2])[1])
        tokens = json.loads(request(port, "GET", "/start")[2])["networks"][0]["pictures"][0]["tokens"]
        body = json.dumps({"tokens": tokens, "keep_rows": 0, "n_samples": 8})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/0/draw", body, {"content-type": "application/json"})
        assert b"begun" in connection.getresponse().readline()
        process.send_signal(signal.SIGINT)  # while it draws
        started = time.monotonic()
        _, complaints = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == 0 and complaints == "" and time.monotonic() - started < 60
