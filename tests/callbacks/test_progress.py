"""One line in a terminal, also after a resumption; a line per validation elsewhere; messages on lines of their own."""

import io
import logging
import re
import sys

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_igpt.callbacks import Progress, progress
from lightning_igpt.modules import PretrainModule
from lightning_igpt.trainer import make_trainer
from tests.modules.helpers import TINY, loader, probe

LINE = r"step (\d+)/(\d+) · \d+\.\d (it/s|s/it)( · loss \d\.\d\d)?( · val \d\.\d\d)?( · \d+:\d\d left)?"


class Terminal(io.StringIO):
    """Keeps what a terminal of endless height shows, line by line, and all versions of each line."""

    def isatty(self):
        return True

    def lines(self):
        return [[part.rstrip() for part in line.split("\r") if part.strip()] for line in self.getvalue().split("\n")]


class Says(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            logging.getLogger("lightning.pytorch").warning("a log record")
            print("a warning", file=sys.stderr)


def fit(folder, module=None, ckpt_path=None, **options):
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    options = {"max_steps": 8, "val_check_interval": 4, "logger": False, "callbacks": [Says(), saver]} | options
    trainer = make_trainer(accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **options)
    trainer.fit(module or PretrainModule(TINY, "gray:8"), loader(64), loader(8), ckpt_path=ckpt_path)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_shows_one_line_that_fits_and_continues_after_a_resumption(columns, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setenv("COLUMNS", str(columns))
    for resumed in (None, tmp_path / "step=4.ckpt"):
        terminal = Terminal()
        handler = logging.StreamHandler(terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
        fit(tmp_path, ckpt_path=resumed)
        assert sys.stderr is terminal and handler.stream is terminal
        *above, last, end = terminal.lines()
        parts = [part for line in [*above, last] for part in line if part.startswith("step ")]
        assert not end and max(map(len, parts)) < columns
        shown = [re.fullmatch(LINE, part) for part in parts]
        steps = [(int(match[1]), int(match[2])) for match in shown if match]
        assert {total for _, total in steps} == {8} and steps == sorted(steps)
        assert (steps[0][0], steps[-1][0]) == (5 if resumed else 1, 8) and shown[-1][4] and shown[-1][5]
        texts = [line[-1] for line in above if line]
        assert not any(text.startswith("step") for text in texts)
        assert resumed or {"a log record", "a warning"} <= {*texts}


def test_without_a_terminal_a_line_is_printed_after_each_validation(tmp_path, capsys):
    fit(tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [re.fullmatch(LINE, line)[1] for line in lines] == ["4", "8"]
    fit(tmp_path, limit_val_batches=0, max_steps=20)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [re.fullmatch(LINE, line)[1] for line in lines] == [str(step) for step in range(2, 21, 2)]
    fit(tmp_path, probe(), max_steps=-1, max_epochs=1, val_check_interval=None)
    assert "batch 8/8 · " in capsys.readouterr().err
    fit(tmp_path, enable_progress_bar=False)
    assert "step " not in capsys.readouterr().err


def test_a_users_bar_replaces_ours(tmp_path):
    class Mine(Progress): ...

    trainer = make_trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, callbacks=[bar := Mine()])
    assert trainer.progress_bar_callback is bar
