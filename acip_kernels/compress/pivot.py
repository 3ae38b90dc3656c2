"""Two factors to the pivoted form of the same matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# No entry of C is larger, in magnitude. 1 could be reached (a submatrix of maximal volume); a little more takes far
# fewer exchanges.
BOUND = 1.5


@torch.no_grad()
def pivot_form(left: Tensor, right: Tensor, bound: float = BOUND) -> tuple[Tensor, Tensor, Tensor]:
    """`(P, C, pivots)` of the matrix `left right`: pivot rows, what makes the others of them, and which they are.

    Args:
        left: `[out, ρ]`, right: `[ρ, in]`, with `ρ <= out`.
        bound: at least 1; no entry of `C` is above it.

    Returns:
        `P [ρ, in]` and `C [out - ρ, ρ]`, float64, and `pivots`, bool `[out]`.

    The pivots are chosen on an orthonormal basis of the columns, `left = Q R`: first by Gaussian elimination with row
    exchanges, then by exchanging a pivot for another row while that multiplies the volume `|det Q[pivots]|` by more
    than `bound` (maxvol: Goreinov et al., "How to find a good submatrix", 2010; a strong rank-revealing choice in the
    sense of Gu and Eisenstat, 1996). As `C = Q[others] Q[pivots]⁻¹` needs no inverse of `R`, a matrix of a lower rank
    than ρ does no harm.
    """
    if bound < 1:
        raise ValueError(f"pivot_form: bound must be at least 1, got {bound}")
    out, rank = left.shape
    if rank > out:
        raise ValueError(f"pivot_form: left must be [out, rank] with rank <= out, got {list(left.shape)}")
    Q, R = torch.linalg.qr(left.double())
    LU, exchanged = torch.linalg.lu_factor(Q)
    # Q = L U up to the order of rows, so that Q[others] Q[pivots]⁻¹ = L[others] L[pivots]⁻¹.
    C = torch.linalg.solve_triangular(LU[:rank], LU[rank:], upper=False, left=False, unitriangular=True)
    order = torch.tensor(_permutation(exchanged.tolist(), out), device=left.device)
    while C.numel():
        largest = int(C.abs().argmax())
        row, column = divmod(largest, rank)
        factor = C[row, column].clone()
        if not abs(float(factor)) > bound:
            break
        # The row becomes a pivot in the place of the column's: C changes by one of rank one.
        gain, old_row = C[:, column].clone(), C[row].clone()
        gain[row] += 1
        old_row[column] -= 1
        C -= torch.outer(gain / factor, old_row)
        order[[column, rank + row]] = order[[rank + row, column]]
    pivots = torch.zeros(out, dtype=torch.bool, device=left.device)
    pivots[order[:rank]] = True
    # In the order in which the outputs are, for both.
    by_pivot, by_other = order[:rank].argsort(), order[rank:].argsort()
    P = Q[order[:rank]][by_pivot] @ (R @ right.double())
    return P, C[by_other][:, by_pivot].contiguous(), pivots


def _permutation(exchanged: list[int], n: int) -> list[int]:
    """The order of rows that LAPACK's successive exchanges (1-based) lead to."""
    order = list(range(n))
    for i, j in enumerate(exchanged):
        order[i], order[j - 1] = order[j - 1], order[i]
    return order
