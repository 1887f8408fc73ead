"""Golden runs: what training, sampling and conversion compute at fixed seeds, in float32 on one CPU thread.

``python -m tests.golden_runs --write FILE`` before a change and ``--compare FILE`` after it, on the same machine, show
whether every number stayed the same, to the bit. tests/test_golden_runs.py compares with tests/golden/runs.json.
"""

import argparse
import hashlib
import json
import logging
import math
import sys
import tempfile
import time
import types
from collections import defaultdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from safetensors.torch import load_file

import lightning_igpt as igpt
from lightning_igpt import decoding
from tests.networks import random_network

GOLDEN = Path(__file__).parent / "golden"
STEPS, INTERRUPTED_AT = 30, 17
TRAINED, EVALUATED = ("network.", "head.", "weight", "bias"), ("val/", "probe/")
NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 16, "image_size": 8}
DATA = {"source": "digits", "train_split": "train[:360]", "seed": 5}  # 324 to train on: 10 batches of 32 per pass
WIDE = igpt.ImageGPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=32, image_size=8)
WIDE_BERT = igpt.ImageGPTConfig(**WIDE.to_dict() | {"objective": "bert"})
TOKENS = torch.randint(32, (8, 64), generator=torch.Generator().manual_seed(1))
EXACT = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "compile": False, "recompute": "none"}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def describe(tensors):
    """Hash of a tensor or of tensors by name; their norm, and a sum that depends on the order of the values."""
    named = tensors if isinstance(tensors, dict) else {"": tensors}
    arrays = [(name, np.ascontiguousarray(value.detach().numpy())) for name, value in sorted(named.items())]
    parts = [f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes() for name, array in arrays]
    values = np.concatenate([array.astype(np.float64).ravel() for _, array in arrays])
    ordered = values * np.cos(np.arange(len(values)))
    exact = {"norm": math.sqrt(math.fsum(values**2)), "sum": math.fsum(ordered)}  # BLAS rounds by its number of threads
    return {"sha256": hashlib.sha256(b"".join(parts)).hexdigest(), **exact}


def random_numbers(_):
    """Draws as dropout and the sampler make them, which depend on torch's build and on the processor."""
    generator, numbers = torch.Generator().manual_seed(0), torch.empty(1000)
    return [describe(numbers.bernoulli_(0.9, generator=generator)), describe(numbers.exponential_(generator=generator))]


def fit(make_module, make_data, folder, stop_at=None, ckpt=None, **options):
    """Losses of the optimizer steps, each the mean of its micro-batches; final weights; last validation."""
    torch.manual_seed(0 if ckpt is None else 99)  # a resumed process starts with other random numbers
    module, losses = make_module(), defaultdict(float)

    def add(trainer, module, loss):
        losses[trainer.global_step] += loss.item()

    def stop(trainer, *_):
        trainer.should_stop |= trainer.global_step == stop_at

    recorder = LambdaCallback(on_before_backward=add, on_train_batch_end=stop)
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=INTERRUPTED_AT)
    trainer = igpt.make_trainer(**EXACT, **QUIET, **options, callbacks=[recorder, checkpoint], default_root_dir=folder)
    trainer.fit(module, make_data(), ckpt_path=ckpt)
    weights = {name: value for name, value in module.state_dict().items() if name.startswith(TRAINED)}
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(EVALUATED)}
    return {"losses": list(losses.values()), "weights": describe(weights), "metrics": metrics}


def run(make_module, make_data, folder, **options):
    """An uninterrupted run, and whether an interrupted one gives the same when a new module and trainer resume it."""
    train, ckpt = partial(fit, make_module, make_data, **options), folder / "part" / f"step={INTERRUPTED_AT}.ckpt"
    whole, begun = train(folder / "whole"), train(folder / "part", stop_at=INTERRUPTED_AT)
    resumed = train(folder / "rest", ckpt=ckpt)
    resumed["losses"] = begun["losses"] + resumed["losses"]
    equal = {name: resumed[name] == value for name, value in whole.items()}
    return whole | {"resumed run is equal": equal, "checkpoint": loaded(ckpt)}


