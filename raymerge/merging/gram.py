"""Inner products of whole adapters' deltas, from r x r products and never from a delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.merging.factors import inner, is_identity
from raymerge.merging.shapes import check_shapes

Precision = Literal["float64", "float32", "bfloat16"]

_BLOCK = 512  # rows of factors multiplied at a time: a block of products stays in the cache
_CONVERTED = 512 * 2**20  # bytes of one module's factors of all adapters, up to which they are converted at once
_HELD = 256 * 2**20  # bytes of dense deltas in memory at a time, from which on modules are read again
_DENSE = 128  # ranks below which a module of full rank is no burden
_COSINE = 1e-4  # what products in bfloat16 may move a cosine
_ROUNDING = 6 * 2.0**-8 * (2 / 3) ** 0.5  # six standard errors of a product of two numbers rounded to bfloat16
_DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


_Read = Callable[[], Iterable[LoraModule | None]]


class _Stack(NamedTuple):
    """The factors of one module side by side, scalings left out: rows, the columns of all B (K, out), and A (K, in),
    in the widest dtype they are stored in."""

    rows: Tensor
    A: Tensor


def gram(adapters: Sequence[LoraAdapter], precision: Precision = "float64") -> Tensor:
    """Frobenius inner products of adapters' deltas, summed over modules: float64 (N, N).

    A module that an adapter lacks is a zero delta; trained biases count with their modules, whole tensors are no deltas
    and do not. Each module is read once, and the factors of one module of all adapters are in memory at a time. Dense
    deltas (DoRA's) are in memory as far as they fit, and read again for each lot of them that does not.

    precision: of the products of factors; modules are summed in float64. float32 gives cosines to about 1e-5. bfloat16
    is for factors stored so, and for processors that multiply it (AVX512_BF16, AMX, GPUs): norms are in float32, and so
    are blocks in which rounding could move a cosine by more than 1e-4 (six standard errors). Factors that are wider are
    rounded to it first, which is not counted; over the entries of a module such errors cancel. Dense deltas are
    multiplied in float32 then. Raises MergeError if a module's shape differs between adapters, or it is an embedding in
    some only.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    headers = [adapter.headers for adapter in adapters]
    for path in sorted({path for own in headers for path in own}):
        owners = [i for i, own in enumerate(headers) if path in own]
        check_shapes(path, ((adapters[i].name, headers[i][path]) for i in owners))
        own = [headers[i][path] for i in owners]

        def read(path: str = path, owners: Sequence[int] = owners) -> Iterator[LoraModule]:
            return (adapters[i].modules[path] for i in owners)

        where = torch.tensor(owners)
        total[where[:, None], where] += _all_products(
            own[0].shape, [header.rank for header in own], read, precision, biases=True
        )
    return total


def gram_module(shape: tuple[int, int], ranks: Sequence[int], read: _Read) -> Tensor:
    """Frobenius inner products of deltas of one shape, without biases: float64 (N, N).

    ranks: of the modules. read: them one after the other, anew at each call, None where a delta is zero. Factors are
    put side by side as they come, so that no module need be kept.
    """
    return _all_products(shape, ranks, read, "float64", biases=False)


def similarities(products: Tensor) -> Tensor:
    """Cosines of deltas from their inner products: (N, N), exactly 1 on the diagonal. A zero delta has cosine 0 to all
    others and to itself."""
    norms = products.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = (products * inverse.outer(inverse)).clamp(-1, 1)
    return cosines.diagonal_scatter((norms > 0).to(cosines.dtype))


def squared_norm_of(module: LoraModule) -> float:
    """Squared Frobenius norm of a delta, without its bias."""
    if _is_dense(module.shape, module.rank):
        return module.scaling**2 * float(_dense(module).double().square().sum())
    return module.scaling**2 * max(inner(module.B, module.A, module.B, module.A), 0.0)


def inner_of(module: LoraModule, other: LoraModule) -> float:
    """Frobenius inner product of two deltas of one shape."""
    return module.scaling * other.scaling * inner(module.B, module.A, other.B, other.A)


def _is_dense(shape: tuple[int, int], rank: int) -> bool:
    """Whether factors are more than what they make: DoRA's deltas and whole tensors are products with an identity."""
    return rank >= max(min(shape), _DENSE)


def _dense(module: LoraModule) -> Tensor:
    """The delta of such a module, unscaled: (out_features, in_features)."""
    A, B = module.A.detach(), module.B.detach()
    if is_identity(B):
        return A
    if is_identity(A):
        return B
    return B.double() @ A.double()


@dataclass
class _Gathered:
    """One module of several adapters, by their positions. Those in factors are stacked, dense ones are not.

    scalings: 0 where one lacks it. low: positions and ranks of those in factors. dense: of the first dense deltas, as
    many as fit, and last the position of the last of all. biases. All unscaled.
    """

    scalings: Tensor
    stacked: _Stack
    low: dict[int, int] = field(default_factory=dict)
    dense: dict[int, Tensor] = field(default_factory=dict)
    biases: dict[int, Tensor] = field(default_factory=dict)
    last: int = -1


def _gather(
    shape: tuple[int, int], ranks: Sequence[int], modules: Iterable[LoraModule | None], precision: Precision
) -> _Gathered:
    """Put factors side by side as they are read, so that no module need be kept."""
    count = sum(rank for rank in ranks if not _is_dense(shape, rank))
    at_once = precision == "float64" and count * sum(shape) * torch.float64.itemsize <= _CONVERTED
    found = _Gathered(torch.zeros(len(ranks), dtype=torch.float64), _Stack(torch.empty(0), torch.empty(0)))
    rows, A = found.stacked
    start = 0
    for i, module in enumerate(modules):
        if module is None:
            continue
        found.scalings[i] = module.scaling
        if module.bias is not None:
            found.biases[i] = module.bias.detach()
        if _is_dense(shape, module.rank):
            found.last = i
            if _room(found.dense):
                found.dense[i] = _dense(module)
            continue
        if not found.low:
            wide = (torch.float64,) * 2 if at_once else (module.B.dtype, module.A.dtype)
            rows = module.B.new_empty(count, shape[0], dtype=wide[0])
            A = module.A.new_empty(count, shape[1], dtype=wide[1])
        else:
            rows, A = _widened(rows, module.B.dtype), _widened(A, module.A.dtype)
        found.low[i] = module.rank
        rows[start : start + module.rank] = module.B.detach().T
        A[start : start + module.rank] = module.A.detach()
        start += module.rank
    found.stacked = _Stack(rows[:start], A[:start])
    return found


def _room(deltas: Mapping[int, Tensor]) -> bool:
    return sum(delta.nbytes for delta in deltas.values()) < _HELD


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(torch.promote_types(tensor.dtype, dtype))


def _all_products(
    shape: tuple[int, int], ranks: Sequence[int], read: _Read, precision: Precision, *, biases: bool
) -> Tensor:
    """Inner products of deltas, however they are written: float64 (N, N)."""
    gathered = _gather(shape, ranks, read(), precision)
    products = torch.zeros(len(ranks), len(ranks), dtype=torch.float64)
    if gathered.low:
        low = torch.tensor(list(gathered.low))
        products[low[:, None], low] = _products(gathered.stacked, list(gathered.low.values()), precision)
    if gathered.dense:
        _add_dense(products, gathered, read, torch.float64 if precision == "float64" else torch.float32)
    if biases and gathered.biases:
        held = torch.tensor(list(gathered.biases))
        rows = torch.stack([bias.double().cpu() for bias in gathered.biases.values()])
        products[held[:, None], held] += rows @ rows.T
    return products * gathered.scalings[:, None] * gathered.scalings


def _add_dense(products: Tensor, gathered: _Gathered, read: _Read, dtype: torch.dtype) -> None:
    """Products with dense deltas: of each other entry by entry, and of factors as B^T D A^T. Each lot that is in memory
    is multiplied by itself, and by all that come after it."""
    low = torch.tensor(list(gathered.low), dtype=torch.long)
    ranks = torch.tensor(list(gathered.low.values()), dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(ranks)), ranks)
    rows, A = (side.to(dtype) for side in gathered.stacked)
    lot = gathered.dense
    gathered.dense = {}
    while lot:
        for i, delta in lot.items():
            D = delta.to(dtype)
            if len(low):
                terms = (rows * (A @ D.T)).sum(1).double().cpu()
                products[i, low] = products[low, i] = torch.zeros(len(low)).double().index_add(0, owner, terms)
            _add_entrywise(products, i, D, {j: other for j, other in lot.items() if j <= i})
        newest = max(lot)
        following: dict[int, Tensor] = {}
        for i, module in enumerate(read()) if newest < gathered.last else ():
            if i > newest and module is not None and _is_dense(module.shape, module.rank):
                delta = _dense(module)
                _add_entrywise(products, i, delta.to(dtype), lot)
                if _room(following):
                    following[i] = delta
        lot = following


