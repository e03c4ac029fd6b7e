"""Optimizer and DeepSpeed engine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    get_scheduler,
)

from alphatoken.config.run import RunConfig
from alphatoken.config.training import OptimConfig
from alphatoken.distributed import zero3


def build_optimizer(
    model: nn.Module, config: OptimConfig, deepspeed_values: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW without weight decay on norms and biases; DeepSpeed's CPU version where the states are
    offloaded.

    (Unless the DeepSpeed configuration says `zero_force_ds_cpu_optimizer: false`; that version has
    to be compiled.)
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if len(zero3.full_shape(p)) >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trainable if len(zero3.full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    offload = (
        deepspeed_values.get("zero_optimization", {})
        .get("offload_optimizer", {})
        .get("device", "none")
    )
    if offload != "none" and deepspeed_values.get("zero_force_ds_cpu_optimizer", True):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps
        )
        return offloaded
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def build_engine(
    model: nn.Module, config: RunConfig, deepspeed_values: dict[str, Any], total_steps: int
) -> Any:
    """The DeepSpeed engine around `model`, with optimizer and learning-rate schedule."""
    import deepspeed

    optimizer = build_optimizer(model, config.optim, deepspeed_values)
    schedule = get_scheduler(
        "constant_with_warmup" if config.optim.schedule == "constant" else config.optim.schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.optim.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_values,
        dist_init_required=False,
    )
    return engine


def build_inference_engine(
    model: nn.Module, deepspeed_values: dict[str, Any], device: torch.device
) -> None:
    """Lets a model run forward without an optimizer: below stage 3 on this rank's device, else by
    DeepSpeed's hooks."""
    if deepspeed_values.get("zero_optimization", {}).get("stage", 0) < 3:
        model.to(device)
        return
    import deepspeed

    deepspeed.initialize(model=model, config=deepspeed_values, dist_init_required=False)
