import lightning
import pytest
import torch

from lightning_igpt.callbacks import CompileBlocks, OnlineProbe, Recompute
from lightning_igpt.callbacks.recompute import Decided, decide
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.model import ATTENTION_KERNELS
from lightning_igpt.modules import PretrainModule
from lightning_igpt.planning import training_bytes
from tests.memory_meter import MemoryMeter
from tests.modules.helpers import BERT, TINY, loader, quiet_trainer

GIB = 2**30


class Look(lightning.pytorch.Callback):
    """What is set while training and while validating."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen |= {block.recompute for block in pl_module.network.blocks()}
        trainer.save_checkpoint(trainer.default_root_dir + "/part.ckpt")


def pretrain(folder, *callbacks, config=TINY, set_by_hand="none", **options):
    """The module after a short run, the same for the same arguments."""
    torch.manual_seed(0)
    module = PretrainModule(config, "gray:8", lr=0.01, warmup_steps=0)
    for block in module.network.blocks():
        block.recompute = set_by_hand
    options = {"max_epochs": 1, "enable_checkpointing": False} | options
    quiet_trainer(folder, callbacks=list(callbacks), **options).fit(module, loader(24), loader(12))
    return module


def same_weights(one, other):
    return all(map(torch.equal, one.network.state_dict().values(), other.network.state_dict().values()))


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("config", [TINY, BERT, {**TINY.to_dict(), "dropout": 0.2}], ids=["gpt", "bert", "dropout"])
def test_a_run_ends_with_the_same_weights_and_leaves_nothing_behind(tmp_path, config, how):
    look, callback = Look(), Recompute(how)
    module = pretrain(tmp_path, callback, OnlineProbe(num_classes=3), look, config=config)
    assert look.seen == {how} and {block.recompute for block in module.network.blocks()} == {"none"}
    assert callback.decision == Decided(how, "as set")
    assert same_weights(module, pretrain(tmp_path, OnlineProbe(num_classes=3), config=config))
    assert "recompute" not in str(torch.load(tmp_path / "part.ckpt", weights_only=True).keys())
    resumed = PretrainModule(config, "gray:8", lr=0.01, warmup_steps=0)
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(resumed, loader(24), loader(12), ckpt_path=tmp_path / "part.ckpt")
    assert same_weights(module, resumed)


def test_auto_on_a_cpu_leaves_all_as_it_is(tmp_path):
    for by_hand, reason in (("none", ""), ("full", "as the network is set")):
        callback, look = Recompute(), Look()
        module = pretrain(tmp_path, callback, look, set_by_hand=by_hand)
        assert callback.decision == Decided(by_hand, reason)
        assert look.seen == {block.recompute for block in module.network.blocks()} == {by_hand}


def test_auto_takes_the_least_that_fits():
    config = ImageGPTConfig(24, 8, 512, 512, 64)

    def needed(how, batch_size=32, **options):
        return sum(training_bytes(config, batch_size, recompute=how, **options).values())

    for options in ({}, {"compiled": True}, {"precision": "32-true"}, {"devices": 8, "sharded": True}):
        for how in ("none", "selective", "full"):
            assert decide(config, 32, needed(how, **options), **options).how == how
        nothing = decide(config, 32, needed("full", **options) - 1, **options)
        assert nothing.how == "full" and "which does not fit; a micro-batch of 31 would" in nothing.reason
    assert "not even one image does" in decide(PRESETS["igpt_xl"], 1, 74 * GIB).reason


class Full(PretrainModule):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("size", "parts", "cure"),
    [
        (64, 1, "64 images at once; set accumulate_grad_batches=2 (32 at once, same batch_size, same training)"),
        (15, 2, "15 images at once; set accumulate_grad_batches=3 (10 at once, same batch_size, same training)"),
        (1, 4, "one image at once; set recompute=full, strategy=fsdp2, or take a smaller network"),
        (None, 1, "8 images at once; set accumulate_grad_batches=2 (4 at once, with batch_size=4 for the loader,"),
    ],
)
def test_out_of_memory_names_the_next_smaller_micro_batch(tmp_path, caplog, size, parts, cure):
    data = {"train_dataloaders": loader()}
    if size:
        data = {"datamodule": PretrainDataModule("digits", batch_size=size * parts, image_size=4)}
    trainer = quiet_trainer(tmp_path, max_steps=1, accumulate_grad_batches=parts, callbacks=[Recompute()])
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(Full(TINY, "gray:8"), **data)
    assert f"out of memory with {cure}" in caplog.messages[-1]


DEEP = ImageGPTConfig(n_layer=4, n_head=2, n_embd=64, vocab_size=8, image_size=4)


class Measure(lightning.pytorch.Callback):
    """In the second batch: bytes alive between forward and backward, attention's kernels in the latter."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.meter = Counting(ignored=[*pl_module.parameters(), *pl_module.buffers()])
            self.meter.__enter__()

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 1:
            self.kept, self.meter.kernels = self.meter.live, 0

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            self.meter.__exit__(None, None, None)
            self.kernels = self.meter.kernels


class Counting(MemoryMeter):
    kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernels += func in ATTENTION_KERNELS
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize(("how", "again"), [("selective", 0), pytest.param("full", 4, marks=pytest.mark.slow)])
def test_compiled_blocks_compute_again_too(tmp_path, how, again):
    """aot_eager parts forward from backward as inductor does, without its kernels."""
    torch._dynamo.reset()
    measures = [Measure() for _ in range(3)]
    plain = pretrain(tmp_path, measures[0], config=DEEP)
    eager = pretrain(tmp_path, Recompute(how), measures[1], config=DEEP)
    compiled = pretrain(tmp_path, CompileBlocks(True, backend="aot_eager"), Recompute(how), measures[2], config=DEEP)
    assert same_weights(eager, plain)
    others = dict(plain.named_parameters())  # eager norms round otherwise
    torch.testing.assert_close(dict(compiled.named_parameters()), others, rtol=1e-2, atol=1e-4)
    assert [measure.kernels for measure in measures] == [0, again, again]
    kept = [measure.kept for measure in measures]
    assert kept[2] == pytest.approx(kept[1], rel=0.02) and kept[1] < kept[0] / 4