def _add_entrywise(products: Tensor, i: int, D: Tensor, others: Mapping[int, Tensor]) -> None:
    for j, other in others.items():
        products[i, j] = products[j, i] = (D * other.to(D.dtype)).sum(dtype=torch.float64).item()


def _products(stacked: _Stack, ranks: Sequence[int], precision: Precision) -> Tensor:
    """Inner products of the unscaled deltas: float64 (N, N). Only the blocks up to the diagonal are multiplied."""
    dtype = _DTYPES[precision]
    if (stacked.rows.numel() + stacked.A.numel()) * dtype.itemsize <= _CONVERTED:
        stacked = _Stack(stacked.rows.to(dtype), stacked.A.to(dtype))
    squares = _squares(stacked, ranks) if precision == "bfloat16" else None
    products = torch.zeros(len(ranks), len(ranks), dtype=torch.float64)
    spans = list(_spans(ranks))
    owners = [_owners(ranks[span.first : span.last], dtype, stacked.A.device) for span in spans]
    for index, span in enumerate(spans):
        left = _rows(stacked, span, dtype)
        for other, owner in zip(spans[: index + 1], owners, strict=False):
            right = _rows(stacked, other, dtype)
            terms = _terms(left, right)
            block = owners[index].T @ terms @ owner
            if squares is not None:
                allowed = (squares[span.first : span.last, None] * squares[other.first : other.last]).sqrt()
                moved = _ROUNDING * (owners[index].T @ terms.square_() @ owner).sqrt()
                if ((moved.fill_diagonal_(0) if other is span else moved) > _COSINE * allowed).any():
                    block = owners[index].T @ _terms(_float(left), _float(right)) @ owner
            products[span.first : span.last, other.first : other.last] = block.double().cpu()
    products = products.tril() + products.tril(-1).T  # blocks on the diagonal are whole
    if squares is not None:
        products.diagonal().copy_(squares)
    return products