def pretraining(folder, dropout=0.0, batch_size=16, accumulate=1, **options):
    module = partial(igpt.PretrainModule, NETWORK | {"dropout": dropout}, "gray:16", seed=3, warmup_steps=5, **options)
    data = partial(igpt.PretrainDataModule, **DATA, batch_size=batch_size)
    options = {"max_steps": STEPS, "accumulate_grad_batches": accumulate, "val_check_interval": STEPS * accumulate // 2}
    return run(module, data, folder, **options)


def finetuning(folder, **options):
    settings = {"network": NETWORK, "palette": "gray:16", "seed": 3, "lr": 0.003, "warmup_steps": 5}
    data = partial(igpt.FineTuneDataModule, **DATA, batch_size=32, pad=1)
    return run(partial(igpt.FineTuneModule, **settings, **options), data, folder, max_epochs=3)


def probing(folder, solver):
    module = partial(igpt.ProbeModule, network=NETWORK, palette="gray:16", solver=solver, seed=3)
    data = partial(igpt.ProbeDataModule, "digits", seed=5, batch_size=128, shuffle=solver == "sgd")  # 10 batches
    return run(module, data, folder, max_epochs=3) if solver == "sgd" else fit(module, data, folder, max_epochs=1)


def first_batches(_):
    """Images, labels and sample numbers of the first five batches."""
    common, records = {"source": "digits", "seed": 5, "image_size": 8, "batch_size": 250}, {}
    modules = {
        "pretrain": igpt.PretrainDataModule(**common),
        "pretrain, random crops": igpt.PretrainDataModule(**common | {"image_size": 4}),
        "probe": igpt.ProbeDataModule(**common | {"batch_size": 100}),
        "probe, shuffled": igpt.ProbeDataModule(**common, shuffle=True),
        "finetune, augmented": igpt.FineTuneDataModule(**common, pad=2),
    }
    for name, data in modules.items():
        data.setup("fit")
        batches = islice(data.train_dataloader(), 5)
        records[name] = [{key: describe(batch[key]) for key in ("image", "label", "sample")} for batch in batches]
    return records


def hold_weights_as(patch, dtype):
    """Make half precision keep its weights as float16 or bfloat16, whatever this machine's torch would choose."""
    patch.setattr(decoding, "reads_float16", lambda: dtype == torch.float16)


def sampling(_, precision="full", dtype=torch.float16):
    network, tokens, generator = random_network(WIDE), TOKENS[:2], torch.Generator().manual_seed(7)
    known, options = torch.arange(64).expand(2, 64) % 5 < 3, {"precision": precision, "generator": generator}
    with pytest.MonkeyPatch.context() as patch:
        hold_weights_as(patch, dtype)
        drawn = {
            "complete": igpt.complete(network, tokens[:, :24], n_samples=20, **options),
            "complete, narrow": igpt.complete(network, tokens[:, :24], temperature=0.9, top_k=8, top_p=0.9, **options),
            "complete, greedy": igpt.complete(network, tokens[:, :1], temperature=0, **options),
            "inpaint": igpt.inpaint(network, tokens, known, **options),
            "inpaint, bert": igpt.inpaint(random_network(WIDE_BERT), tokens, known, **options),
        }
    return {name: describe(pixels) for name, pixels in drawn.items()}


@torch.no_grad()
def outputs(_):
    network, bert, masked = random_network(WIDE), random_network(WIDE_BERT), torch.arange(64).expand(8, 64) % 7 == 0
    features = torch.cat([network.features(TOKENS, range(3)), bert.features(TOKENS, range(3), masked=masked)], 1)
    return {
        "scores": describe(igpt.score(network, TOKENS)),
        "logits": [describe(network(TOKENS)), describe(bert(TOKENS, masked=masked))],
        "features": [describe(layer) for layer in features.unbind(1)],
    }


def palettes(_):
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    records = {name: igpt.Palette.load(name) for name in ("openai", "gray:16")}
    records["fitted"] = igpt.fit_palette(images, n_colors=16, seed=0)
    for name, palette in records.items():
        tokens = palette.quantize(images)
        records[name] = [describe(values) for values in (palette.colors, tokens, palette.dequantize(tokens))]
    return records


def loaded(source):
    """What ``load_pretrained`` makes of a source."""
    found = igpt.load_pretrained(source)
    head = {} if found.head is None else {"head": found.head}
    return describe(found.network.state_dict() | head) | {"palette": found.palette.sha256}


def conversions(folder, kind):
    """A network that OpenAI's code wrote, read through a stand-in for TensorFlow; to transformers' layout and back."""
    arrays, prefix = np.load(GOLDEN / f"openai_tf_{kind}.npz"), folder / "model.ckpt-1"
    values = {f"model/{name[7:]}": arrays[name] for name in arrays if name[:7] == "weight:" and "_power" not in name}
    shapes = {name: list(value.shape) for name, value in values.items()}
    reader = types.SimpleNamespace(get_variable_to_shape_map=lambda: shapes, get_tensor=values.__getitem__)
    train = types.SimpleNamespace(load_checkpoint=lambda prefix: reader)
    Path(f"{prefix}.index").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(train=train))
        found, record = igpt.load_pretrained(prefix), {"openai": loaded(prefix)}
    for name, head in {"network": None, "classifier": torch.linspace(-1, 1, 240).view(10, 24)}.items():
        igpt.save_pretrained(folder / name, found.network, found.palette, head=head)
        record[name] = loaded(folder / name) | {"file": describe(load_file(folder / name / "model.safetensors"))}
    return record


