"""README, the pages of docs/ and the fenced blocks on them."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ("docs/reference/cli/", "docs/reference/recipes/")  # by the documentation's build, from the code itself
FENCE = re.compile(r"^( *)(`{3,}|~{3,}|:{3,}) *(\{[^}]*\}|[\w+-]*)(.*)$")


def read_pages():
    paths = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths if "_build" not in path.parts}
    return {name: path.read_text(encoding="utf-8") for name, path in names.items() if not name.startswith(GENERATED)}


PAGES = read_pages()


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line of text, the text, and what it is the output of."""

    page: str
    language: str
    line: int
    text: str
    above: int = 1_000_000  # lines between it and the block before

    @property
    def name(self):
        """The file that the block shows, if its first line is a comment of nothing but the name."""
        found = re.match(r"# ([\w./-]+\.(?:py|ya?ml|sh|toml))$", self.text.partition("\n")[0])
        return found and found[1]


def blocks(page, *languages, text=None):
    """The fenced blocks of a page in their order, those in directives and lists among them.

    Raises:
        AssertionError: A block does not name its language, or has no end.
    """
    found, around, last = [], [], -1_000_000
    lines = iter(enumerate((PAGES[page] if text is None else text).splitlines(), 1))
    for number, line in lines:
        opened = FENCE.match(line)
        if not opened:
            continue
        _, fence, language, rest = opened.groups()
        if not language and not rest.strip() and fence in around:
            del around[around.index(fence) :]
        elif language.startswith("{"):
            around.append(fence)
        else:
            assert language, f"{page}:{number}: a block without its language; output is ```text"
            inside = []
            for _, within in lines:
                if re.match(rf" *{fence}[`~:]* *$", within):
                    break
                inside.append(within)
            else:
                raise AssertionError(f"{page}:{number}: the block has no end")
            shown = textwrap.dedent("\n".join(inside) + "\n")
            found.append(Block(page, language, number + 1, shown, number - last - 1))
            last = number + len(inside) + 1
    return [block for block in found if not languages or block.language in languages]


def table(page, first_cell):
    """The cells of a page's table rows whose first cell matches."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGES[page].splitlines() if line[:1] == "|"
    ]
    return [row for row in rows if re.fullmatch(first_cell, row[0])]