def _squares(stacked: _Stack, ranks: Sequence[int]) -> Tensor:
    """Squared norms of the unscaled deltas, in float32: (N,)."""
    sides = zip(torch.split(stacked.rows, list(ranks)), torch.split(stacked.A, list(ranks)), strict=True)
    pairs = (_float(_Stack(*side)) for side in sides)
    return torch.stack([((rows @ rows.T) * (A @ A.T)).sum() for rows, A in pairs]).clamp(min=0)


def _rows(stacked: _Stack, span: _Span, dtype: torch.dtype) -> _Stack:
    return _Stack(*(side[span.start : span.stop].to(dtype) for side in stacked))


def _float(stacked: _Stack) -> _Stack:
    return _Stack(stacked.rows.float(), stacked.A.float())


def _terms(left: _Stack, right: _Stack) -> Tensor:
    """Products of rows times products of A, whose sums over an adapter's ranks are inner products: (K, K')."""
    return _multiplied(left.rows, right.rows).mul_(_multiplied(left.A, right.A))


def _multiplied(X: Tensor, Y: Tensor) -> Tensor:
    """X Y^T, in float32 or wider."""
    on_cpu = X.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if on_cpu and X.dtype == torch.float32:
        # The library behind `@` leaves half of an AMD processor's float32 units idle; the one behind this does not.
        return torch.nn.functional.linear(X.to_mkldnn(), Y).to_dense()
    return _widened(X @ Y.T, torch.float32)


class _Span(NamedTuple):
    """Adapters first to last, and the rows start to stop that are theirs."""

    first: int
    last: int
    start: int
    stop: int


def _spans(ranks: Sequence[int]) -> Iterator[_Span]:
    first = start = stop = 0
    for index, rank in enumerate(ranks):
        if stop > start and stop + rank - start > _BLOCK:
            yield _Span(first, index, start, stop)
            first, start = index, stop
        stop += rank
    if first < len(ranks):
        yield _Span(first, len(ranks), start, stop)


def _owners(ranks: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Which rows are whose: (K, N), ones and zeros."""
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    chosen = torch.nn.functional.one_hot(owner, len(ranks))
    return chosen.to(device, torch.promote_types(dtype, torch.float32))
