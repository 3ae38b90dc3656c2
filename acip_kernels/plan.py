"""Which way to compute a layer: from counted operations, and the rates that a machine was measured to have."""

from __future__ import annotations

import dataclasses

ROUTES = ("factored", "effective")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How a masked SVD layer is computed in a training step.

    route: "factored", products through the live rank; or "effective", dense products with `W = U diag(S β) Vh` (see
    `ops.masked_svd_linear.effective`). operations: of each route in one optimizer step, multiplications and additions
    counted separately, `{route: number}`.
    """

    route: str
    operations: dict[str, int]

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {count / 1e9:.2f} GFLOP" for name, count in self.operations.items())
        return f"{self.route} ({costs} a step)"


def training_operations(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    adapter_rank: int = 0,
    *,
    batches: int = 1,
    dropout: bool = False,
) -> dict[str, int]:
    """Operations of a layer's forward and backward pass in one optimizer step, by route.

    tokens: of one batch; batches: how many are accumulated before a step. rank: live ranks. With `T = tokens`,
    `n + m = in_features + out_features`, `ρ = rank` and `r = adapter_rank`:

    - factored: `z`, `y`, `h` and `∂x` are `2 T (ρ + r) (n + m)` each two, `∂A` and `∂B` `2 T r (n + m)` together:
      `T (4 ρ + 6 r) (n + m)` for every batch.
    - effective: `y`, `∂x` and `M = gᵀ x` are `6 T n m` for every batch; then `Uᵀ M` is `2 n m ρ` for a step. Without
      dropout, the adapter is added to `W` in each pass (`4 n m r` a batch) and `∂A`, `∂B` follow from `M`
      (`4 n m r` a step); with dropout it is computed beside it, `6 T r (n + m)`.

    What updates `W` when an entry dies (`2 n m` for each) is left out: deaths are few in a step.
    """
    both, area = in_features + out_features, in_features * out_features
    if dropout:
        adapter_batch, adapter_step = 6 * tokens * adapter_rank * both, 0
    else:
        adapter_batch, adapter_step = 4 * area * adapter_rank, 4 * area * adapter_rank
    return {
        "factored": batches * tokens * (4 * rank + 6 * adapter_rank) * both,
        "effective": batches * (6 * tokens * area + adapter_batch) + 2 * area * rank + adapter_step,
    }


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a layer holds while it is trained.

    frozen: factors, their live copies, the dense weight. trained: masks and adapters with gradients and AdamW's two
    moments. kept: for the backward pass of one batch.
    """

    frozen: int
    trained: int
    kept: int


def training_memory(
    tokens: int,
    in_features: int,
    out_features: int,
    full_rank: int,
    rank: int,
    adapter_rank: int = 0,
    *,
    route: str = "factored",
    dropout: bool = False,
    save_z: bool = True,
    itemsize: int = 4,
) -> TrainingMemory:
    """What `TrainingStep` holds of one layer, in bytes, with `itemsize` bytes a number of the model's dtype.

    rank: computed ranks `ρ`; `k = full_rank`, the rest as in `training_operations`. With everything computed the
    factors lie once, beside the adapter's copy: `(k + r)(n + m)`; once compacted, the live ones are copied,
    `(ρ + r)(n + m)` more; the effective route adds `n m`. Trained, in float32: four times `k + r (n + m)`. Kept: `T n`
    for the layer's input (once for all layers that share it), and `T (ρ + r)` for `z` unless it is computed again; on
    the effective route `T r` with dropout instead. Singular values and scores, `k` numbers each, are left out.
    """
    both = in_features + out_features
    frozen = (full_rank + adapter_rank) * both
    if rank < full_rank:
        frozen += (rank + adapter_rank) * both
    if route == "effective":
        frozen += in_features * out_features
        kept = adapter_rank if dropout else 0
    else:
        kept = rank + adapter_rank if save_z else 0
    return TrainingMemory(
        frozen * itemsize, 4 * 4 * (full_rank + adapter_rank * both), tokens * (in_features + kept) * itemsize
    )


# The effective route holds a dense W beside the factors: it has to save this share of the operations to be worth it.
MARGIN = 0.05


def training_plan(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    adapter_rank: int = 0,
    *,
    batches: int = 1,
    dropout: bool = False,
    route: str = "auto",
) -> TrainingPlan:
    """The cheaper route for a layer, see `training_operations`; or the one that `route` names.

    Matrix products dominate either route at training's token counts, and run at about one rate, so the operations
    decide; `bench/training_routes.py` checks that against measured time.
    """
    if route not in ("auto", *ROUTES):
        raise ValueError(f"route must be 'auto' or one of {', '.join(ROUTES)}, got {route!r}")
    operations = training_operations(
        tokens, in_features, out_features, rank, adapter_rank, batches=batches, dropout=dropout
    )
    if route == "auto":
        cheap = operations["effective"] < (1 - MARGIN) * operations["factored"]
        route = "effective" if cheap else "factored"
    return TrainingPlan(route, operations)


# ---- deployed layers

# Up to how many tokens the native operator computes deployed layers; above, torch's matrix products win
# (`bench.decode_cpu`).
FUSED_TOKENS = 32
