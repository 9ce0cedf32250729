"""Inner products of whole adapters' deltas, from r x r products and never from a delta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule, ModuleHeader
from raymerge.errors import MergeError
from raymerge.merging.factors import inner

Precision = Literal["float64", "float32", "bfloat16"]

_BLOCK = 512  # rows of factors multiplied at a time: a block of products stays in the cache
_CONVERTED = 512 * 2**20  # bytes of one module's factors of all adapters, up to which they are converted at once
_DENSE = 128  # ranks below which a module of full rank is no burden
_COSINE = 1e-4  # what products in bfloat16 may move a cosine
_ROUNDING = 6 * 2.0**-8 * (2 / 3) ** 0.5  # six standard errors of a product of two numbers rounded to bfloat16
_DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


class _Stack(NamedTuple):
    """The factors of one module side by side, scalings left out: rows, the columns of all B (K, out), and A (K, in),
    in the widest dtype they are stored in."""

    rows: Tensor
    A: Tensor


def gram(adapters: Sequence[LoraAdapter], precision: Precision = "float64") -> Tensor:
    """Frobenius inner products of adapters' deltas, summed over modules: float64 (N, N).

    A module that an adapter lacks is a zero delta; trained biases count with their modules, whole tensors are no deltas
    and do not. Each module is read once, and one module of all adapters is in memory at a time, in its own dtype.

    precision: of the products of factors; modules are summed in float64. float32 gives cosines to about 1e-5. bfloat16
    is for factors stored so, and for processors that multiply it (AVX512_BF16, AMX, GPUs): norms are in float32, and so
    are blocks in which rounding could move a cosine by more than 1e-4 (six standard errors). Factors that are wider are
    rounded to it first, which is not counted; over the entries of a module such errors cancel. Dense deltas (DoRA's)
    are multiplied in float32 then. Raises MergeError if a module's shape differs between adapters.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    headers = [adapter.headers for adapter in adapters]
    for path in sorted({path for own in headers for path in own}):
        owners = [i for i, own in enumerate(headers) if path in own]
        _check_shapes(path, [adapters[i] for i in owners])
        read = (adapters[i].modules[path] for i in owners)
        gathered = _gather([headers[i][path] for i in owners], read)
        where = torch.tensor(owners)
        total[where[:, None], where] += _all_products(gathered, precision, biases=True)
    return total


def gram_module(modules: Sequence[LoraModule], precision: Precision = "float64") -> Tensor:
    """Frobenius inner products of deltas of one shape, without biases: float64 (N, N)."""
    return _all_products(_gather([module.header for module in modules], modules), precision, biases=False)


def similarities(products: Tensor) -> Tensor:
    """Cosines of deltas from their inner products: (N, N), exactly 1 on the diagonal. A zero delta has cosine 0 to all
    others and to itself."""
    norms = products.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = (products * inverse.outer(inverse)).clamp(-1, 1)
    return cosines.diagonal_scatter((norms > 0).to(cosines.dtype))


def squared_norm_of(module: LoraModule) -> float:
    """Squared Frobenius norm of a delta, without its bias."""
    if _is_dense(module):
        return module.scaling**2 * float(_dense(module).double().square().sum())
    return module.scaling**2 * max(inner(module.B, module.A, module.B, module.A), 0.0)


def inner_of(module: LoraModule, other: LoraModule) -> float:
    """Frobenius inner product of two deltas of one shape."""
    return module.scaling * other.scaling * inner(module.B, module.A, other.B, other.A)


def _is_dense(module: LoraModule | ModuleHeader) -> bool:
    """Whether factors are more than what they make: DoRA's deltas and whole tensors are products with an identity."""
    return module.rank >= max(min(module.shape), _DENSE)


def _dense(module: LoraModule) -> Tensor:
    """The delta of such a module, unscaled: (out_features, in_features)."""
    A, B = module.A.detach(), module.B.detach()
    if B.shape[0] == B.shape[1] and torch.equal(B, torch.eye(len(B), dtype=B.dtype, device=B.device)):
        return A
    if A.shape[0] == A.shape[1] and torch.equal(A, torch.eye(len(A), dtype=A.dtype, device=A.device)):
        return B
    return B.double() @ A.double()


@dataclass
class _Gathered:
    """One module of several adapters. Those in factors are stacked, dense ones are not. low: positions and ranks of
    the former. dense, biases: tensors by position, unscaled."""

    scalings: Sequence[float]
    low: Mapping[int, int]
    stacked: _Stack
    dense: dict[int, Tensor]
    biases: dict[int, Tensor]


def _gather(headers: Sequence[ModuleHeader], modules: Iterable[LoraModule]) -> _Gathered:
    """Put factors side by side as they are read, so that no module need be kept."""
    low = {i: header.rank for i, header in enumerate(headers) if not _is_dense(header)}
    found = _Gathered([header.scaling for header in headers], low, _Stack(torch.empty(0), torch.empty(0)), {}, {})
    start = 0
    for i, module in enumerate(modules):
        if module.bias is not None:
            found.biases[i] = module.bias.detach()
        if i not in low:
            found.dense[i] = _dense(module)
            continue
        if start == 0:
            count = sum(low.values())
            rows, A = module.B.new_empty(count, module.out_features), module.A.new_empty(count, module.in_features)
        else:
            rows, A = _widened(found.stacked.rows, module.B.dtype), _widened(found.stacked.A, module.A.dtype)
        rows[start : start + low[i]] = module.B.detach().T
        A[start : start + low[i]] = module.A.detach()
        found.stacked = _Stack(rows, A)
        start += low[i]
    return found


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(torch.promote_types(tensor.dtype, dtype))


def _all_products(gathered: _Gathered, precision: Precision, *, biases: bool) -> Tensor:
    """Inner products of deltas, however they are written: float64 (N, N)."""
    count = len(gathered.scalings)
    products = torch.zeros(count, count, dtype=torch.float64)
    if gathered.low:
        low = torch.tensor(list(gathered.low))
        products[low[:, None], low] = _products(gathered.stacked, list(gathered.low.values()), precision)
    if gathered.dense:
        _add_dense(products, gathered, torch.float64 if precision == "float64" else torch.float32)
    if biases and gathered.biases:
        held = torch.tensor(list(gathered.biases))
        rows = torch.stack([bias.double().cpu() for bias in gathered.biases.values()])
        products[held[:, None], held] += rows @ rows.T
    scalings = torch.tensor(gathered.scalings, dtype=torch.float64)
    return products * scalings[:, None] * scalings


def _add_dense(products: Tensor, gathered: _Gathered, dtype: torch.dtype) -> None:
    """Products with dense deltas: of each other entry by entry, and of factors as B^T D A^T."""
    low = torch.tensor(list(gathered.low), dtype=torch.long)
    ranks = torch.tensor(list(gathered.low.values()), dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(ranks)), ranks)
    rows, A = (side.to(dtype) for side in gathered.stacked)
    for i, delta in gathered.dense.items():
        D = delta.to(dtype)
        if len(low):
            terms = (rows * (A @ D.T)).sum(1).double().cpu()
            products[i, low] = products[low, i] = torch.zeros(len(low)).double().index_add(0, owner, terms)
        for j, other in gathered.dense.items():
            if j <= i:
                products[i, j] = products[j, i] = (D * other.to(dtype)).sum(dtype=torch.float64).item()


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


def _check_shapes(path: str, adapters: Sequence[LoraAdapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        if adapter.headers[path].shape != first.headers[path].shape:
            raise MergeError(
                f"{adapter.name}: {path} has shape {adapter.headers[path].shape}, but "
                f"{first.headers[path].shape} in {first.name}.\n"
                "Shapes are (out_features, in_features). They were trained on different base models."
            )