RUNS = {
    "pretrain": pretraining,
    "pretrain, bert": partial(pretraining, objective="bert"),
    "pretrain, dropout": partial(pretraining, dropout=0.1),
    "pretrain, accumulating": partial(pretraining, batch_size=18, accumulate=3),
    "pretrain, muon": partial(pretraining, optimizer="muon"),
    "finetune": finetuning,
    "finetune, layer decay": partial(finetuning, layer_decay=0.7),
    "probe, sgd": partial(probing, solver="sgd"),
    "probe, lbfgs": partial(probing, solver="lbfgs"),
    "first batches": first_batches,
    "sampling": sampling,
    "sampling, half, float16": partial(sampling, precision="half"),
    "sampling, half, bfloat16": partial(sampling, precision="half", dtype=torch.bfloat16),
    "sampling, int8": partial(sampling, precision="int8"),
    "outputs": outputs,
    "palettes": palettes,
    "conversions, ar": partial(conversions, kind="ar"),
    "conversions, bert": partial(conversions, kind="bert"),
    "random numbers": random_numbers,
}


def flat(tree, path=""):
    """The numbers and hashes in a tree of dicts and lists, by their path."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {place: leaf for key, part in items for place, leaf in flat(part, f"{path}/{key}").items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write all numbers and hashes")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print what differs; status 1 if anything does")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN", help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    logging.captureWarnings(True)
    stored = json.loads(arguments.compare.read_text(encoding="utf-8")) if arguments.compare else {}
    rows, failed = [], False
    for name in arguments.only:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tree = RUNS[name](Path(folder))
        new, old = flat(tree), flat(stored.get(name, {}) if arguments.compare else tree)
        wrong = [place for place in {**old, **new} if new.get(place) != old.get(place) or new.get(place) is False]
        lines = [f"{place}: {new.get(place)}, stored {old.get(place)}" for place in wrong]
        print(f"{name}: {len(wrong)} differ, {time.perf_counter() - start:.1f} s", *lines[:8], sep="\n    ", flush=True)
        rows.append(f"{json.dumps(name)}: {json.dumps(tree)}")
        failed |= bool(wrong)
    if arguments.write:
        arguments.write.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
