"""Where a merge needs the base: DoRA and whole tensors; elsewhere the base is neither read nor part of a key."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge import LoraAdapter, LoraModule, load_adapter, merge, save_adapter
from raymerge.adapters import read_adapter
from raymerge.adapters.base_weights import BaseWeights
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import AdapterError, UnsupportedAdapterError
from raymerge.manifest import is_complete, read_manifest
from raymerge.runtime import experts
from raymerge.runtime.bases import base_digest, describe
from raymerge.runtime.embedding import sketch_to_folder
from raymerge.runtime.experts import ExpertCache, find_inputs, merge_to_folder
from raymerge.runtime.tasks import ExpertRef, MergeTask, SketchTask

PATH, HEAD = "layers.0.q_proj", "lm_head.weight"
MERGES = {
    "method": "linear", "method_parameters": {}, "scale": "match_norm", "rank": "keep", "anchor": "auto", "dtype": None,
}  # fmt: skip


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save_base(folder, seed=0):
    folder.mkdir(exist_ok=True)
    save_file(
        {f"{PATH}.weight": random(6, 5, seed=seed), HEAD: random(7, 5, seed=seed + 1)}, folder / "model.safetensors"
    )
    return str(folder)


def save_plain(folder, seed, **more):
    module = LoraModule(random(2, 5, seed=seed), random(6, 2, seed=seed + 1), 2.0)
    save_adapter(LoraAdapter(folder.name, {PATH: module}, **more), str(folder))
    return folder


def save_dora(folder, seed):
    save_plain(folder, seed)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    save_file({**tensors, f"base_model.model.{PATH}.lora_magnitude_vector": 1 + torch.rand(6)}, weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    return folder


def save_whole(folder, seed):
    return save_plain(folder, seed, whole={HEAD: random(7, 5, seed=seed + 2)}, modules_to_save=("lm_head",))


KINDS = {"plain": save_plain, "dora": save_dora, "whole": save_whole}


def task_of(tmp_path, kind, base="base", **merges):
    refs = tuple(ExpertRef(n, str(KINDS[kind](tmp_path / n, seed)), 0.5) for n, seed in (("a", 10), ("b", 20)))
    where = save_base(tmp_path / "base") if base == "base" else base
    return MergeTask("m", str(tmp_path / "m"), refs, {**MERGES, **merges}, str(tmp_path), where)


def read(task):
    base = BaseWeights(task.base)
    return [read_adapter(e.location, e.name, base=base) for e in task.experts]


@pytest.mark.parametrize("kind", ["dora", "whole"])
@pytest.mark.parametrize("limit", [0, 10**6], ids=["module by module", "kept"])
def test_the_result_is_that_of_a_merge_on_the_base(tmp_path, kind, limit):
    task = task_of(tmp_path, kind)
    assert merge_to_folder(task, ExpertCache(limit))["skipped"] is False
    expected = merge(read(task), [0.5, 0.5], scale="match_norm", base=BaseWeights(task.base), name="m")
    found = load_adapter(task.folder)
    torch.testing.assert_close(found.modules[PATH].delta(), expected.modules[PATH].delta())
    assert found.headers[PATH].rank == 2  # what the experts were trained at, though their deltas have full rank
    assert found.whole.keys() == expected.whole.keys()
    for name, tensor in expected.whole.items():
        assert torch.equal(found.whole[name], tensor)
    assert read_manifest(task.folder)["base"] == base_digest(task.base)
    assert merge_to_folder(task, ExpertCache(limit)) == {"skipped": True}


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_counts_where_it_is_needed(tmp_path, kind):
    task = task_of(tmp_path, kind)
    before = find_inputs(task)
    save_base(tmp_path / "base", seed=5)
    after = find_inputs(task)
    assert (before.key != after.key) == (kind != "plain")
    if kind == "plain":
        assert (before.base, before.base_digest) == (None, None)
        assert (
            find_inputs(replace(task, base=None)).key == find_inputs(replace(task, base="org/name")).key == before.key
        )


@pytest.mark.parametrize(("base", "why"), [(None, "has no `base_model`"), ("org/name", "org/name is a hub id")])
def test_without_the_base_it_is_refused_where_it_is_needed(tmp_path, base, why):
    with pytest.raises(UnsupportedAdapterError, match=rf"^a: is a DoRA adapter, .*{why}.*\nSet `base_model` to"):
        find_inputs(task_of(tmp_path, "dora", base))
    with pytest.raises(UnsupportedAdapterError, match=rf"^a: stores {HEAD} whole, .*{why}"):
        find_inputs(task_of(tmp_path, "whole", base))
    task = task_of(tmp_path, "whole", base, scale=1.0)  # a mean, in which the base cancels
    assert merge_to_folder(task, ExpertCache(0))["skipped"] is False
    mean = sum(one.whole[HEAD].double() for one in map(load_adapter, (e.location for e in task.experts))) / 2
    torch.testing.assert_close(load_adapter(task.folder).whole[HEAD], mean.float())


def test_an_anchor_may_need_the_base_too(tmp_path):
    task = task_of(tmp_path, "plain", anchor=str(save_dora(tmp_path / "start", 30)))
    assert find_inputs(task).base == task.base
    assert merge_to_folder(task, ExpertCache(0))["skipped"] is False
    with pytest.raises(UnsupportedAdapterError, match=r"^anchor: is a DoRA adapter"):
        find_inputs(replace(task, base=None))


def test_what_is_kept_of_dora_is_of_one_base(tmp_path):
    cache, other = ExpertCache(10**6), save_base(tmp_path / "other", seed=5)
    task = task_of(tmp_path, "dora")
    location = task.experts[0].location
    first, second = (cache.read("a", location, base=base).modules[PATH].delta() for base in (task.base, other))
    assert not torch.equal(first, second)
    assert torch.equal(second, read_adapter(location, base=BaseWeights(other)).modules[PATH].delta())


def test_dora_is_embedded_by_its_deltas(tmp_path):
    task = task_of(tmp_path, "dora")
    sketches = SketchTask(str(tmp_path / "s"), (("a", task.experts[0].location),), 8, 0, task.base)
    assert sketch_to_folder(sketches, ExpertCache(0)) == {"skipped": False, "failed": {}}
    save_base(tmp_path / "base", seed=5)
    assert sketch_to_folder(sketches, ExpertCache(0))["skipped"] is False
    failed = sketch_to_folder(replace(sketches, base=None), ExpertCache(0))["failed"]
    assert "the project has no `base_model`" in failed["a"]


def test_each_adapter_is_digested_once_in_a_merge(tmp_path, monkeypatch):
    task = task_of(tmp_path, "plain", anchor=str(save_plain(tmp_path / "start", 30)))
    asked = []
    monkeypatch.setattr(
        experts, "adapter_digest", lambda location, *name: asked.append(location) or adapter_digest(location, *name)
    )
    merge_to_folder(task, ExpertCache(10**6))
    assert sorted(asked) == sorted([*(e.location for e in task.experts), str(tmp_path / "start")])


def test_a_changed_adapter_is_described_anew(tmp_path):
    place = save_plain(tmp_path / "a", 1)
    before = describe(str(place), "a", adapter_digest(str(place)))
    assert (before.dora, before.whole, before.started_from) == (False, None, None)
    save_plain(place, 1, started_from="x", whole={HEAD: torch.ones(7, 5)})
    after = describe(str(place), "a", adapter_digest(str(place)))
    assert (after.dora, after.whole, after.started_from) == (False, HEAD, "x")


def test_notes_of_a_method_are_in_the_manifest(tmp_path):
    task = task_of(tmp_path, "plain", method="karcher")
    merge_to_folder(task, ExpertCache(0))
    assert "ratios of the weights" in read_manifest(task.folder)["notes"][0]
    plain = replace(task, folder=str(tmp_path / "other"), merges=MERGES)
    merge_to_folder(plain, ExpertCache(0))
    assert read_manifest(plain.folder)["notes"] == []


def test_a_merge_that_lost_its_base_is_no_longer_there(tmp_path):
    task = task_of(tmp_path, "dora")
    merge_to_folder(task, ExpertCache(0))
    key = find_inputs(task).key
    with pytest.raises(AdapterError):
        merge_to_folder(replace(task, base=None), ExpertCache(0))
    assert not is_complete(task.folder, key)
