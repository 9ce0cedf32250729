"""What answers for a persona: adapters, merges in memory and mixtures, at a factor or as they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raymerge.adapters import LoraAdapter, load_adapter, save_adapter
from raymerge.errors import ModelError
from raymerge.merging.merge import merge
from raymerge.models.multilora import MultiLora
from raymerge.runtime.experts import merge_to_folder
from raymerge.runtime.sources import Answerer, load_sources, source_digests
from raymerge.runtime.tasks import AnswerSource, MergeTask
from raymerge.runtime.workers import ModelWorker
from tests.runtime.conftest import merge_task, source

IDS = torch.arange(8, 20)[None]


def logits(worker: ModelWorker, adapters: tuple[LoraAdapter, ...], weights: dict[int, float]) -> Tensor:
    lora = MultiLora(worker.base.model)
    lora.load(adapters)
    row = torch.zeros(1, len(adapters))
    for number, weight in weights.items():
        row[0, number] = weight
    with torch.inference_mode(), lora.mixtures(row):
        found: Tensor = worker.base.model(IDS).logits
    lora.detach()
    return found


def load(worker: ModelWorker, *sources: AnswerSource, anchors: bool = True):  # type: ignore[no-untyped-def]
    resident, failed = load_sources(sources, worker.cache, worker.base.model, 6, anchors=anchors)
    assert failed == {}
    return resident


@pytest.mark.parametrize("kind", ["merge", "mixture"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_a_factor_is_a_merge_at_that_scale(
    kind: str, factor: float, worker: ModelWorker, saved: Callable[..., str], tmp_path: Path
) -> None:
    experts = [("a", saved("a", 1), 0.7), ("b", saved("b", 2, rank=2), 0.3)]
    for scale in (1.0, "match_norm"):
        task = merge_task("m", experts, tmp_path, scale=scale, rank="keep" if kind == "merge" else "exact")
        resident = load(worker, source("ada", kind, task))
        wanted = merge(
            [load_adapter(place) for _, place, _ in experts], [0.7, 0.3], rank=task.merges["rank"],
            scale=factor if scale == 1.0 else {"match_norm": factor},
        )  # fmt: skip
        found = logits(worker, resident.adapters, dict(resident.answerers["ada"].scaled(factor).weights))
        assert torch.allclose(found, logits(worker, (wanted,), {0: 1.0}), atol=1e-4)
        scaled = {p: replace(m, scaling=m.scaling * factor) for p, m in merge_of(task).modules.items()}
        assert torch.allclose(found, logits(worker, (replace(wanted, modules=scaled),), {0: 1.0}), atol=1e-4)


def merge_of(task: MergeTask) -> LoraAdapter:
    adapters = [load_adapter(e.location) for e in task.experts]
    return merge(adapters, [e.weight for e in task.experts], rank=task.merges["rank"], scale=task.merges["scale"])


@pytest.mark.parametrize("kind", ["merge", "mixture"])
@pytest.mark.parametrize("scale", [0.8, "match_norm"])
def test_from_an_anchor_a_factor_multiplies_what_is_beyond_it(
    kind: str, scale: object, worker: ModelWorker, saved: Callable[..., str], tmp_path: Path
) -> None:
    anchor = load_adapter(saved("start", 9))
    experts = [(n, saved(n, seed, started_from="adapters/start"), w) for n, seed, w in (("a", 1, 0.7), ("b", 2, 0.3))]
    task = merge_task("m", experts, tmp_path, scale=scale, rank="exact")
    resident = load(worker, source("ada", kind, task))
    for factor in (0.0, 0.5, 1.0, 1.7):
        wanted = anchor
        if factor:
            adapters = [load_adapter(place) for _, place, _ in experts]
            at = {"match_norm": factor} if scale == "match_norm" else 0.8 * factor
            wanted = merge(adapters, [0.7, 0.3], rank="exact", scale=at, anchor=anchor)
        found = logits(worker, resident.adapters, dict(resident.answerers["ada"].scaled(factor).weights))
        assert torch.allclose(found, logits(worker, (wanted,), {0: 1.0}), atol=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize("anchor", ["auto", "none", "adapters/start"])
@pytest.mark.parametrize("started", [True, False])
def test_an_adapter_at_a_factor_is_the_merge_that_it_becomes(
    factor: float, anchor: str, started: bool, worker: ModelWorker, saved: Callable[..., str], tmp_path: Path
) -> None:
    """What tuning answers with against the real merge of one expert at that scale, as a run writes it."""
    saved("start", 9)
    own = saved("own", 1, **({"started_from": "adapters/start"} if started else {}))
    asked = replace(source("ada", "adapter", own), anchor=anchor, workspace=str(tmp_path))
    resident = load(worker, asked)
    task = merge_task("m", [("own", own, 1.0)], tmp_path, scale=factor or 1.0, rank="exact", anchor=anchor)
    merge_to_folder(task, worker.cache)
    wanted = load_adapter(task.folder)
    anchored = anchor == "adapters/start" or (anchor == "auto" and started)
    if factor == 0.0:
        modules = load_adapter(str(tmp_path / "adapters" / "start")).modules
        wanted = replace(wanted, modules={p: replace(m, scaling=float(anchored)) for p, m in modules.items()})
    found = logits(worker, resident.adapters, dict(resident.answerers["ada"].scaled(factor).weights))
    assert torch.allclose(found, logits(worker, (wanted,), {0: 1.0}), atol=1e-4)
    assert len(resident.adapters) == 1 + anchored
    assert len(load(worker, asked, anchors=False).adapters) == 1


def test_what_an_adapter_is_measured_from_decides_only_where_it_is_scaled(
    saved: Callable[..., str], tmp_path: Path
) -> None:
    saved("start", 9)
    own = saved("own", 1, started_from="adapters/start")
    plain = source("ada", "adapter", own)
    asked = replace(plain, anchor="auto", workspace=str(tmp_path))
    before, alone = source_digests([asked], anchors=True), source_digests([asked])
    assert alone == source_digests([plain], anchors=True)
    assert before != alone
    saved("start", 10)
    assert source_digests([asked], anchors=True) != before
    assert source_digests([asked]) == alone
    missing = replace(asked, anchor="adapters/nowhere")
    assert source_digests([missing], anchors=True)[1].keys() == {"ada"}
    assert source_digests([missing])[1] == {}


def test_one_merge_serves_all_who_share_it(
    worker: ModelWorker, saved: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymerge.runtime import sources

    built: list[str] = []
    build = sources.build
    monkeypatch.setattr(sources, "build", lambda task, *rest: built.append(task.name) or build(task, *rest))
    place = saved("a", 1, started_from="adapters/start")
    saved("start", 9)
    task = merge_task("one", [("a", place, 1.0)], tmp_path, scale=1.3)
    same = replace(task, name="two", folder="/elsewhere")
    resident = load(worker, source("ada", "merge", task), source("bob", "merge", same), AnswerSource("cyd", "base"))
    assert built == ["one"]
    assert len(resident.adapters) == 2
    assert resident.answerers["ada"] == resident.answerers["bob"] == Answerer({0: 1.0}, anchor=1)
    assert resident.answerers["cyd"] == Answerer()
    assert len(load(worker, source("ada", "merge", task), anchors=False).adapters) == 1


def test_a_factor_leaves_the_base_and_refuses_a_prefix() -> None:
    assert Answerer().scaled(3.0) == Answerer()
    assert Answerer(prefix=0).scaled(1.0) == Answerer(prefix=0)
    with pytest.raises(ModelError, match=r"a prefix cannot be multiplied by 1\.4"):
        Answerer(prefix=0).scaled(1.4)


def test_what_cannot_be_had_fails_its_own_persona(
    worker: ModelWorker, saved: Callable[..., str], tmp_path: Path
) -> None:
    good = saved("a", 1)
    other_base = LoraAdapter("c", {p: replace(m, A=m.A[:, :5]) for p, m in load_adapter(good).modules.items()})
    save_adapter(other_base, str(tmp_path / "c"))
    sources = (
        source("ada", "adapter", good),
        source("bob", "adapter", str(tmp_path / "nowhere")),
        source("cyd", "adapter", str(tmp_path / "c")),
    )
    digests, failed = source_digests(sources)
    assert failed.keys() == {"bob"}
    assert digests["bob"] is None
    assert digests["ada"] != digests["cyd"]
    resident, unread = load_sources(sources, worker.cache, worker.base.model, 6)
    assert unread.keys() == {"bob", "cyd"}
    assert "the model's is" in unread["cyd"]
    assert resident.answerers == {"ada": Answerer({0: 1.0})}
