"""Pages in a real browser: Chromium through Playwright, where both are there."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"phone": 390, "desktop": 1280}

# The lowest contrast (WCAG 2) of a text with what lies behind it, and that text.
CONTRAST = """
() => {
  const bytes = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => bytes(color).slice(0, 3).map(byte => byte / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (bytes(color)[3] !== 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  let least = [21, ''];
  for (const element of document.body.querySelectorAll('*')) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
    if (!text) continue;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, text];
  }
  return least;
}
"""
IMAGES = "() => [...document.images].map(one => [one.alt, one.complete && one.naturalWidth > 0, one.currentSrc])"
SIZES = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@contextmanager
def chromium():
    """A browser; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright to drive a browser")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def check_page(path):
    """A page of one file: it fits a phone, asks nobody, shows and names every picture, in light and in dark.

    Returns:
        The addresses of the pictures shown, by colour scheme.
    """
    shown = {}
    with chromium() as browser:
        for scheme in ("light", "dark"):
            for device, width in WIDTHS.items():
                page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                asked = []
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(path.resolve().as_uri())
                scroll, client = page.evaluate(SIZES)
                assert scroll <= client, f"{device}, {scheme}: {scroll} pixels in {client}"
                images = page.evaluate(IMAGES)
                assert images and all(alt and loaded for alt, loaded, _ in images), (device, scheme, images)
                contrast, text = page.evaluate(CONTRAST)
                assert contrast >= 4.5, f"{scheme}: {contrast:.2f} for {text!r}"
                assert [url for url in asked if not url.startswith("data:")] == [path.resolve().as_uri()]
                shown[scheme] = [source for _, _, source in images]
                page.close()
    return shown
