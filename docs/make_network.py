"""Make a network that ships: its weights in float16 in lightning_igpt/assets/NAME, and a card with measured numbers.

    python docs/make_network.py photos runs/cifar10_tiny_pretrain uoft-cs/cifar10
    python docs/make_network.py emoji runs/emoji_tiny_pretrain emoji

The arguments are the network's name, a checkpoint or run folder, and the images that it was trained on, of which the
test split is used: nats per pixel; linear probes of every layer, of the same network untrained, and of raw pixels.
Every number is measured with the weights that ship. --quick measures nats on 1,000 test images and probes nothing.
"""

import argparse
import math
import tempfile
from importlib import resources
from pathlib import Path

import torch

import lightning_igpt as igpt
from lightning_igpt.commands.quickstart import whole
from lightning_igpt.features import fit_logistic

TEXTS = {
    "photos": {
        "title": "Image GPT of photographs, 16 x 16",
        "data": "CIFAR-10",
        "license": "mit",
        "lacks": "It has seen 45,000 photographs of ten kinds: airplanes, cars, birds, cats, deer, dogs, frogs, "
        "horses, ships and trucks. It continues colors and edges well, parts of these things sometimes, and faces, "
        "text, rooms and city streets badly. Large holes, and more than the lower half of an image, end in texture. "
        "At 16 x 16 a completion is a sketch, not a restoration of the photo.",
        "recipe": "cifar10_tiny_pretrain",
        "source": "uoft-cs/cifar10",
        "extra": "The pictures in `examples/`, which the demo offers, are in the public domain or under CC0, from "
        "scikit-image: `astronaut` and `rocket` (NASA and SpaceX), `cat` (Stéfan van der Walt), `coffee` (Rachel "
        "Michetti). CIFAR-10: Krizhevsky (2009), Learning multiple layers of features from tiny images.",
    },
    "emoji": {
        "title": "Image GPT of emoji, 16 x 16",
        "data": "emoji",
        "license": "apache-2.0",
        "lacks": "It has seen 2,715 color emoji on white, many of them variants of one another, so it can repeat "
        "training images. A photograph is foreign to it. It knows neither text nor flags by name, and small symbols "
        "lose their details at 16 x 16.",
        "recipe": "emoji_tiny_pretrain",
        "source": "emoji",
        "extra": "Its training images are Noto Color Emoji by Google, Apache License 2.0.",
    },
}
TEXTS["emoji_bert"] = TEXTS["emoji"] | {
    "title": "Masked Image GPT of emoji, 16 x 16",
    "recipe": "emoji_tiny_bert",
}


def probed(folder, config, palette, data, quick):
    """Rows of the card's table: test accuracy by layer, of five layers together, and of the baselines."""
    if quick:
        return []
    rows = []
    for name, weights in (("this network", str(folder)), ("the same network untrained", None)):
        module = igpt.ProbeModule(weights, network=config, palette=palette, concat=5, c=1.0)
        trainer = trainer_for(max_epochs=1)
        trainer.fit(module, data)
        test = trainer.test(module, data, verbose=False)[0]
        layers = " ".join(f"{test[f'test/layer_{layer}/accuracy']:.3f}" for layer in range(config.n_layer + 1))
        rows.append((f"{name}, by layer from 0 to {config.n_layer}", layers))
        rows.append((f"{name}, layer {module.best_layer}, best on validation", f"{test['test/accuracy']:.3f}"))
        rows.append((f"{name}, five layers around it", f"{test['test/concat_accuracy']:.3f}"))
    (x, y), (x_test, y_test) = (
        (batch["image"].flatten(1).float() / 255, batch["label"])
        for batch in map(whole, (data.train_dataloader(), data.test_dataloader()))
    )
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    grid = {}
    for c in (0.0001, 0.001, 0.01, 0.1, 1.0):  # the best on test, which favors the baseline
        weight, bias = fit_logistic((x - mean) / spread, y, len(data.class_names), c=c)
        grid[c] = float((((x_test - mean) / spread @ weight.T + bias).argmax(1) == y_test).float().mean())
    best = max(grid, key=grid.get)
    return [
        *rows,
        (
            f"logistic regression on the raw {config.image_size} x {config.image_size} pixels, C = {best:g}",
            f"{grid[best]:.3f}",
        ),
    ]


def trainer_for(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return igpt.make_trainer(default_root_dir=tempfile.mkdtemp(), **quiet, **options)


def notes(name, nats, n_test, rows, n_colors, objective):
    texts = TEXTS[name]
    parts = [f'The network `{name}` of `load_pretrained("{name}")`, `lightning-igpt complete` and `demo`, in float16.']
    parts += [f"**What it cannot do.** {texts['lacks']}", texts["extra"]]
    bound = ", upper bound by 32 masks of each image" if objective == "bert" else ""
    table = [
        (f"nats per pixel{bound}", f"{nats:.3f} ({nats / math.log(2):.3f} bits; guessing: {math.log(n_colors):.3f})"),
        *rows,
    ]
    parts += [
        f"Measured on {n_test:,} test images:",
        "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in table)]),
    ]
    recipe = texts["recipe"]
    command = (
        f"lightning-igpt fit --config {recipe}\npython docs/make_network.py {name} runs/{recipe} {texts['source']}"
    )
    return "\n\n".join([*parts, "Trained and measured by", f"```bash\n{command}\n```"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TEXTS))
    parser.add_argument("checkpoint")
    parser.add_argument("source")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    loaded, folder = igpt.load_pretrained(given.checkpoint), resources.files("lightning_igpt") / "assets" / given.name
    texts, palette, size = TEXTS[given.name], loaded.palette, loaded.config.image_size
    card = loaded.card.filled(**{field: texts[field] for field in ("title", "data", "license")})
    loaded.network.half()
    igpt.save_pretrained(folder, loaded.network, palette, card=card)
    data = igpt.ProbeDataModule(given.source, image_size=size, batch_size=100, num_workers=0, cache="none")
    data.setup()
    images = whole(data.test_dataloader())["image"]
    if given.quick:
        images = images[:: max(1, len(images) // 1000)]
    tokens = palette.quantize(images)
    nats = igpt.score(igpt.load_pretrained(folder).network, tokens, batch_size=64).mean(dtype=torch.float64).item()
    rows = probed(Path(folder), loaded.config, palette, data, given.quick)
    text = notes(given.name, nats, len(tokens), rows, len(palette), loaded.config.objective)
    if card.nats_per_pixel is None:  # a run that was not validated
        card = card.filled(nats_per_pixel=nats)
    igpt.save_pretrained(folder, loaded.network, palette, card=card.filled(notes=text))
    print(text)


if __name__ == "__main__":
    main()
