"""Sharded training (FSDP2) is training, and weights that are drawn late are those that were drawn early."""

import weakref

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_igpt.callbacks import CompileBlocks, CompletionGrid, FiniteGuard, OnlineProbe
from lightning_igpt.checkpointing import AtomicModelParallelStrategy
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.order import EvalOrder
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.modules.deferred import DeferredGPT, draw
from lightning_igpt.modules.sharding import check_mesh, shard
from lightning_igpt.sampling import complete, inpaint
from lightning_igpt.weights import load_pretrained, save_pretrained
from tests import fresh
from tests.modules.helpers import BERT, TINY, quiet_trainer
from tests.processes import Losses, Shared, batches, in_processes, whole
from tests.sharding import process_group  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
BIASED = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=8, image_size=4, bias=True)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # of weights, after steps of Adam at a rate of 0.01


def pretrain(**options):
    torch.manual_seed(0)
    return PretrainModule(TINY, "gray:8", lr=0.01, warmup_steps=1, **options)


def finetune(**options):
    torch.manual_seed(0)
    options = {"layer_decay": 0.8, "weight_decay": 0.1, "lr": 0.01} | options
    return FineTuneModule(None, 3, network=TINY, palette="gray:8", **options)


def classify(**options):
    return finetune(generative_weight=0, **options)


def trainer(folder, *, sharded=True, devices=1, precision="32-true", callbacks=(), **options):
    strategy = AtomicModelParallelStrategy(devices, 1) if sharded else "auto"
    return quiet_trainer(
        folder, strategy=strategy, devices=devices, precision=precision, callbacks=list(callbacks),
        use_distributed_sampler=False, **{"max_epochs": 1, "enable_checkpointing": False} | options,
    )  # fmt: skip


def train(module, folder, count=6, **options):
    """(losses, weights, metrics) of a fit."""
    losses = Losses()
    runner = trainer(folder, callbacks=[losses, *options.pop("callbacks", [])], **options)
    runner.fit(module, Shared(batches(module.config, count)))
    return losses.all, whole(module), runner.callback_metrics


def assert_same_run(mine, other):
    """The losses, weights and validations of two runs."""
    assert mine[0] == pytest.approx(other[0], rel=1e-5)
    assert mine[1].keys() == other[1].keys()
    for name, weight in mine[1].items():
        torch.testing.assert_close(weight, other[1][name], **CLOSE)
    metrics = [
        {name: float(value) for name, value in run[2].items() if name.startswith("val/")} for run in (mine, other)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "count": 10}
RUNS = [(pretrain, {}), (pretrain, ACCUMULATED), (finetune, {}), (classify, {})]


@pytest.mark.parametrize(("make", "options"), RUNS, ids=["pretrain", "accumulated", "finetune", "classify"])
def test_a_sharded_run_is_the_run(tmp_path, process_group, make, options):  # noqa: F811
    plain, sharded = make(), make()
    expected = train(plain, tmp_path, sharded=False, **options)
    found = train(sharded, tmp_path, **options)
    assert_same_run(expected, found)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert [is_sharded(block) for block in sharded.network.h] == [True, True]


def test_one_module_under_several_trainers(tmp_path, process_group):  # noqa: F811
    """As configure_model comes again and again; and evaluation leaves nothing that cannot be trained."""
    module, twin, data = pretrain(), pretrain(), Shared(batches(TINY, 3))
    for one, sharded in ((module, True), (twin, False)):
        trainer(tmp_path, sharded=sharded).validate(one, data, verbose=False)
        for _ in range(2):
            trainer(tmp_path, sharded=sharded).fit(one, data)
    assert_same_run(([], whole(twin), {}), ([], whole(module), {}))
    runner = trainer(tmp_path)
    runner.test(module, data, verbose=False)
    assert not runner.test_loop.inference_mode and not runner.fit_loop.epoch_loop.val_loop.inference_mode


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_probing(tmp_path, process_group, solver):  # noqa: F811
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        module = ProbeModule(None, "all", network=TINY, palette="gray:8", num_classes=3, solver=solver)
        runner = trainer(tmp_path, sharded=sharded)
        runner.fit(module, Shared(batches(TINY, 4)))
        runner.test(module, Shared(batches(TINY, 4)), verbose=False)
        found.append((module.weight.detach(), module.results))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1] == found[1][1]


