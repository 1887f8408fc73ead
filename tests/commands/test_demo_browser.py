"""The demo's page in a real browser, by mouse and by keyboard, on a phone and on a desk, in light and in dark."""

import math
import re
import threading

import pytest
import torch
from PIL import Image

from lightning_igpt.commands.demo_studio import Studio
from lightning_igpt.commands.images import read_images
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import complete, inpaint, score
from lightning_igpt.weights import ModelCard, Pretrained
from tests.browser import CONTRAST, SIZES, WIDTHS, chromium
from tests.demo_server import serving
from tests.networks import random_network

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
BERT = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=512, image_size=8, objective="bert")
PIXELS = "one => [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]"
DROP = """
([bytes, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  for (const kind of ["dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}
"""
FOCUS = """
() => {
  const { id, name, value, tagName, dataset } = document.activeElement;
  const style = getComputedStyle(document.activeElement);
  const visible = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  return [tagName === "BODY" ? "" : id || dataset.name || `${name}=${value}`, visible];
}
"""


class Gated(Studio):
    """Stops after each row until it is let on."""

    def __init__(self, *given):
        super().__init__(*given)
        self.gate = threading.Semaphore(1_000_000)

    def draw(self, ask, emit, gone):
        def emit_and_wait(line):
            emit(line)
            if "positions" in line:
                self.gate.acquire(timeout=120)

        super().draw(ask, emit_and_wait, gone)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def digits():
    network = random_network(ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=16, image_size=8))
    return Gated(Pretrained(network, Palette.load("gray:16"), "random", card=ModelCard(data="digits")), CPU)


@pytest.fixture(scope="module")
def address(digits, bert):
    with serving(digits, bert) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def bert():
    return Studio(Pretrained(random_network(BERT), Palette.load("openai"), "random"), CPU)


