"""README, the pages of docs/ and the fenced blocks on them."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = re.compile(r"docs/(reference/(costs|help|recipes|api/.*)|notebooks/.+-.+)\.md")  # by the build
FENCE = re.compile(r"^( *)(`{3,})([^\n]*)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)


def read_pages():
    paths = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths if "_build" not in path.parts}
    return {name: path.read_text(encoding="utf-8") for name, path in names.items() if not GENERATED.fullmatch(name)}


PAGES = read_pages()


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language, the number of its first line, and its text."""

    page: str
    language: str
    line: int
    text: str

    @property
    def name(self):
        """The file that the block shows, if its first line is a comment with nothing but the name."""
        match = re.match(r"# ([\w./-]+\.(?:py|ya?ml))$", self.text.partition("\n")[0])
        return match and match[1]


def blocks(page):
    """The fenced blocks of a page in their order, without Sphinx's directives."""
    text = PAGES[page]
    for match in FENCE.finditer(text):
        if not match[3].startswith("{"):
            line = text.count("\n", 0, match.start()) + 2
            yield Block(page, match[3], line, textwrap.dedent(match[4]))


def table(page, first_cell):
    """The cells of a page's table rows whose first cell matches."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGES[page].splitlines() if line[:1] == "|"
    ]
    return [row for row in rows if re.fullmatch(first_cell, row[0])]
