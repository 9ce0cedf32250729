"""Prompts and answers as tokens, and the logits of answer tokens alone.

Prompt and answer are tokenised apart, in training, scoring and generation alike: what the model is trained to
continue is exactly what it is later asked to continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import ModelError
from raymerge.models.base import BaseModel


@dataclass(frozen=True)
class TokenRow:
    """A prompt and its answer as token ids; neither is empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class TokenBatch:
    """Rows side by side, padded on the right.

    ids: int64 (rows, width).
    answer: bool (rows, width), true at each answer token.
    """

    ids: Tensor
    answer: Tensor


def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts, with the tokenizer's own opening token unless the text brings it along."""
    tokenizer = base.tokenizer
    opening = tokenizer.bos_token
    brings = [bool(opening) and text.startswith(opening) for text in prompts]
    plain = _tokenise(tokenizer, [t for t, b in zip(prompts, brings, strict=True) if not b], special=True)
    given = _tokenise(tokenizer, [t for t, b in zip(prompts, brings, strict=True) if b], special=False)
    sources = {False: iter(plain), True: iter(given)}
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else base.pad_id
    return [next(sources[b]) or [int(start)] for b in brings]


def encode_rows(
    base: BaseModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    end: bool,
    limit: int | None = None,
    truncate: bool = True,
) -> list[TokenRow]:
    """Prompts with their answers as tokens.

    end: whether the answer closes with the model's end token.
    limit: most tokens a row may have; None is what the model knows. A longer row loses the start of its prompt
        (the opening token stays), then the end of its answer, unless `truncate` is False.
    Raises ModelError if an answer has no token of its own.
    """
    if limit is None:
        limit = base.max_length
    heads = encode_prompts(base, prompts)
    tails = _tokenise(base.tokenizer, answers, special=False)
    closing = [base.end_id] if end and base.end_id is not None else []
    rows = []
    for number, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        if not tail:
            raise ModelError(f"row {number}: the answer {answers[number]!r} has no token.\nAnswers must not be empty.")
        rows.append(_fitted(head, [*tail, *closing], limit if truncate else None))
    return rows


def keep_end(tokens: list[int], room: int) -> list[int]:
    """A prompt cut from the left to `room` tokens, its opening token kept."""
    if len(tokens) <= room:
        return tokens
    return tokens[:1] if room <= 1 else [tokens[0], *tokens[len(tokens) - room + 1 :]]


def _fitted(prompt: list[int], answer: list[int], limit: int | None) -> TokenRow:
    if limit is not None:
        prompt = keep_end(prompt, max(1, limit - len(answer)))
        answer = answer[: max(1, limit - len(prompt))]
    return TokenRow(tuple(prompt), tuple(answer))


def _tokenise(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]]


def pad_right(rows: Sequence[TokenRow], pad_id: int) -> TokenBatch:
    """Rows side by side on the CPU; a causal model's real tokens never see what stands right of them."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    answer = torch.zeros((len(rows), width), dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row.prompt + row.answer)
        answer[number, len(row.prompt) : len(row)] = True
    return TokenBatch(ids, answer)


class AnswerHead:
    """Logits of the tokens that predict an answer, without those of prompt and padding where the model allows it.

    Most causal LMs are a decoder and a linear head, and then the head need only see the chosen places. Some scale or
    cap their logits; whether this one does is tried once, on a few tokens, and if so all places are computed.
    """

    def __init__(self, base: BaseModel, *, adapted: bool = False) -> None:
        """adapted: whether an adapter acts on the head, which then needs its rows in the batch's form."""
        self.model = base.model
        self.decoder: Any = getattr(base.model, base.model.base_model_prefix, None)
        self.head: Any = base.model.get_output_embeddings()
        self.split = not adapted and self._is_decoder_and_head(base)

    @torch.no_grad()
    def _is_decoder_and_head(self, base: BaseModel) -> bool:
        if self.decoder is None or self.decoder is self.model or self.head is None:
            return False
        ids = torch.arange(1, 5, device=base.device)[None]  # any tokens; padding may be embedded as zero
        whole = self.model(input_ids=ids, use_cache=False).logits.float()
        apart = self.head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state).to(whole.device).float()
        return whole.shape == apart.shape and bool((whole - apart).norm() < 1e-3 * whole.norm())

    def logits(self, ids: Tensor, places: Tensor) -> Tensor:
        """Logits at chosen places.

        ids: int64 (rows, width), padded on the right. places: int64 (n,), flat indices row * width + column.
        Returns float32 (n, vocabulary), where the ids are: a model on several GPUs ends on another than it begins.
        """
        if self.split:
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            chosen: Tensor = self.head(hidden.flatten(0, 1).index_select(0, places.to(hidden.device)))
        else:
            whole = self.model(input_ids=ids, use_cache=False).logits
            chosen = whole.flatten(0, 1).index_select(0, places.to(whole.device))
        return chosen.to(ids.device).float()
