"""The examples of the API reference, a cell per public name; a test runs them in this order."""

import datasets
import torch

import lightning_igpt as igpt

# %% load_pretrained
loaded = igpt.load_pretrained("emoji")  # or "photos", "emoji_bert", a run folder, a checkpoint, a hub id
print(loaded.config, loaded.origin)

# %% Palette
palette = igpt.Palette.load("openai")
tokens = palette.quantize(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))  # int64 (2, 256)
pictures = palette.dequantize(tokens)  # uint8 (2, 3, 16, 16)

# %% fit_palette
images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
mine = igpt.fit_palette(images, n_colors=16, seed=0)
mine.save("mine.npy")

# %% ImageGPTConfig
config = igpt.ImageGPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=512, image_size=16)
print(config.n_positions)  # 256

# %% PRESETS
small = igpt.PRESETS["igpt_s"]  # 24 layers, width 512
network = igpt.ImageGPT(igpt.PRESETS["igpt_tiny"])

# %% ImageGPT
network = igpt.ImageGPT(config)
logits = network(tokens)  # (2, 256, 512): of pixel t, given the pixels before it
features = network.features(tokens, layers=[1])  # means over positions

# %% KVCache
cache = igpt.KVCache(config, batch_size=2)
logits = network(tokens[:, :0], cache=cache)  # (2, 1, 512): of the first pixel
logits = network(tokens[:, :1], cache=cache)  # of the second

# %% complete
given = tokens[:, :192]  # three quarters of the rows
samples = igpt.complete(loaded.network, given, n_samples=2, temperature=0.8)  # (2, 2, 256)

# %% inpaint
known = torch.ones(2, 256, dtype=torch.bool)
known[:, 200:] = False  # what is drawn
filled = igpt.inpaint(loaded.network, tokens, known)  # (2, 256)

# %% score
nats = igpt.score(loaded.network, tokens)  # (2, 256)
per_image = nats.mean(1)  # nats per pixel

# %% PretrainDataModule
data = igpt.PretrainDataModule("emoji", image_size=16, batch_size=16)
data.setup()
batch = next(iter(data.train_dataloader()))  # {"image": uint8 (16, 3, 16, 16), ...}

# %% ProbeDataModule
labeled = igpt.ProbeDataModule("digits", image_size=8)
labeled.setup()
print(labeled.class_names)

# %% FineTuneDataModule
labeled = igpt.FineTuneDataModule("digits", image_size=8, batch_size=32, pad=0, flip=False)
labeled.setup()
batch = next(iter(labeled.train_dataloader()))  # {"image": ..., "label": int64 (32,)}

# %% make_trainer
trainer = igpt.make_trainer(max_steps=2, default_root_dir="runs/mine")
trainer.fit(igpt.PretrainModule(config), data)

# %% PretrainModule
module = igpt.PretrainModule({"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 16, "image_size": 8}, "gray:16")
trainer = igpt.make_trainer(max_steps=2, default_root_dir="runs/digits")
trainer.fit(module, igpt.PretrainDataModule("digits", batch_size=16))

# %% ProbeModule
probe = igpt.ProbeModule(pretrained="runs/digits", c=1.0)
igpt.make_trainer(max_epochs=1, default_root_dir="runs/probe").fit(probe, igpt.ProbeDataModule("digits"))
print(probe.best_layer, probe.accuracy_by_layer)

# %% FineTuneModule
classifier = igpt.FineTuneModule(pretrained="runs/digits", num_classes=10)
trainer = igpt.make_trainer(max_steps=2, default_root_dir="runs/classifier")
trainer.fit(classifier, labeled)

# %% find_checkpoint
checkpoint = igpt.find_checkpoint("runs/digits")
trainer = igpt.make_trainer(max_steps=4, default_root_dir="runs/digits")
trainer.fit(module, igpt.PretrainDataModule("digits", batch_size=16), ckpt_path=checkpoint)

# %% tokenize
rows = datasets.load_dataset("imagefolder", data_dir="photos", split="train")
igpt.tokenize(rows, palette, size=16).save_to_disk("photos-tokens")

# %% ModelCard
card = igpt.ModelCard(title="Cats", data="me/cats", license="mit", notes="Indoor photos.")

# %% save_pretrained
igpt.save_pretrained("exported", loaded.network, loaded.palette, card=card)

# %% push_to_hub
igpt.push_to_hub("me/cats", loaded.network, loaded.palette, card=card, private=True)
