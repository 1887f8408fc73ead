"""The figures of a plan, as ``plan --format json`` prints them."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_igpt.planning import (
    RECOMPUTE,
    Choice,
    Recompute,
    Run,
    cache_bytes,
    checkpoint_bytes,
    choose,
    decode_seconds,
    forward_flops_per_token,
    largest_batch,
    parameter_count,
    train_flops_per_token,
    training_bytes,
    widths_of,
)

SCHEMA = 1  # grows when a name changes its meaning
DECODED = (1, 16, 64)  # images side by side


class Plan(NamedTuple):
    """A run, and how it is laid out on the devices."""

    name: str | None  # of the preset
    run: Run
    accumulate: int
    recompute: Recompute
    compiled: bool

    @property
    def images(self) -> int:
        """Images of a device in an optimiser step."""
        return self.run.schedule.batch_size // self.run.devices

    @property
    def micro_batch(self) -> int:
        """Images that a device computes at once."""
        return self.images // self.accumulate


def facts(plan: Plan) -> dict[str, Any]:
    """Plain numbers: bytes, operations, seconds, images; all names are in docs/reference/planning.md."""
    run = plan.run
    return {
        "schema": SCHEMA,
        "network": _network(plan),
        "device": _device(plan),
        "run": _run(plan),
        "memory": {kind: _memory(plan, sharded=kind == "fsdp") for kind in _kinds(run)},
        "largest_micro_batch": {kind: _largest(run, sharded=kind == "fsdp") for kind in _kinds(run)},
        "strategy": _strategy(plan),
        "data": {"images_per_second": run.schedule.images / run.seconds},
        "files": {
            "checkpoint_bytes": checkpoint_bytes(run.config, run.precision),
            "weights_bytes": 4 * parameter_count(run.config),
        },
        "inference": _inference(run),
    }


def _kinds(run: Run) -> tuple[str, ...]:
    return ("single",) if run.devices == 1 else ("ddp", "fsdp")


def _network(plan: Plan) -> dict[str, Any]:
    config = plan.run.config
    return {
        "preset": plan.name,
        **config.to_dict(),
        "tokens_per_image": config.n_positions,
        "parameters": parameter_count(config),
        "forward_flops_per_token": forward_flops_per_token(config),
        "train_flops_per_token": train_flops_per_token(config),
    }


def _device(plan: Plan) -> dict[str, Any]:
    device, precision = plan.run.device, plan.run.precision
    return {
        "name": device.name,
        "memory_bytes": device.memory,
        "usable_bytes": device.usable,
        "peak_flops": device.peak(precision),
        "reached_flops": device.reached(precision),
        "bandwidth": device.bandwidth,
        "source": device.source,
    }


def _run(plan: Plan) -> dict[str, Any]:
    run = plan.run
    return {
        "batch_size": run.schedule.batch_size,
        "devices": run.devices,
        "accumulate_grad_batches": plan.accumulate,
        "micro_batch_size": plan.micro_batch,
        "precision": run.precision,
        "recompute": plan.recompute,
        "compiled": plan.compiled,
        "steps": run.schedule.steps,
        "images": run.schedule.images,
        "tokens": run.tokens,
        "flops_per_step": run.flops / run.schedule.steps,
        "flops": float(run.flops),
        "mfu": run.mfu,
        "seconds": run.seconds,
        "device_seconds": run.seconds * run.devices,
        "floor_seconds": run.floor_device_seconds / run.devices,
        "floor_device_seconds": run.floor_device_seconds,
        "ceiling_mfu": run.ceiling_mfu,
    }


def _memory(plan: Plan, *, sharded: bool) -> dict[str, int]:
    parts = training_bytes(
        plan.run.config,
        plan.micro_batch,
        plan.run.precision,
        devices=plan.run.devices,
        sharded=sharded,
        recompute=plan.recompute,
        compiled=plan.compiled,
    )
    return {**parts, "total": sum(parts.values())}


def _largest(run: Run, *, sharded: bool) -> dict[str, dict[str, int]]:
    return {
        recompute: {
            name: largest_batch(
                run.config,
                run.device.usable,
                precision=run.precision,
                devices=run.devices,
                sharded=sharded,
                recompute=recompute,
                compiled=name == "compiled",
            )
            for name in ("eager", "compiled")
        }
        for recompute in RECOMPUTE
    }


def _strategy(plan: Plan) -> dict[str, Any]:
    """What suits the batch as it is laid out."""
    run = plan.run
    return _choice(choose(run.config, plan.micro_batch, run.devices, run.device.usable, run.precision, plan.compiled))


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "strategy": choice.strategy,
        "recompute": choice.recompute,
        "fits": choice.fits,
        "bytes": choice.bytes,
        "reason": choice.reason,
    }


def _inference(run: Run) -> dict[str, Any]:
    forward = run.device.reached(run.precision) / (run.config.n_positions * forward_flops_per_token(run.config))
    if run.config.objective != "autoregressive":  # it generates nothing
        return {
            "forward_images_per_second": forward,
            "cache_bytes_per_image": None,
            "sampling": None,
        }
    seconds = {size: decode_seconds(run.config, run.device, size, run.precision) for size in DECODED}
    return {
        "forward_images_per_second": forward,
        "cache_bytes_per_image": cache_bytes(run.config, width=widths_of(run.precision).product),
        "sampling": {
            str(size): {
                "seconds_per_batch": one * run.config.n_positions,
                "images_per_second": size / (one * run.config.n_positions),
            }
            for size, one in seconds.items()
        },
    }