def test_a_probe_goes_on_from_its_shards(tmp_path, process_group):  # noqa: F811
    """Lightning loads them before the module hears of the checkpoint."""
    data, made = Shared(batches(TINY, 4)), []
    for ckpt_path in (None, tmp_path / "x.ckpt"):
        torch.manual_seed(0)
        module = ProbeModule(None, "all", network=TINY, palette="gray:8", num_classes=3, solver="sgd")
        runner = trainer(tmp_path, max_epochs=None, max_steps=4)
        runner.fit(module, data, ckpt_path=ckpt_path)
        if ckpt_path is None:
            runner.save_checkpoint(tmp_path / "x.ckpt")
        made.append(module)
    assert made[0].weight.any() and torch.equal(made[0].weight, made[1].weight)
    assert runner.global_step == 4 and runner.optimizers[0].param_groups[0]["params"][0] is made[1].weight


class TestMethods:
    """What is called on a sharded network beside its forward."""

    @pytest.fixture
    def networks(self, tmp_path, process_group, request):  # noqa: F811
        config = getattr(request, "param", TINY)
        made = []
        for sharded in (False, True):
            torch.manual_seed(0)
            module = PretrainModule(config, "gray:8")
            torch.nn.init.normal_(module.network.lm_head.weight)
            trainer(tmp_path, sharded=sharded).validate(module, Shared(batches(config, 1)), verbose=False)
            made.append(module.network)
        return made

    def test_features(self, networks):
        plain, sharded = networks
        tokens = batches(TINY, 1)[0]["tokens"]
        for layers in ([0, 1, 2], [1], [2, 0], [0]):
            with torch.no_grad():
                torch.testing.assert_close(sharded.features(tokens, layers), plain.features(tokens, layers))
            assert all(isinstance(parameter, DTensor) for parameter in sharded.h.parameters())
        with pytest.raises(RuntimeError, match="come without gradients"):
            sharded.features(tokens, [1])

    def test_completions(self, networks):
        plain, sharded = networks
        prompt = batches(TINY, 1)[0]["tokens"][:2, :8]
        options = [{"generator": torch.manual_seed(3), "n_samples": 2} for _ in networks]
        found = complete(sharded, prompt, **options[0])
        options[1]["generator"].manual_seed(3)
        assert torch.equal(complete(plain, prompt, **options[1]), found)
        with pytest.raises(ValueError, match="needs whole weights"):
            complete(sharded, prompt, precision="int8")

    @pytest.mark.parametrize("networks", [BERT], indirect=True)
    def test_inpainting(self, networks):
        tokens = batches(BERT, 1)[0]["tokens"]
        known = torch.arange(16).expand_as(tokens) < 8
        found = [inpaint(one, tokens, known, generator=torch.Generator().manual_seed(3)) for one in networks]
        assert torch.equal(*found)


class Types(lightning.Callback):
    """Of what the network computes in training."""

    def on_train_start(self, trainer, pl_module):
        network, self.found = pl_module.network, {}

        def note(name):
            def hook(module, args):
                self.found[name] = (args[0].dtype, next(module.parameters()).dtype)

            return hook

        parts = {"embedding": network.wte, "block": network.h[1], "norm": network.ln_f, "head": pl_module.head}
        for name, part in parts.items():
            part.register_forward_pre_hook(note(name))  # after that which gathers


def test_in_bfloat16_the_residual_stream_is_float32(tmp_path, process_group):  # noqa: F811
    """And no further from the usual run in bfloat16 than rounding the norms' gains takes it."""
    types = Types()
    expected = train(finetune(), tmp_path, sharded=False, precision="bf16-mixed")
    module = finetune()
    found = train(module, tmp_path, precision="bf16-mixed", gradient_clip_val=1000.0, callbacks=[types])
    narrow, wide = torch.bfloat16, torch.float32
    assert types.found["embedding"] == (torch.int64, wide)
    assert types.found["block"] == (wide, narrow)
    assert types.found["norm"] == types.found["head"] == (wide, wide)
    assert found[0] == pytest.approx(expected[0], rel=2e-3)
    assert {parameter.dtype for parameter in module.parameters()} == {wide}
    tokens = batches(TINY, 1)[0]["tokens"]
    assert module.network(tokens).dtype == narrow  # outside of any trainer's autocast, too