@pytest.fixture(scope="module")
def bert_address(bert):
    with serving(bert) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def visit(browser):
    """Opens a page that must neither complain nor ask other servers."""
    pages, complaints, asked = [], [], []

    def open_page(address, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        pages.append((page, address))
        page.goto(address)
        page.locator("#complete:enabled").wait_for()
        return page

    yield open_page
    for page, address in pages:
        assert {url for url in asked if not url.startswith("data:")} <= {
            address + path
            for path in ("", "start", *(f"{n}/{verb}" for n in "01" for verb in ("draw", "score", "image")))
        }
        page.close()
    assert [text for text in complaints if "400 (Bad Request)" not in text] == []


def until(page, text):
    page.locator("#state", has_text=re.compile(text)).wait_for(timeout=120_000)


def colors(canvas):
    """uint8 (3, 8, 8), and which pixels are there at all, bool (64,)."""
    pixels = torch.tensor(canvas.evaluate(PIXELS), dtype=torch.uint8).view(64, 4)
    return pixels[:, :3].T.reshape(3, 8, 8), pixels[:, 3] > 0


def samples(page):
    return torch.stack([colors(canvas)[0] for canvas in page.locator("#samples canvas").all()])


def marked(page):
    """Positions that the mask on the picture covers."""
    return colors(page.locator("#hole"))[1].nonzero().flatten().tolist()


def names(page):
    """Role and accessible name of every control and picture, as a screen reader gets them."""
    return set(re.findall(r"- '?(\w+)(?: \"([^\"]+)\")?", page.locator("body").aria_snapshot()))


def first(room):
    return torch.tensor([room.start()["pictures"][0]["tokens"]])


def test_one_press_completes_and_a_seed_repeats(visit, address, digits):
    page = visit(address)
    page.get_by_role("button", name="Complete").click()
    until(page, r"Done in [\d.]+ s, seed 0\.")
    prompt, generator = first(digits)[:, :48], torch.Generator().manual_seed(0)
    drawn = complete(digits.network, prompt, n_samples=4, temperature=0.8, generator=generator)[0]
    expected = digits.loaded.palette.dequantize(drawn)
    assert torch.equal(samples(page), expected)
    page.get_by_role("button", name="Another seed").click()
    until(page, "seed 1")
    assert page.get_by_label("Seed").first.input_value() == "1" and not torch.equal(samples(page), expected)
    page.get_by_label("Seed").first.fill("0")
    page.keyboard.press("Enter")
    until(page, "seed 0")
    assert torch.equal(samples(page), expected)


def test_rows_appear_one_by_one_and_stop_stops(visit, address, digits):
    page = visit(address)
    digits.gate = threading.Semaphore(0)
    try:
        page.get_by_role("button", name="Complete").click()
        for row, done in ((7, 0.5),):
            bar = page.get_by_role("progressbar", name="Drawn so far")
            page.wait_for_timeout(50)
            for _ in range(600):
                if bar.evaluate("one => one.value") == done:
                    break
                page.wait_for_timeout(50)
            there = colors(page.locator("#samples canvas").first)[1]
            assert there.tolist() == [True] * 8 * row + [False] * 8 * (8 - row)
            digits.gate.release()
        page.get_by_role("button", name="Stop").click()
        until(page, "Stopped")
        assert page.locator("#stop:disabled").count() == 1
    finally:
        digits.gate.release(1_000_000)


def test_the_line_is_a_slider_for_mouse_and_keyboard(visit, address, digits):
    page = visit(address)
    line = page.get_by_role("slider")
    line.focus()
    steps = [("ArrowUp", 3), ("ArrowRight", 4), ("ArrowDown", 3), ("ArrowLeft", 2), ("PageUp", 4), ("PageDown", 2)]
    for key, drawn in [*steps, ("Home", 1), ("ArrowDown", 1), ("End", 8), ("ArrowUp", 8)]:
        page.keyboard.press(key)
        values = [line.get_attribute(f"aria-value{name}") for name in ("min", "now", "max", "text")]
        assert values == ["1", str(drawn), "8", f"{8 - drawn} of 8 rows are given, {drawn} are drawn"], key
        assert marked(page) == list(range(8 * (8 - drawn), 64))
    box = page.locator("#board").bounding_box()
    x, at = box["x"] + box["width"] / 3, lambda rows: box["y"] + box["height"] * rows / 8
    page.mouse.move(x, at(1))
    page.mouse.down()
    page.mouse.move(x, at(6.6), steps=4)
    page.mouse.up()
    page.mouse.move(x, at(2))
    assert line.get_attribute("aria-valuenow") == "1" and marked(page) == list(range(56, 64))
    page.get_by_role("button", name="Complete").click()
    until(page, "Done")
    options = {"n_samples": 4, "temperature": 0.8, "generator": torch.manual_seed(0)}
    expected = complete(digits.network, first(digits)[:, :56], **options)[0]
    assert torch.equal(samples(page), digits.loaded.palette.dequantize(expected))


def test_a_mask_is_painted_by_mouse_and_keyboard(visit, bert_address, bert):
    page = visit(bert_address)
    assert page.get_by_label("what I paint over").is_checked()
    assert len(marked(page)) == 16, "a hole to begin with"
    page.get_by_role("button", name="Clear the mask").click()
    assert marked(page) == [] and page.locator("#complete:disabled").count() == 1
    box = page.locator("#board").bounding_box()

    def point(row, column):
        return box["x"] + box["width"] * (column + 0.5) / 8, box["y"] + box["height"] * (row + 0.5) / 8

    page.mouse.move(*point(1, 1))
    page.mouse.down()
    page.mouse.move(*point(1, 4), steps=8)
    page.mouse.up()
    assert marked(page) == [9, 10, 11, 12]
    page.mouse.click(*point(1, 4))
    assert marked(page) == [9, 10, 11], "a marked one is unmarked"
    page.get_by_role("application", name="Mask").focus()
    for key in ("ArrowDown", "ArrowDown", "Space", "ArrowRight", "Space", "Space", "Shift+ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert marked(page) == [9, 10, 11, 28, 29, 30]
    assert "The cell is at row 4, column 6, marked" in page.inner_text("#extent")
    page.get_by_label("Brush").select_option("2")
    page.get_by_role("application", name="Mask").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "Space"):
        page.keyboard.press(key)
    hole = [9, 10, 11, 28, 29, 30, 53, 54, 61, 62]
    assert marked(page) == hole
    page.get_by_role("button", name="Complete").click()
    until(page, "Done")
    known = torch.ones(4, 64, dtype=torch.bool)
    known[:, hole] = False
    options = {"temperature": 0.8, "generator": torch.manual_seed(0)}
    expected = inpaint(bert.network, first(bert).expand(4, -1), known, **options)
    assert torch.equal(samples(page), bert.loaded.palette.dequantize(expected))
    assert "no map of its surprise" in page.inner_text("#surprise-help") and not page.locator("#score").is_visible()


def test_surprise_is_shown_with_its_numbers(visit, address, digits):
    page = visit(address)
    page.get_by_role("button", name="Surprise map").click()
    page.locator("#surprise").wait_for()
    nats = score(digits.network, first(digits))[0]
    mean = nats.mean().item()
    assert page.inner_text("#mean") == f"{mean:.3f} nats per pixel ({mean / math.log(2):.3f} bits)"
    row, column = divmod(int(nats.argmax()), 8)
    assert page.inner_text("#most") == f"{nats.max():.3f} nats at row {row + 1}, column {column + 1}"
    assert page.inner_text("#uniform").startswith("2.773 nats per pixel")
    assert colors(page.locator("#heat"))[0].unique(dim=2).numel() > 3
    page.locator("#heat").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert page.inner_text("#at") == f"{nats[10]:.3f} nats at row 2, column 3"
    page.get_by_role("button", name="digits, test image 3").click()
    assert not page.locator("#surprise").is_visible(), "it was of another picture"


def test_pictures_are_chosen_dropped_and_refused(visit, address, digits, tmp_path):
    page = visit(address)
    for name in ("one.png", "two.png"):
        Image.effect_noise((50, 40), 100).convert("RGB").save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"<html>404</html>")

    def quantized(name):
        palette = digits.loaded.palette
        return palette.dequantize(palette.quantize(read_images(str(tmp_path / name), 8)[0]))[0]

    page.get_by_label("Or your own").set_input_files(tmp_path / "one.png")
    page.get_by_role("img", name="one.png, as the network sees it").wait_for()
    assert torch.equal(colors(page.locator("#given"))[0], quantized("one.png"))
    page.evaluate(DROP, [list((tmp_path / "two.png").read_bytes()), "two.png"])
    page.get_by_role("img", name="two.png, as the network sees it").wait_for()
    assert torch.equal(colors(page.locator("#given"))[0], quantized("two.png"))
    page.evaluate(DROP, [list((tmp_path / "broken.png").read_bytes()), "broken.png"])
    page.get_by_role("alert").filter(has_text="broken.png: the file is not an image of a known format").wait_for()
    assert torch.equal(colors(page.locator("#given"))[0], quantized("two.png")), "the picture stays"
    page.evaluate("() => { limit = 10; }")
    page.evaluate(DROP, [list((tmp_path / "one.png").read_bytes()), "one.png"])
    page.get_by_role("alert").filter(has_text="more than the limit of 10; shrink it first").wait_for()


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visit, address):
    page, seen = visit(address), {}
    page.get_by_role("button", name="Surprise map").click()
    page.locator("#surprise").wait_for()
    page.evaluate("() => document.activeElement.blur()")
    for _ in range(60):
        page.keyboard.press("Tab")
        name, visible = page.evaluate(FOCUS)
        if name in seen:
            break
        if name:
            seen[name] = visible
    assert seen.keys() >= {"chooser", "file", "mode=line", "cut", "complete", "another", "score"}
    assert seen.keys() >= {"n_samples", "temperature", "top_k", "top_p", "seed", "heat"}
    assert all(seen.values()), [name for name, visible in seen.items() if not visible]
    page.locator("input[value=line]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS) == ["paint", True]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUS) == ["clear", True]
    page.keyboard.press("Space")
    assert marked(page) == []


def test_networks_are_chosen_and_keep_the_users_picture(visit, address, digits, bert, tmp_path):
    page = visit(address)
    Image.effect_noise((50, 40), 100).convert("RGB").save(tmp_path / "one.png")
    page.get_by_label("Or your own").set_input_files(tmp_path / "one.png")
    whole = page.get_by_role("img", name="one.png, the whole image")
    whole.wait_for()
    assert whole.evaluate("one => [one.naturalWidth, one.naturalHeight]") == [50, 40]
    for number, room in enumerate((digits, bert)):
        page.get_by_role("combobox", name="Network").select_option(index=number)
        page.get_by_role("img", name="one.png, as the network sees it").wait_for()
        page.wait_for_function("() => document.querySelectorAll('#pictures [aria-pressed=true]').length === 0")
        palette = room.loaded.palette
        seen = palette.dequantize(palette.quantize(read_images(str(tmp_path / "one.png"), 8)[0]))[0]
        assert torch.equal(colors(page.locator("#given"))[0], seen) and torch.equal(
            colors(page.locator("#truth"))[0], seen
        )
    assert page.get_by_label("what I paint over").is_checked()


def test_controls_and_pictures_have_names(visit, address):
    page = visit(address)
    page.get_by_role("button", name="Complete").click()
    until(page, "Done")
    expected = {("button", f"digits, test image {number}") for number in range(1, 11)}
    expected |= {("button", name) for name in ("Complete", "Another seed", "Stop", "Surprise map")}
    expected |= {("spinbutton", name) for name in ("Samples", "Temperature", "Top-k", "Top-p", "Seed")}
    expected |= {("img", name) for name in ("Ground truth", *(f"Sample {number}" for number in range(1, 5)))}
    expected |= {("combobox", "Network")}
    expected |= {("radio", name) for name in ("all below a line", "what I paint over")}
    expected |= {("slider", "Line: rows below it are drawn"), ("status", "")}
    roles = {role for role, _ in expected}
    assert expected <= names(page)
    assert {role for role, name in names(page) if not name} & roles <= {"status"}, "a control without a name"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_it_fits_and_can_be_read(visit, address, device, scheme):
    page = visit(address, WIDTHS[device], scheme)
    page.get_by_role("button", name="Complete").click()
    until(page, "Done")
    page.get_by_role("button", name="Surprise map").click()
    page.locator("#surprise").wait_for()
    page.evaluate("() => tell('x'.repeat(300))")
    scroll, client = page.evaluate(SIZES)
    assert scroll <= client
    least, text = page.evaluate(CONTRAST)
    assert least >= 4.5, f"{least:.2f} for {text!r}"
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 600) is (scheme == "light")
    for name in ("cut", "complete", "another"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["height"] >= 40 and box["x"] >= 0 and box["x"] + box["width"] <= WIDTHS[device], name
