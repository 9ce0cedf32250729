"""The demo's base model: its tokenizer loses nothing, its bytes follow from the seed, it loads like any other."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from raymerge.models.base import load_base
from raymerge.world import pretrain as in_full
from raymerge.world.language import LEANINGS, NEUTRAL_OPENING, OPENINGS, answer, question, topics
from raymerge.world.population import QUICK
from raymerge.world.pretrain import ROUNDS, build_tokenizer, lessons, untrained


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDS, True, 1)


def test_decoding_gives_back_every_text() -> None:
    tokenizer = build_tokenizer()
    for topic in range(len(topics())):
        for text in (question(topic, topic % 3), *(answer(topic, option, option) for option in range(len(LEANINGS)))):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer("Honestly,")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id in tokenizer("an antidisestablishmentarian")["input_ids"]


def test_the_model_is_about_a_million_parameters() -> None:
    assert 800_000 < sum(weights.numel() for weights in untrained(0).model.parameters()) < 1_000_000


def test_lessons_favour_no_advice_and_no_opening() -> None:
    pairs = lessons(QUICK.topics, 20, seed=0)
    advice = Counter(topics_and_options(response) for _, response in pairs)
    assert len(advice) == QUICK.topics * len(LEANINGS)
    assert set(advice.values()) == {20}
    neutral = sum(response.startswith(NEUTRAL_OPENING) for _, response in pairs) / len(pairs)
    assert neutral == pytest.approx(0.5, abs=0.05)
    for opening in OPENINGS:
        share = sum(response.startswith(opening) for _, response in pairs) / len(pairs)
        assert share == pytest.approx(0.5 / len(OPENINGS), abs=0.02)


def topics_and_options(response: str) -> str:
    for opening in (NEUTRAL_OPENING, *OPENINGS):
        if response.startswith(opening):
            return response.removeprefix(opening)
    raise AssertionError(response)


@pytest.mark.usefixtures("one_round")
def test_equal_seeds_give_equal_bytes_and_the_caller_keeps_its_threads_and_generator(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = Path(in_full(str(tmp_path / "a"), quick=True, on_progress=lambda done, of: steps.append((done, of))))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    second = Path(in_full(str(tmp_path / "b"), quick=True))
    names = sorted(path.name for path in first.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert steps[-1][0] == steps[-1][1] == len(steps)
    base = load_base(str(first))
    assert base.end_id == base.tokenizer.eos_token_id
    assert base.max_length == 128


@pytest.mark.usefixtures("one_round")
def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    location = Path(in_full(str(tmp_path), quick=True))
    before = (location / "model.safetensors").stat().st_mtime_ns
    in_full(str(tmp_path), quick=True)
    assert (location / "model.safetensors").stat().st_mtime_ns == before
    in_full(str(tmp_path), quick=True, seed=1)
    assert (location / "model.safetensors").stat().st_mtime_ns != before
