"""``lightning-igpt report``: any runs on one self-contained page."""

from pathlib import Path

from lightning_igpt import report as page
from lightning_igpt.commands.arguments import check_file


def report(runs: list[str], out: str = "report.html") -> None:
    """Gather runs on one HTML page: numbers, curves, layers, completions, confusion, settings.

    Args:
        runs: One or more folders that are runs, or have runs anywhere below them.
        out: The page to write, one self-contained file. Missing folders are made.
    """
    check_file(out, "--out", "report.html")
    unique = {run.folder.resolve(): run for folder in runs for run in page.read_runs(Path(folder))}
    page.write_runs(Path(out), list(unique.values()))
    print(f"wrote {out}: {len(unique)} run{'s' * (len(unique) > 1)}; open {Path(out).resolve().as_uri()}")