def test_bfloat16_throughout(tmp_path, process_group):  # noqa: F811
    module = pretrain(defer_init=True)
    losses, _, _ = train(module, tmp_path, precision="bf16-true")
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_callbacks(tmp_path, process_group):  # noqa: F811
    guard, compiling = FiniteGuard(), CompileBlocks("auto")
    chosen = [CompletionGrid(2, 1), OnlineProbe(num_classes=3), guard, compiling]
    _, _, metrics = train(pretrain(), tmp_path, count=4, logger=True, callbacks=chosen)
    assert len(list(tmp_path.rglob("completions/*.png"))) == 1
    assert metrics["online_probe/layer_1/accuracy"] > 0
    assert not compiling.decision.compile and "shards the blocks" in compiling.decision.reason


RANK = 2  # the same in all tests: torch keeps what it has worked out for a mesh


@pytest.fixture
def four_processes():
    """Meshes of four processes, of which only one is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group("fake", rank=RANK, world_size=4, store=FakeStore())
    names = ("data_parallel", "tensor_parallel")
    yield lambda *shape: distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    distributed.destroy_process_group()


def test_tensor_parallelism_is_refused(four_processes):
    check_mesh(four_processes(4, 1))
    mesh = four_processes(2, 2)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2.*data_parallel_size=4, tensor_parallel_size=1"):
        check_mesh(mesh)


class Count(TorchDispatchMode):
    """The most bytes of real tensors made under it that were there at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(made):
            if isinstance(one, torch.Tensor) and type(one) is not DTensor and one.device.type == "cpu":
                self._add(one.untyped_storage())
        return made

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self.seen.discard(key)
        self.now -= size


