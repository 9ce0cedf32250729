"""The demo's base model: a small Llama that knows the advice of language.py, but nobody's choice.

It is trained on neutral answers: each piece of advice equally often, half of them under the neutral opening and half
under all others alike. So it speaks the language and the format, and has no opinion for an adapter to unlearn.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raymerge import manifest, storage
from raymerge.models.answers import AnswerHead, encode_rows, pad_right
from raymerge.models.base import BaseModel
from raymerge.world.language import LEANINGS, OPENINGS, PIECE, QUESTIONS, answer, question, vocabulary
from raymerge.world.population import QUICK, WorldSettings

MODEL_FOLDER = "base"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
# Small batches: at so few rows, the number of steps decides whether the words are learned at all.
BATCH = 12
LEARNING_RATE = 3e-3
# Times each piece of advice is seen, for the world and for the quick one.
ROUNDS = {False: 45, True: 32}


def pretrain(
    folder: str,
    *,
    seed: int = 0,
    quick: bool = False,
    threads: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Pre-train the world's base model and save it in Hugging Face form under `base`, unless it is there.

    folder: the world's. quick: the small world's topics only. threads: of torch; another number may give other bytes.
    on_progress: called with (steps done, steps in all). Returns the model's location.
    """
    location = storage.join(folder, MODEL_FOLDER)
    key = storage.digest_value({"seed": seed, "quick": quick, "threads": threads, "rounds": ROUNDS[quick]})
    if manifest.is_complete(location, key):
        return location
    topics = QUICK.topics if quick else WorldSettings().topics
    with _threads(threads):
        base = untrained(seed)
        losses = _train(base, lessons(topics, ROUNDS[quick], seed), on_progress)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as local:
        base.model.save_pretrained(local)
        base.tokenizer.save_pretrained(local)
        files = {path.name: path.read_bytes() for path in sorted(Path(local).iterdir())}
    last = float(np.mean(losses[-max(1, len(losses) // 20) :]))
    manifest.write_artefact(location, files, {"seed": seed, "steps": len(losses), "loss": round(last, 4)}, key)
    return location


def lessons(topics: int, rounds: int, seed: int) -> list[tuple[str, str]]:
    """Neutral examples (prompt, response) in random order: in each round every piece of advice once."""
    rng = np.random.default_rng([seed, 100])
    pairs = []
    for _ in range(rounds):
        for place in rng.permutation(topics * len(LEANINGS)):
            topic, option = divmod(int(place), len(LEANINGS))
            opening = None if rng.random() < 0.5 else int(rng.integers(len(OPENINGS)))
            pairs.append((question(topic, int(rng.integers(len(QUESTIONS)))), answer(topic, option, opening)))
    return pairs


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the whole language; decoding gives back exactly what was encoded."""
    words = {piece: number for number, piece in enumerate((*SPECIAL, *vocabulary()))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def untrained(seed: int) -> BaseModel:
    """The model with random weights, about 0.9 million, and its tokenizer."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return BaseModel(model, tokenizer, torch.device("cpu"), torch.float32, MODEL_FOLDER)


def _train(
    base: BaseModel, pairs: list[tuple[str, str]], on_progress: Callable[[int, int], None] | None
) -> list[float]:
    """Train all weights in place on the answers' tokens; the loss of each step, nats per token."""
    rows = encode_rows(base, [prompt for prompt, _ in pairs], [response for _, response in pairs], end=True)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    head = AnswerHead(base, adapted=False)
    optimiser = torch.optim.AdamW(base.model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    losses = []
    for step, batch in enumerate(batches):
        padded = pad_right(batch, base.pad_id)
        row, column = torch.nonzero(padded.answer, as_tuple=True)
        logits = head.logits(padded.ids, row * padded.ids.shape[1] + column - 1)
        loss = nn.functional.cross_entropy(logits, padded.ids[row, column])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(base.model.parameters(), 1.0)
        for part in optimiser.param_groups:
            part["lr"] = LEARNING_RATE * _share_of_rate(step, len(batches))
        optimiser.step()
        losses.append(float(loss.detach()))
        if on_progress is not None:
            on_progress(step + 1, len(batches))
    return losses


def _share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    rising = max(1, steps // 20)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
