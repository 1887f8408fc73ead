"""What to say of a name that does not exist: one wording for verbs, recipes, presets, classes, options and devices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` is most like, whatever its case and its dashes; None where none is alike."""
    plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(word), plain, n=1)
    return plain[found[0]] if found else None


def there_is_no(kind: str, word: str, known: Iterable[str], rest: str = "") -> str:
    """A message such as ``there is no recipe 'x'; did you mean 'y'? See lightning-igpt recipes list``.

    Args:
        kind: What it would be.
        word: What was given.
        known: What there is.
        rest: A sentence that says where the names can be seen, or all of them.
    """
    meant = closest(word, known)
    hint = f"; did you mean {meant!r}?" if meant else "." if rest else ""
    return f"there is no {kind} {word!r}{hint} {rest}".rstrip()


def _plain(word: str) -> str:
    return word.lower().strip("-").replace("-", "_")