class TestDeferred:
    @pytest.mark.parametrize("config", [TINY, BERT, BIASED], ids=["autoregressive", "bert", "biased"])
    def test_the_same_weights_and_random_numbers(self, config):
        torch.manual_seed(5)
        expected, after = ImageGPT(config), torch.rand(3)
        torch.manual_seed(5)
        deferred = DeferredGPT(config)
        assert {parameter.device.type for parameter in deferred.parameters()} == {"meta"}
        assert torch.equal(torch.rand(3), after)
        state = torch.get_rng_state()
        draw(deferred, deferred.take_fills(), "cpu")
        assert type(deferred) is ImageGPT and torch.equal(torch.get_rng_state(), state)
        assert_equal(deferred.state_dict(), expected.state_dict())
        assert all(parameter.requires_grad for parameter in deferred.parameters())

    def test_each_process_holds_its_part_and_one_weight(self, four_processes):
        config = ImageGPTConfig(n_layer=4, n_head=4, n_embd=64, vocab_size=16, image_size=8)
        torch.manual_seed(5)
        expected = ImageGPT(config)
        torch.manual_seed(5)
        sizes = [4 * parameter.numel() for parameter in expected.parameters()]
        with Count() as count:
            module = torch.nn.Module()
            module.network = DeferredGPT(config)
        assert count.most == max(sizes)
        shard(module, four_processes(4, 1)["data_parallel"])
        fills = module.network.fills
        with Count() as count:
            draw(module.network, fills, "cpu")
        mine = {name: parameter.to_local() for name, parameter in module.network.named_parameters()}
        held = 4 * sum(part.numel() for part in mine.values())
        assert held == sum(sizes) // 4
        assert held + max(sizes) < count.most <= held + 1.25 * max(sizes)  # the new part is still a copy
        for name, whole_weight in expected.named_parameters():
            part = whole_weight.chunk(4)[RANK]
            assert torch.equal(mine[name], part), name

    @pytest.mark.parametrize(("make", "sharded"), [(pretrain, True), (finetune, False)])
    def test_a_run_is_the_same(self, tmp_path, process_group, make, sharded):  # noqa: F811
        early = train(make(), tmp_path, sharded=sharded)
        late = train(make(defer_init=True), tmp_path, sharded=sharded)
        assert early[0] == late[0]
        assert_equal(early[1], late[1])

    def test_before_a_trainer_set_it_up(self):
        module = pretrain(defer_init=True)
        for use in (module.network, module.network.hidden, lambda tokens: module.network.features(tokens, [0])):
            with pytest.raises(RuntimeError, match="not drawn yet"):
                use(batches(TINY, 1)[0]["tokens"])
        module.configure_model()
        assert_equal(module.state_dict(), pretrain().state_dict())
        assert not module.network(batches(TINY, 1)[0]["tokens"]).any()  # the head starts at zero

    def test_weights_that_are_loaded_count(self, tmp_path):
        source = pretrain()
        torch.nn.init.normal_(source.network.lm_head.weight)
        module = pretrain(defer_init=True)
        module.load_state_dict(source.state_dict())
        assert_equal(module.state_dict(), source.state_dict())
        runner = trainer(tmp_path, sharded=False, max_epochs=0)
        runner.fit(source, Shared(batches(TINY, 1)))
        runner.save_checkpoint(tmp_path / "x.ckpt")
        loaded = PretrainModule.load_from_checkpoint(tmp_path / "x.ckpt", defer_init=True)
        assert_equal(loaded.state_dict(), source.state_dict())

    def test_pretrained_weights_are_no_matter_of_it(self, tmp_path):
        for made in (PretrainModule, FineTuneModule):
            with pytest.raises(ValueError, match="defer_init is for weights that are drawn"):
                made(pretrained=str(tmp_path), defer_init=True)

    @pytest.mark.parametrize("folders", [True, False])
    def test_checkpoints(self, tmp_path, process_group, caplog, folders):  # noqa: F811
        """Saved sharded, resumed and validated by a module whose weights are not drawn yet."""
        data, path = Shared(batches(TINY, 3)), tmp_path / "x.ckpt"
        first = pretrain(defer_init=True)
        runner = trainer(tmp_path, max_epochs=None, max_steps=3)
        runner.strategy._save_distributed_checkpoint = folders
        runner.fit(first, data)
        runner.save_checkpoint(path)
        assert path.is_dir() == folders
        found = []
        for module, ckpt_path in ((first, None), (pretrain(defer_init=True), path)):
            found += trainer(tmp_path).validate(module, data, ckpt_path=ckpt_path, verbose=False)
        assert found[0] == found[1] and "random weights" not in caplog.text
        again = pretrain(defer_init=True)
        resumed = trainer(tmp_path, max_epochs=None, max_steps=3)
        resumed.fit(again, data, ckpt_path=path)
        assert resumed.global_step == 3
        assert_equal(whole(again), whole(first))


def assert_equal(mine, other):
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


def two_processes(folder):
    """What the test below starts: references of one process first, then all checks in two."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "count": 10}
    cases = {"pretrain": (pretrain, options), "finetune": (finetune, {}), "classify": (classify, {})}
    expected = {name: train(make(), folder, sharded=False, **more) for name, (make, more) in cases.items()}
    probed, validated = probe(folder, 1), validate(folder, 1)

    def work(rank):
        for name, (make, more) in cases.items():
            assert_same_run(expected[name], train(make(defer_init=True), folder, devices=2, **more))
        assert probe(folder, 2) == probed
        assert validate(folder, 2) == pytest.approx(validated, rel=1e-6)
        initial_weights(folder)
        gathered(folder, expected["pretrain"][1], options)
        one_bad_gradient(folder, rank)
        pictures(folder)

    assert in_processes(work) == [0, 0]


def probe(folder, devices):
    torch.manual_seed(0)
    module = ProbeModule(None, "all", network=TINY, palette="gray:8", num_classes=3)
    trainer(folder, sharded=devices > 1, devices=devices).fit(module, Shared(batches(TINY, 12)))
    return module.results


class Pictures(lightning.LightningDataModule):
    """Thirteen, which two processes cannot share equally."""

    def val_dataloader(self):
        order = EvalOrder(13, batch_size=4, rank=self.trainer.global_rank, world_size=self.trainer.world_size)
        rows = batches(TINY, 1, size=13)[0]
        taken = [torch.tensor([row for row, _ in batch]) for batch in order]
        return DataLoader([{name: value[which] for name, value in rows.items()} for which in taken], batch_size=None)


def validate(folder, devices):
    """Each picture once, whatever the number of processes."""
    module = finetune()
    torch.nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(1))
    runner = trainer(folder, sharded=devices > 1, devices=devices)
    (found,) = runner.validate(module, Pictures(), verbose=False)
    return found


def initial_weights(folder):
    module = finetune(defer_init=True)
    trainer(folder, devices=2).validate(module, Shared(batches(TINY, 1)), verbose=False)
    assert module.head.weight.full_tensor().shape == (3, 16)
    assert_equal(whole(module), dict(finetune().named_parameters()))


def gathered(folder, weights, options):
    """One file, which one process opens."""
    module = pretrain()
    train(module, folder, devices=2, **options)
    module.trainer.strategy._save_distributed_checkpoint = False
    module.trainer.save_checkpoint(folder / "gathered.ckpt")
    loaded = load_pretrained(str(folder / "gathered.ckpt")).network
    for name, weight in loaded.named_parameters():
        torch.testing.assert_close(weight, weights[f"network.{name}"], **CLOSE)


class Spoil(lightning.Callback):
    """The gradient of one process's part of the fourth step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            next(pl_module.parameters()).grad.to_local().fill_(float("nan"))


