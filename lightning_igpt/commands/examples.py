"""What the help of every verb shows at its end: command lines as they are typed."""

from __future__ import annotations

from collections.abc import Mapping

PROGRAM = "lightning-igpt"
_EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "fit": (
        "fit --config digits_tiny_pretrain",
        "fit --config digits_tiny_pretrain --trainer.max_steps 100 --dry_run",
        "fit --config cifar10_s_pretrain --data.source photos --resume auto",
    ),
    "validate": ("validate --config digits_tiny_pretrain --ckpt_path final.ckpt",),
    "test": ("test --config digits_tiny_pretrain --ckpt_path final.ckpt",),
    "predict": ("predict --config digits_tiny_pretrain --ckpt_path final.ckpt",),
    "quickstart": ("quickstart", "quickstart --out first-look --steps 200", "quickstart --dry_run"),
    "complete": (
        "complete --pretrained final.ckpt --images photos",
        "complete --pretrained final.ckpt --images photos --keep_rows 8 --n_samples 8",
        "complete --pretrained openai/imagegpt-small --images photos --mask hole.png",
    ),
    "demo": ("demo", "demo --pretrained final.ckpt --port 8080 --open"),
    "score": (
        "score --pretrained final.ckpt --images photos",
        "score --pretrained openai/imagegpt-small --images photos --limit 500 --out photos.csv",
    ),
    "lowdata": ("lowdata --pretrained final.ckpt --source digits --labels_per_class 4 25",),
    "report": ("report runs", "report runs/pretrain runs/probe --out report.html"),
    "figures": ("figures", "figures --pretrained final.ckpt --images photos --out pictures"),
    "data": ("data show photos",),
    "data show": ("data show photos --image_size 32", "data show --config digits_tiny_pretrain --out digits.png"),
    "palette": ("palette fit photos mine.npy", "palette show --palette mine.npy"),
    "palette fit": ("palette fit photos mine.npy", "palette fit photos mine.npy --n_colors 256 --limit 5000"),
    "palette show": ("palette show", "palette show --palette mine.npy --out mine.png"),
    "convert": (
        "convert final.ckpt mine",
        "convert final.ckpt mine.safetensors --to safetensors",
        "convert openai/imagegpt-small small --check",
    ),
    "plan": (
        "plan --network igpt_l --devices 8 --device_kind h100",
        "plan --config cifar10_s_pretrain --device_kind rtx4090",
        "plan --config digits_tiny_pretrain --device_kind cpu",
    ),
    "microbatch": (
        "microbatch --config cifar10_s_pretrain",
        "microbatch --config digits_tiny_pretrain --device cpu --memory_gib 2",
    ),
    "launch": ("launch slurm --config imagenet32_s_pretrain --nodes 2 --gpus 8 --time 24:00:00 --out job.sh",),
    "launch slurm": (
        "launch slurm --config imagenet32_s_pretrain --nodes 2 --gpus 8 --time 24:00:00 --out job.sh",
        "launch slurm --config imagenet32_s_pretrain --nodes 2 --gpus 8 --time 24:00:00 -- --trainer.max_steps 5000",
    ),
    "launch torchrun": (
        "launch torchrun --config imagenet32_s_pretrain --nodes 1:4 --gpus 8 --rendezvous node1:29500",
    ),
    "recipes": (
        "recipes list",
        "recipes show digits_tiny_pretrain",
        "recipes copy digits_tiny_pretrain --to mine.yaml",
    ),
    "recipes list": ("recipes list",),
    "recipes show": ("recipes show digits_tiny_pretrain",),
    "recipes copy": ("recipes copy digits_tiny_pretrain --to mine.yaml",),
    "completion": ("completion bash", "completion zsh"),
}
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    verb: tuple(f"{PROGRAM} {line}" for line in lines) for verb, lines in _EXAMPLES.items()
}
