"""Where a module's weights came from: kept in its checkpoints and in what is made of them."""

import torch

from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP
from tests.modules.helpers import TINY, loader, quiet_trainer


def trained(folder, module, **options):
    """The checkpoint that a step more leaves."""
    trainer = quiet_trainer(
        folder, max_steps=options.pop("max_steps", 1), limit_val_batches=0, enable_checkpointing=False
    )
    trainer.fit(module, loader(), **options)
    path = folder / "x.ckpt"
    trainer.save_checkpoint(path)
    return path


def stamped(path):
    return torch.load(path, weights_only=True)[STAMP]["origin"]


def test_the_chain_is_kept_without_folders(tmp_path):
    module = PretrainModule(TINY, "gray:8")
    assert module.origin is module.origin_path is None
    first = trained(tmp_path / "first", module)
    assert stamped(first) is None and load_pretrained(first).card.origin is None
    second = trained(tmp_path / "second", PretrainModule(pretrained=str(first)))
    assert stamped(second) == "x.ckpt (1 step)"
    tuned = FineTuneModule(str(tmp_path / "second"), 3)
    assert tuned.origin == "x.ckpt (1 step), trained from x.ckpt (1 step)" and tuned.origin_path == second
    third = trained(tmp_path / "third", tuned)
    assert stamped(third) == tuned.origin and str(tmp_path) not in repr(torch.load(third, weights_only=True)[STAMP])


def test_a_resumed_run_keeps_the_origin_that_it_is_not_told(tmp_path):
    first = trained(tmp_path / "first", PretrainModule(TINY, "gray:8"))
    second = trained(tmp_path / "second", PretrainModule(pretrained=str(first)))
    again = trained(tmp_path / "third", PretrainModule(TINY, "gray:8"), max_steps=2, ckpt_path=second)
    assert stamped(again) == "x.ckpt (1 step)"
    assert PretrainModule.load_from_checkpoint(again).origin == "x.ckpt (1 step)"