def one_bad_gradient(folder, rank):
    """Both processes know of it, and stop."""
    with pytest.raises(ValueError, match=r"optimizer step 4 .*gradient norm nan") as caught:
        train(pretrain(), folder, devices=2, callbacks=[Spoil(), FiniteGuard()])
    assert f"process {rank} of 2" in str(caught.value)


def pictures(folder):
    """All processes draw, the first one writes."""
    callbacks = [CompletionGrid(2, 1), OnlineProbe(num_classes=3)]
    module = pretrain()
    *_, metrics = train(module, folder, devices=2, logger=True, precision="bf16-mixed", callbacks=callbacks)
    assert metrics["online_probe/layer_1/accuracy"] > 0
    drawn = module.trainer.predict(pretrain(), Shared(batches(TINY, 1)))
    assert drawn[0].shape == (4, 3, 4, 4)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Losses of each step to 1e-5, final weights to 1e-4, and all that must happen on both."""
    fresh.finished(two_processes, tmp_path, folder=tmp_path)
    assert len(list(tmp_path.rglob("completions/*.png"))) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("make", [pretrain, finetune])
def test_on_a_gpu(tmp_path, make):
    options = {"precision": "bf16-mixed", "accelerator": "gpu", "gradient_clip_val": 1000.0}
    expected = train(make(), tmp_path, sharded=False, **options)
    module = make(defer_init=True)
    callbacks = [CompletionGrid(2, 1), OnlineProbe(num_classes=3), FiniteGuard()]
    found = train(module, tmp_path, callbacks=callbacks, logger=True, **options)
    assert found[0] == pytest.approx(expected[0], rel=5e-3)
    assert {parameter.device.type for parameter in module.parameters()} == {"cuda"}
    assert len(list(tmp_path.rglob("completions/*.png"))) == 1


def test_averaged_weights_are_refused(tmp_path, process_group):  # noqa: F811
    runner = trainer(tmp_path, callbacks=[EMAWeightAveraging()])
    with pytest.raises(ValueError, match="cannot be averaged while they are sharded"):
        runner.fit(PretrainModule(TINY, "gray:8"), Shared(batches(TINY, 4)))


def test_a_sharded_network_is_not_saved_by_one_process(tmp_path, process_group):  # noqa: F811
    module = PretrainModule(TINY, "gray:8")
    trainer(tmp_path).fit(module, Shared(batches(TINY, 4)))
    with pytest.raises(ValueError, match="this network is sharded, so that no process holds it"):
        save_pretrained(tmp_path / "saved", module.network, module.palette)


def test_weights_are_not_loaded_into_a_network_that_waits():
    module = PretrainModule(TINY, "gray:8", defer_init=True)
    with pytest.raises(RuntimeError, match="weights are not drawn yet"):
        module.network.load_state_dict(PretrainModule(TINY, "gray:8").network.state_dict())
