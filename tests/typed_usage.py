"""What a user writes, for mypy: the public functions' types hold, and mistakes are found. Nothing here is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor, nn

import acip_kernels as acip


def compress(model: nn.Module, batches: list[dict]) -> nn.Module:
    result = acip.compress(model, batches, acip.NestedConfig(steps=400), output="runs/a", resume=True)
    assert_type(result, acip.CompressionResult)
    assert_type(result.size_ratio, float)
    assert_type(result.scores, dict[str, Tensor])
    result.save("elastic", compact=False, overwrite=True)
    acip.compress(model, batches, acip.CompressionConfig.short(100, 0.4, adapter_rank=8))
    acip.compress(model, batches, acip.RankingConfig(method="svd"))
    acip.compress(model, batches, config="nested")  # type: ignore[arg-type]
    acip.compress(model, batches, ouput="runs/a")  # type: ignore[call-arg]
    acip.recalibrate(result, 0.5, batches)
    assert_type(acip.factorize(model, ["q_proj"]), list[str])
    assert_type(acip.materialize(result, size_ratio=0.6, quantize="int4"), nn.Module)
    acip.materialize(result, size_ratio="0.6")  # type: ignore[arg-type]
    acip.materialize(result)  # type: ignore[call-arg]
    acip.materialize(3, 0.6)  # type: ignore[arg-type]
    assert_type(acip.CompressionResult.load("elastic"), acip.CompressionResult)
    return result.at(0.5)


def keep(model: nn.Module) -> nn.Module:
    acip.save(model, "small", max_shard_size="1GB")
    acip.save("small", model)  # type: ignore[arg-type]
    assert_type(acip.load("elastic", 0.5, dtype=torch.bfloat16, device_map="auto"), nn.Module)
    acip.load("elastic", size="0.5")  # type: ignore[call-arg]
    return acip.unfuse(acip.fuse(model))


def layers(x: Tensor, weight: nn.Linear) -> Tensor:
    low = acip.LowRankLinear(64, 32, rank=8, bias=False, device="cpu", dtype=torch.float32)
    assert_type(acip.LowRankLinear.from_factors(low.Vh.weight, low.U.weight), acip.LowRankLinear)
    acip.LowRankLinear(64, 32)  # type: ignore[call-arg]
    acip.PivotLinear(64, 32, "8")  # type: ignore[arg-type]
    acip.QuantizedLinear(64, 32, kind="int8")
    assert_type(acip.SVDLinear.from_linear(weight, adapter_rank=4), acip.SVDLinear)
    y = acip.lowrank_linear(x, low.Vh.weight, low.U.weight)
    assert_type(y, Tensor)
    acip.lowrank_linear(x)  # type: ignore[call-arg]
    operators: list[Callable[..., Tensor]] = [acip.masked_svd_linear, acip.linear_cross_entropy]
    return operators[0](y)
