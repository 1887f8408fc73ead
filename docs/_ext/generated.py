"""Sphinx extension: writes the pages that are made from the code before the sources are read."""

from pathlib import Path

import cli_pages
import recipe_pages

MAKERS = {"reference/cli": cli_pages.pages, "reference/recipes": recipe_pages.pages}


def write(source):
    """Write all pages; those that are as they were keep their time, so that they are not read again."""
    for folder, make in MAKERS.items():
        place = Path(source, folder)
        place.mkdir(parents=True, exist_ok=True)
        made = {place / f"{name}.md": text for name, text in make().items()}
        for path in set(place.glob("*.md")) - set(made):
            path.unlink()
        for path, text in made.items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", lambda app: write(app.srcdir))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
