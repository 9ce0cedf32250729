"""Inner products of whole adapters' deltas, from r x r products and never from a delta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.factors import inner

Precision = Literal["float64", "float32", "bfloat16"]

_BLOCK = 512  # rows of factors multiplied at a time: a block of products stays in the cache
_CONVERTED = 512 * 2**20  # bytes of one module's factors of all adapters, up to which they are converted at once
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
    rounded to it first, which is not counted; over the entries of a module such errors cancel.
    Raises MergeError if a module's shape differs between adapters.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    headers = [adapter.headers for adapter in adapters]
    for path in sorted({path for own in headers for path in own}):
        owners = [i for i, own in enumerate(headers) if path in own]
        _check_shapes(path, [adapters[i] for i in owners])
        biases: dict[int, Tensor] = {}
        stacked = _stack(
            [headers[i][path].rank for i in owners],
            _noting(biases, (adapters[i].modules[path] for i in owners)),
        )
        scalings = [headers[i][path].scaling for i in owners]
        products = _products(stacked, [headers[i][path].rank for i in owners], precision)
        if biases:
            held = torch.tensor(sorted(biases))
            rows = torch.stack([biases[i].double().cpu() for i in sorted(biases)])
            products[held[:, None], held] += rows @ rows.T
        where = torch.tensor(owners)
        total[where[:, None], where] += _scaled(products, scalings)
    return total


def gram_module(modules: Sequence[LoraModule], precision: Precision = "float64") -> Tensor:
    """Frobenius inner products of deltas of one shape, without biases: float64 (N, N)."""
    ranks = [module.rank for module in modules]
    return _scaled(_products(_stack(ranks, modules), ranks, precision), [module.scaling for module in modules])


def similarities(products: Tensor) -> Tensor:
    """Cosines of deltas from their inner products: (N, N), exactly 1 on the diagonal. A zero delta has cosine 0 to all
    others and to itself."""
    norms = products.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = (products * inverse.outer(inverse)).clamp(-1, 1)
    return cosines.diagonal_scatter((norms > 0).to(cosines.dtype))


def squared_norm_of(module: LoraModule) -> float:
    """Squared Frobenius norm of a delta."""
    return module.scaling**2 * max(inner(module.B, module.A, module.B, module.A), 0.0)


def inner_of(module: LoraModule, other: LoraModule) -> float:
    """Frobenius inner product of two deltas of one shape."""
    return module.scaling * other.scaling * inner(module.B, module.A, other.B, other.A)


def _stack(ranks: Sequence[int], modules: Iterable[LoraModule]) -> _Stack:
    """Put factors side by side as they are read, so that no module need be kept."""
    rows = A = torch.empty(0)
    start = 0
    for rank, module in zip(ranks, modules, strict=True):
        if start == 0:
            rows = module.B.new_empty(sum(ranks), module.out_features)
            A = module.A.new_empty(sum(ranks), module.in_features)
        rows = _widened(rows, module.B.dtype)
        A = _widened(A, module.A.dtype)
        rows[start : start + rank] = module.B.detach().T
        A[start : start + rank] = module.A.detach()
        start += rank
    return _Stack(rows, A)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(torch.promote_types(tensor.dtype, dtype))


def _noting(biases: dict[int, Tensor], modules: Iterable[LoraModule]) -> Iterator[LoraModule]:
    for index, module in enumerate(modules):
        if module.bias is not None:
            biases[index] = module.bias.detach()
        yield module


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


def _scaled(products: Tensor, scalings: Sequence[float]) -> Tensor:
    factors = torch.tensor(scalings, dtype=torch.float64)
    return products * factors[:, None] * factors


def _check_shapes(path: str, adapters: Sequence[LoraAdapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        if adapter.headers[path].shape != first.headers[path].shape:
            raise MergeError(
                f"{adapter.name}: {path} has shape {adapter.headers[path].shape}, but "
                f"{first.headers[path].shape} in {first.name}.\n"
                "Shapes are (out_features, in_features). They were trained on different base models."
            )
