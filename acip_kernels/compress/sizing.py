"""From scores and a size to ranks: what is stored, and which singular values stay."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..nn import SVDLinear
from ..ops.quantize import Scheme, stored_bytes, stored_elements
from .config import FORMS, check_forms
from .factorize import svd_layers

COUNTS = ("factorized", "stored")
PAPER = "paper"  # the reference's own count and cut, see `Sizing`


@dataclasses.dataclass(frozen=True)
class Removal:
    """The order in which entries are pruned.

    order: of the flat entries, the first to go first. layer, saved: in that order, the layer of each, and what is saved
    once it has gone. places: each entry's place within its layer, from the best. All int64 `[entries]`.
    """

    order: Tensor
    places: Tensor
    layer: Tensor
    saved: Tensor


@dataclasses.dataclass(frozen=True)
class Sizing:
    """How many parameters a factorized model stores at given ranks.

    A layer of rank `ρ` whose adapter is merged exactly has `ρ' = ρ + r` ranks, rounded up to a multiple of
    `rank_multiple`. It stores `ρ'(out + in)` numbers as two factors, `ρ'(out + in - ρ') + ceil(out / 8)` in pivoted
    form (the latter for a bit that says of each output whether it is a pivot), `out · in` as a dense matrix, and it
    takes the smallest of the forms in `forms`; a dense matrix is always one of them. A *size ratio* is what is left of
    the dense model, in one of two counts:

    - `factorized`: the weights of the factorized layers alone, as they are stored;
    - `stored`: every parameter in the file, embeddings, norms and biases too.

    A third, `paper`, is the reference's, for who wants its ranks: the factorized layers with their biases, in two
    factors or dense, without adapters, whatever is stored. Its cut is the reference's too, see `cut`.

    All count numbers, whatever their width: with a `scheme`, the same singular values stay at a size ratio and `forms`
    as without one, but each layer takes the form of the fewest bytes as it is quantized, and `bytes` and `elements`
    count codes, scales and zeros.

    Fields: `names` of the layers; `out`, `in_`, `full_rank`, `adapter_rank`, int64 `[layers]`, in that order;
    `rest`, the parameters of everything else in the file, with the `biases` of the layers; `rank_multiple`; `forms`;
    `scheme`, how the layers' weights are quantized, or None.
    """

    names: tuple[str, ...]
    out: Tensor
    in_: Tensor
    full_rank: Tensor
    adapter_rank: Tensor
    rest: int
    rank_multiple: int = 1
    forms: tuple[str, ...] = FORMS
    scheme: Scheme | None = None
    biases: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        adapters: bool = True,
        rank_multiple: int = 1,
        forms: tuple[str, ...] | None = None,
        scheme: Scheme | None = None,
    ) -> Sizing:
        """The sizing of a model with `SVDLinear` layers; `adapters=False` leaves them out of every count."""
        if not isinstance(rank_multiple, int) or rank_multiple < 1:
            raise ValueError(f"rank_multiple must be an int of at least 1, got {rank_multiple!r}")
        layers = svd_layers(model)
        inside = {id(t) for layer in layers.values() for t in layer.state_dict(keep_vars=True).values()}
        state = model.state_dict(keep_vars=True).values()
        # A tied matrix occurs twice in the state and once in the file.
        rest = {id(t): t.numel() for t in state if isinstance(t, Tensor) and id(t) not in inside}
        biases = sum(layer.bias.numel() for layer in layers.values() if layer.bias is not None)

        def column(values):
            return torch.tensor(list(values), dtype=torch.int64)

        return cls(
            tuple(layers),
            column(layer.out_features for layer in layers.values()),
            column(layer.in_features for layer in layers.values()),
            column(layer.full_rank for layer in layers.values()),
            column(layer.adapter_rank if adapters else 0 for layer in layers.values()),
            sum(rest.values()) + biases,
            rank_multiple,
            forms_for(forms, scheme, knows_inputs(layers)),
            scheme,
            biases,
        )

    @property
    def dense(self) -> Tensor:
        """Parameters of every layer's dense weight, int64 `[layers]`."""
        return self.out * self.in_

    def ranks_stored(self, ranks: Tensor, layers: Tensor | slice = slice(None)) -> Tensor:
        """Ranks with the adapters' and the rounding, for live `ranks` of `layers` (all of them, or their numbers)."""
        return -(-(ranks + self.adapter_rank[layers]) // self.rank_multiple) * self.rank_multiple

    def parameters(self, ranks: Tensor, layers: Tensor | slice = slice(None)) -> Tensor:
        """Weights of each layer at live `ranks` in the smallest of its forms, int64: what size ratios count."""
        return self.form_sizes(ranks, layers).amin(0)

    def form_sizes(self, ranks: Tensor, layers: Tensor | slice = slice(None)) -> Tensor:
        """Weights of each layer in each of FORMS, int64 `[3, layers]`; what `forms` lacks is larger than any."""
        stored, both, dense = self.ranks_stored(ranks, layers), (self.out + self.in_)[layers], self.dense[layers]
        never = torch.full_like(dense, torch.iinfo(torch.int64).max)
        # Beyond full rank, where a merged adapter may lead, the pivoted form's count would fall again.
        full = torch.minimum(self.out, self.in_)[layers]
        pivoted = torch.where(stored < full, stored * (both - stored) + self._pivot_bytes[layers], never)
        sizes = {"dense": dense, "factors": stored * both, "pivoted": pivoted}
        return torch.stack([sizes[form] if form in (*self.forms, "dense") else never for form in FORMS])

    @property
    def _pivot_bytes(self) -> Tensor:
        return -(-self.out // 8)

    def bytes(self, ranks: Tensor, itemsize: int) -> int:
        """Bytes of all tensors in the file at live `ranks` [layers], with plain weights of `itemsize` bytes each."""
        if self.scheme is not None:
            return int(self._quantized(ranks, stored_bytes).amin(0).sum()) + self.rest * itemsize
        pivoted = self._choices(ranks) == FORMS.index("pivoted")
        bits = int(self._pivot_bytes[pivoted].sum())
        return (int(self.parameters(ranks).sum()) + self.rest - bits) * itemsize + bits

    def elements(self, ranks: Tensor) -> int:
        """Elements of all tensors in the file at live `ranks` [layers]; a byte of two codes or eight bits is one."""
        if self.scheme is not None:
            sizes = self._quantized(ranks, stored_elements).gather(0, self._choices(ranks)[None])
            return int(sizes.sum()) + self.rest
        return int(self.parameters(ranks).sum()) + self.rest

    def forms_of(self, ranks: Tensor) -> dict[str, str]:
        """The form that each layer takes at live `ranks`; of equal ones the first of FORMS."""
        return {name: FORMS[i] for name, i in zip(self.names, self._choices(ranks).tolist(), strict=True)}

    def _choices(self, ranks: Tensor) -> Tensor:
        """The place in FORMS of each layer's form, int64 `[layers]`."""
        sizes = self.form_sizes(ranks) if self.scheme is None else self._quantized(ranks, stored_bytes)
        return sizes.argmin(0)

    def _quantized(self, ranks: Tensor, size) -> Tensor:
        """`size`, `stored_bytes` or `stored_elements`, of each layer in each of FORMS, as in `form_sizes`."""
        rank, out, in_, options = self.ranks_stored(ranks), self.out, self.in_, self.scheme.options
        first = size(rank, in_, **options)
        sizes = torch.stack(
            [
                size(out, in_, **options),
                first + size(out, rank, **options),
                first + size(out - rank, rank, **options) + self._pivot_bytes,
            ]
        )
        plain = self.form_sizes(ranks)
        never = torch.iinfo(torch.int64).max
        return torch.where(plain == never, never, sizes)

    def ratio(self, ranks: Tensor, count: str = "factorized") -> float:
        """The size ratio at live `ranks` [layers]."""
        sizes = self._paper_sizes(ranks.cpu()) if count == PAPER else self.parameters(ranks.cpu())
        total = int(sizes.sum())
        return (total + self._others(count)) / (int(self.dense.sum()) + self._others(count))

    def ratios(self, ranks: Tensor) -> dict[str, float]:
        """The size ratio in both counts, by name."""
        return {count: self.ratio(ranks, count) for count in COUNTS}

    def smallest(self, count: str = "factorized") -> float:
        """The least size ratio that can be reached: nothing but adapters is left."""
        return self.ratio(torch.zeros_like(self.full_rank), count)

    def cut(self, scores: dict[str, Tensor], size_ratio: float, count: str = "factorized") -> dict[str, Tensor]:
        """Which singular values stay at `size_ratio`: `{name: bool [k]}`.

        The fewest lowest-scored entries of the whole model are pruned such that the size ratio is at or below
        the target. Equal scores are ordered by their place in their own layer, the last (smallest) first, then
        by layer, so that the choice is the same in any order of storage.

        count: "paper" cuts as the reference does, to give its ranks: what is pruned are all scores up to the k-th
            smallest, equal ones included, for the largest k whose ratio is still *above* the target (1 is left whole).
            So it ends above the target, by the one entry, or run of equal scores, that would cross it.

        Raises `ValueError` for a target outside (0, 1] or below `smallest`, and for scores of a wrong shape or
        that are NaN.
        """
        removal = self.removal(scores)
        if count == PAPER:
            pruned = self._pruned_in_paper(removal, self._flatten(scores)[0], size_ratio)
        else:
            pruned = self._pruned(removal, size_ratio, count)
        live = torch.ones(len(removal.order), dtype=torch.bool)
        live[removal.order[:pruned]] = False
        ranks = torch.stack([part.sum() for part in live.split(self.full_rank.tolist())])
        if self.rank_multiple > 1:
            # Rounding up is not padding: the best of what was pruned comes back, at no byte more.
            room = torch.minimum(self.ranks_stored(ranks) - self.adapter_rank, self.full_rank)
            live = removal.places < room.repeat_interleave(self.full_rank)
        return dict(zip(self.names, live.split(self.full_rank.tolist()), strict=True))

    def ranks_at(self, removal: Removal, size_ratio: float, count: str = "factorized") -> Tensor:
        """Live ranks of `cut` at `size_ratio`, int64 `[layers]`, for who cuts by the same scores again and again.

        count: one of COUNTS; the paper's cut is `cut`'s alone.
        """
        if count == PAPER:
            raise ValueError("count: ranks_at takes factorized or stored; cut takes paper, too")
        gone = torch.bincount(removal.layer[: self._pruned(removal, size_ratio, count)], minlength=len(self.names))
        return self.full_rank - gone

    def removal(self, scores: dict[str, Tensor]) -> Removal:
        """The order in which the entries of all layers go."""
        flat, layer = self._flatten(scores)
        # Every entry's place within its layer, from the best.
        places = torch.empty_like(layer)
        start = 0
        for k in self.full_rank.tolist():
            best_first = flat[start : start + k].sort(descending=True, stable=True).indices
            places[start : start + k][best_first] = torch.arange(k)
            start += k
        # Three stable sorts, the least significant key first: by layer (as they are), place, score.
        order = places.sort(descending=True, stable=True).indices
        order = order[flat[order].sort(stable=True).indices]

        # Whichever of a layer's entries goes, its live rank falls by one: from the number that were left before.
        left_before = places[order] + 1
        layer = layer[order]
        saved = self.parameters(left_before, layer) - self.parameters(left_before - 1, layer)
        return Removal(order, places, layer, saved.cumsum(0))

    def _pruned(self, removal: Removal, size_ratio: float, count: str) -> int:
        """How many entries go for `size_ratio`."""
        check_size_ratio(size_ratio)
        others = self._others(count)
        # The most that can be stored such that `ratio` is not above the target, to the last bit.
        whole = int(self.dense.sum()) + others
        budget = int(size_ratio * whole) + 1
        while budget / whole > size_ratio:
            budget -= 1
        excess = int(self.parameters(self.full_rank).sum()) - (budget - others)
        if excess <= 0:
            return 0
        if int(removal.saved[-1]) < excess:
            raise ValueError(
                f"size_ratio {size_ratio} ({count}) cannot be reached: with nothing left but adapters it is "
                f"{self.smallest(count):.4f}; a larger target, or adapters='truncate' or 'drop'"
            )
        return int(torch.searchsorted(removal.saved, excess)) + 1

    def _pruned_in_paper(self, removal: Removal, scores: Tensor, size_ratio: float) -> int:
        """How many entries go for `size_ratio` by the reference's rule; see `cut`."""
        check_size_ratio(size_ratio)
        whole = int(self.dense.sum()) + self.biases
        total = int(self._paper_sizes(self.full_rank).sum()) + self.biases
        if size_ratio == 1 or total / whole <= size_ratio:
            return 0
        left_before = removal.places[removal.order] + 1
        saved = self._paper_sizes(left_before, removal.layer) - self._paper_sizes(left_before - 1, removal.layer)
        falling = scores[removal.order]
        # The k smallest are pruned together with all that equal the k-th: the ends of runs of equal scores.
        ends = torch.cat([(falling[1:] > falling[:-1]).nonzero()[:, 0] + 1, torch.tensor([len(falling)])])
        above = (total - saved.cumsum(0)[ends - 1]).double() / whole > size_ratio
        # Not even the first k need be above the target: the reference takes it all the same.
        return int(ends[max(int(above.sum()) - 1, 0)])

    def _paper_sizes(self, ranks: Tensor, layers: Tensor | slice = slice(None)) -> Tensor:
        """Weights of each layer at live `ranks` as the reference counts them."""
        return torch.minimum(ranks * (self.out + self.in_)[layers], self.dense[layers])

    def _others(self, count: str) -> int:
        others = {"factorized": 0, "stored": self.rest, PAPER: self.biases}
        if count not in others:
            raise ValueError(f"count must be one of {', '.join(others)}, got {count!r}")
        return others[count]

    def _flatten(self, scores: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        for name, k in zip(self.names, self.full_rank.tolist(), strict=True):
            if name not in scores:
                raise ValueError(f"scores: there are none for {name}")
            if scores[name].shape != (k,):
                raise ValueError(f"scores[{name!r}] must be [{k}], got {list(scores[name].shape)}")
        flat = torch.cat([scores[name].detach().float().cpu() for name in self.names])
        if bool(flat.isnan().any()):
            bad = next(name for name in self.names if bool(scores[name].isnan().any()))
            raise ValueError(f"scores[{bad!r}] holds NaN")
        return flat, torch.arange(len(self.names)).repeat_interleave(self.full_rank)


def forms_for(forms: tuple[str, ...] | None, scheme: Scheme | None, informed: bool) -> tuple[str, ...]:
    """The forms that layers may take: `forms`, or by default all, in int4 the pivoted one only if `informed`.

    informed: rounding takes errors back by what is known of the layers' inputs.
    """
    if forms is not None:
        return check_forms(forms)
    # An error of four bits in the pivot rows passes through the second matrix too, and may ruin it.
    return FORMS if informed or scheme is None or scheme.kind != "int4" else ("dense", "factors")


def knows_inputs(layers: dict[str, SVDLinear]) -> bool:
    """Whether the layers were decomposed in a basis that knows their inputs, and remember them."""
    return any(layer.input_variances is not None for layer in layers.values())


def check_size_ratio(size_ratio: float) -> None:
    """Raises `ValueError` for anything but a number in (0, 1]."""
    if not isinstance(size_ratio, int | float) or not 0 < size_ratio <= 1:
        raise ValueError(f"size_ratio is what is left, in (0, 1]; got {size_ratio!r}")


def live_ranks(layers: dict[str, SVDLinear]) -> Tensor:
    """How many singular values of each layer are not pruned, int64 `[layers]`, on the CPU."""
    return torch.stack([layer.live.sum() for layer in layers.values()]).cpu()
