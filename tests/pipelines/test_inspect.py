"""`raymerge inspect`: what it finds, what it says of bad adapters, and which merge."""

import io
import json
import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raymerge.adapters import LoraAdapter, LoraModule, read_adapter, save_adapter
from raymerge.adapters.formats import save_adapter as save_as
from raymerge.errors import AdapterError, MergeError, ModelError
from raymerge.evaluation.similarity_map import brief
from raymerge.merging.inputs import check_inputs
from raymerge.merging.merge import merge
from raymerge.merging.rank import parse_rank
from raymerge.pipelines.inspect import inspect, inspection
from raymerge.pipelines.inspection.adapter import Inspected
from raymerge.pipelines.inspection.groups import group
from raymerge.pipelines.inspection.places import find_adapters
from raymerge.pipelines.inspection.similarity import Similarity

PATHS = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]


def make(name, seed=0, rank=2, shape=(6, 8), paths=PATHS, **more):
    random = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraModule(
            torch.randn(rank, shape[1], generator=random), torch.randn(shape[0], rank, generator=random), 2.0
        )
        for path in paths
    }
    return LoraAdapter(name, modules, base_model="tiny", task_type="CAUSAL_LM", **more)


def save(folder, *adapters):
    for adapter in adapters:
        save_adapter(adapter, str(folder / adapter.name))
    return str(folder)


def configure(folder, **keys):
    """Change an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def norm(adapter):
    return math.sqrt(sum(float(m.delta(torch.float64).square().sum()) for m in adapter.modules.values()))


def only(found) -> Inspected:
    (one,) = found.adapters
    assert one.error is None, one.error
    return one


# Where adapters are


def test_folders_patterns_files_and_uris_lead_to_adapters(tmp_path):
    save(tmp_path / "bank" / "deep", make("a"), make("b"))
    save(tmp_path / "bank", make("c"))
    save(tmp_path / "bank" / "c" / "checkpoints", make("early"))  # below an adapter: not searched
    save_as(make("m"), str(tmp_path / "m"), format="mlx")
    (tmp_path / "m" / "0000100_adapters.safetensors").write_bytes((tmp_path / "m/adapters.safetensors").read_bytes())
    bank, uri = str(tmp_path / "bank"), f"file://{tmp_path}/bank"
    assert list(find_adapters([bank])) == ["a", "b", "c"]
    assert find_adapters([bank]) == find_adapters([f"{bank}/deep/*", f"{bank}/c", f"{bank}/deep/a"])
    assert list(find_adapters([f"{bank}/deep/[b-z]*"])) == ["b"]
    assert list(find_adapters([f"{bank}/c/checkpoints"])) == ["early"]
    assert list(find_adapters([f"{bank}/c/adapter_model.safetensors"])) == ["c"]
    assert list(find_adapters([str(tmp_path / "m"), f"{tmp_path}/m/0*.safetensors"])) == ["0000100_adapters", "m"]
    assert list(find_adapters([uri])) == ["a", "b", "c"]
    assert list(find_adapters([f"{uri}/**"])) == list(find_adapters([f"{bank}/**"])) == ["a", "b", "c", "early"]
    assert list(find_adapters([f"{uri}/de*/*"])) == ["a", "b"]


def test_adapters_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for run in ("one", "two"):
        save(tmp_path / run / "adapters", make("x"))
    save(tmp_path, make("y"))
    assert list(find_adapters([str(tmp_path)])) == ["one/adapters/x", "two/adapters/x", "y"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [("nowhere", "there is no such file or folder"), ("empty", "holds no adapters"), ("x*", "matches no adapters")],
)
def test_an_argument_that_leads_nowhere_is_named(argument, said, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=f"^{argument.replace('*', '.')}: {said}"):
        inspect([argument])


def test_one_adapter_is_one_on_whatever_way_it_is_reached(tmp_path, monkeypatch):
    save(tmp_path, make("ann"))
    save_as(make("m"), str(tmp_path / "m"), format="mlx")
    (tmp_path / "link").symlink_to("ann")
    monkeypatch.chdir(tmp_path)
    assert list(find_adapters(["ann", f"file://{tmp_path}/ann", "link", "ann/adapter_model.safetensors"])) == ["ann"]
    assert list(find_adapters(["m", "m/adapters.safetensors", "m/*.safetensors"])) == ["m"]


def test_a_pattern_takes_no_model_s_weights_for_an_adapter(tmp_path):
    save(tmp_path, make("a"))
    for folder in ("base", "a"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
            (tmp_path / folder / name).write_bytes(b"")
    for start in (str(tmp_path), f"file://{tmp_path}"):
        for pattern in ("**", "*", "**/*.safetensors", "*/*.safetensors"):
            assert list(find_adapters([f"{start}/{pattern}"])) == ["a"]


def test_a_name_that_is_no_text_is_listed_as_broken(tmp_path):
    bank = save(tmp_path, make("good"))
    odd = os.fsdecode(b"od\xff")
    save(tmp_path, make("x"))
    os.rename(tmp_path / "x", tmp_path / odd)
    for options in ([], ["--json"], ["--similarity", "--out", str(tmp_path / "out")]):
        code = "import sys; from raymerge.cli import main; main(sys.argv[1:])"
        run = subprocess.run([sys.executable, "-c", code, "inspect", bank, *options], capture_output=True)
        assert run.returncode == 1, run.stderr
        assert b"od\\udcff: the path" in run.stdout.replace(b"\\\\", b"\\")
        assert b"good" in run.stdout


def test_a_base_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nowhere: there is no base model"):
        inspect([save(tmp_path, make("a"))], base="nowhere")


# What adapters are


def test_an_adapter_is_described_as_it_is_stored(tmp_path):
    adapter = make("a", rank=3)
    one = only(inspection([save(tmp_path, adapter)]))
    assert (one.format, one.base_model, one.ranks, one.alphas) == ("peft", "tiny", (3,), (6.0,))
    assert (one.dtypes, one.remarks) == (("f32",), ())
    assert one.nbytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert one.norm == pytest.approx(norm(adapter), rel=1e-6)
    assert one.to_json()["modules"][PATHS[0]] == {"rank": 3, "shape": [6, 8]}
    save_as(adapter, str(tmp_path / "mlx" / "a"), format="mlx")
    other = only(inspection([str(tmp_path / "mlx")]))
    assert (other.format, other.base_model, other.ranks, other.alphas) == ("mlx", "tiny", (3,), (6.0,))
    assert other.norm == pytest.approx(one.norm)


def zeroed(adapter, paths):
    modules = {p: replace(m, B=torch.zeros_like(m.B)) if p in paths else m for p, m in adapter.modules.items()}
    return replace(adapter, modules=modules)


@pytest.mark.parametrize(
    ("adapter", "keys", "remarks"),
    [
        (make("a"), {"use_rslora": True, "lora_alpha": 2.0}, ["rsLoRA"]),
        (make("a"), {"alpha_pattern": {"q_proj": 9}}, ["alpha_pattern"]),
        (make("a"), {"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        (make("a"), {"target_modules": ["q_proj", "v_proj", "k_proj"]},
         ["its file lacks k_proj, which its configuration names"]),
        (make("a"), {"target_modules": r".*_proj"}, []),
        (zeroed(make("a"), PATHS), {}, ["zero delta: untrained"]),
        (zeroed(make("a"), PATHS[:1]), {}, ["zero delta in 1 of 4 modules"]),
        (replace(make("a"), errors={"*": 0.25}), {}, ["merged, with error 0.25"]),
        (replace(make("a"), whole={"lm_head.weight": torch.ones(3, 2)}, modules_to_save=("lm_head",)), {},
         ["whole tensors: lm_head.weight"]),
        (replace(make("a"), modules={p: replace(m, bias=torch.ones(6)) for p, m in make("a").modules.items()}), {},
         ["trained biases (lora_bias)"]),
        (LoraAdapter("a", {**make("a", paths=PATHS[:1]).modules, **make("a", rank=4, paths=PATHS[1:]).modules}), {},
         ["rank_pattern", "alpha_pattern", "mixed ranks"]),
        (LoraAdapter("a", {"model.embed_tokens": replace(make("a").modules[PATHS[0]], embedding=True)}), {},
         ["adapts an embedding"]),
    ],
)  # fmt: skip
def test_what_is_unusual_is_said(adapter, keys, remarks, tmp_path):
    save(tmp_path, adapter)
    configure(tmp_path / "a", **keys)
    one = only(inspection([str(tmp_path)]))
    assert list(one.remarks) == remarks
    delta = read_adapter(str(tmp_path / "a"))
    biases = sum(float((m.scaling * m.bias).square().sum()) for m in delta.modules.values() if m.bias is not None)
    assert one.norm == pytest.approx(math.sqrt(norm(delta) ** 2 + biases), rel=1e-6)


def test_a_pickle_is_read_only_if_it_is_trusted(tmp_path):
    from safetensors.torch import load_file

    save(tmp_path, make("a"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "a" / "adapter_model.bin")
    file.unlink()
    assert "pickle" in inspection([str(tmp_path)]).adapters[0].reason
    one = only(inspection([str(tmp_path)], allow_pickle=True))
    assert (one.remarks, one.norm) == (("weights are a pickle",), pytest.approx(norm(make("a")), rel=1e-6))


def save_dora(folder):
    from safetensors.torch import load_file, save_file

    save(folder.parent, make(folder.name))
    configure(folder, use_dora=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    for path in PATHS:
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = torch.arange(1.0, 7.0)
    save_file(tensors, folder / "adapter_model.safetensors")
    base = folder.parent.parent / "base"
    base.mkdir()
    save_file({f"{path}.weight": torch.ones(6, 8) for path in PATHS}, base / "model.safetensors")
    return str(base)


def test_dora_is_described_without_its_base_and_measured_with_it(tmp_path):
    base = save_dora(tmp_path / "bank" / "d")
    save(tmp_path / "bank", make("plain"))
    found = inspection([str(tmp_path / "bank")], similarity=True)
    dora = found.adapters[0]
    assert (dora.norm, dora.ranks, dora.alphas) == (None, (2,), (4.0,))
    assert dora.remarks == ("DoRA: its delta needs --base",)
    assert [g.names for g in found.groups] == [("d", "plain")]
    assert (found.similarity.names, found.similarity.left_out) == (("plain",), ("d",))
    found = inspection([str(tmp_path / "bank")], similarity=True, base=base)
    deltas = [torch.cat([a.adapter.modules[p].delta().flatten() for p in PATHS]) for a in found.adapters]
    assert (found.adapters[0].ranks, found.adapters[0].remarks) == ((2,), ("DoRA",))
    assert found.adapters[0].norm == pytest.approx(float(deltas[0].norm()), rel=1e-5)
    wanted = float(torch.cosine_similarity(deltas[0], deltas[1], dim=0))
    assert found.similarity.cosines[0, 1] == pytest.approx(wanted, abs=1e-5)


# Bad ones


def spoil(folder, how):
    file = folder / "adapter_model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "without weights":
        file.unlink()
    elif how == "no mapping":
        (folder / "adapter_config.json").write_text("[]")
    elif how == "another type":
        configure(folder, peft_type="LOHA")
    elif how == "NaN":
        adapter = make("x")
        adapter.modules[PATHS[0]].B[0, 0] = float("nan")
        save_adapter(adapter, str(folder))
    else:
        configure(folder, use_qalora=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "adapter_model.safetensors is truncated"),
        ("without weights", "adapter_model.safetensors is missing"),
        ("no mapping", "adapter_config.json is not a mapping"),
        ("another type", "peft_type 'LOHA' cannot be merged"),
        ("NaN", "holds NaN in model.layers.0.self_attn.q_proj.lora_B"),
        ("a variant", "use_qalora is set"),
    ],
)
def test_a_bad_adapter_is_listed_with_its_reason_and_the_others_are_not_lost(how, said, tmp_path, capsys):
    bank = save(tmp_path / "bank", make("good"), make("bad"), make("well", seed=1))
    spoil(tmp_path / "bank" / "bad", how)
    assert inspect([bank], similarity=True, out=str(tmp_path / "out")) == 1
    out = capsys.readouterr().out
    assert "Cannot be read (1)" in out
    assert said in " ".join(out.split())
    assert "All 2 merge together." in out
    assert json.loads((tmp_path / "out" / "similarity.json").read_bytes())["names"] == ["good", "well"]


def test_an_unfinished_adapter_is_no_adapter_yet(tmp_path):
    from raymerge.manifest import NAME, UNFINISHED

    save(tmp_path, make("a"))
    (tmp_path / "a" / NAME).write_text(json.dumps(UNFINISHED))
    assert "begun and not finished" in inspection([str(tmp_path)]).adapters[0].reason


def test_what_only_similarities_find_bad_is_listed_too(tmp_path, capsys):
    bank = save(tmp_path / "bank", make("good"), make("bad"), make("well", seed=1))
    spoil(tmp_path / "bank" / "bad", "NaN")
    assert inspect([bank], similarity=True, norm=False, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["adapters"] if "error" in one] == ["bad"]
    assert found["similarity"]["names"] == ["good", "well"]
    assert [group["adapters"] for group in found["groups"]] == [["good", "well"]]


def test_json_writes_no_file_unless_it_is_told_where(tmp_path, monkeypatch, capsys):
    bank = save(tmp_path / "bank", make("a"), make("b", seed=1))
    monkeypatch.chdir(tmp_path)
    assert inspect([bank], similarity=True, as_json=True) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]
    assert inspect([bank], similarity=True, as_json=True, out="told") == 0
    capsys.readouterr()
    assert inspect([bank], similarity=True) == 0
    assert "1 pair: " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"bank", "told", "inspect"}


def test_headers_alone_read_no_weight(tmp_path):
    save(tmp_path, make("a"))
    spoil(tmp_path / "a", "NaN")
    one = only(inspection([str(tmp_path)], norm=False))
    assert one.norm is None
    assert one.ranks == (2,)


# What merges


def test_shapes_and_strangers_make_groups_and_say_why(tmp_path, capsys):
    wide = make("wide", shape=(6, 10), paths=PATHS[:2])
    bank = save(tmp_path, make("a"), make("b", paths=PATHS[1:]), wide, make("far", paths=["h.0.attn"]))
    assert inspect([bank], as_json=True) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [g["adapters"] for g in groups] == [["a", "b"], ["wide"], ["far"]]
    assert [g["apart"] for g in groups] == [
        [], [f"{PATHS[0]} has shape (6, 10) in wide, shape (6, 8) in a"], ["they share no module"] * 2,
    ]  # fmt: skip
    assert inspect([bank]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "group 1 (2): a, b group 2 (1): wide" in out
    assert "group 3 (1): far shares no module with groups 1, 2" in out


def test_pairs_of_a_group_that_share_nothing_alone_are_named(tmp_path, capsys):
    a, b, c = make("a", paths=["k0", "o0"]), make("b", paths=["k0", "k1"]), make("c", paths=["k1"])
    bank = save(tmp_path, a, b, c)
    (one,) = inspection([bank]).groups
    assert (one.names, one.strangers) == (("a", "b", "c"), ((("a",), ("c",)),))
    assert inspect([bank]) == 0
    assert "All 3 merge together. a | c: share no module" in " ".join(capsys.readouterr().out.split())


def test_different_base_names_are_a_warning(tmp_path):
    other = [replace(make(f"b{i}"), base_model="/home/somebody/tiny") for i in range(2)]
    (warning,) = inspection([save(tmp_path, make("a"), *other)]).warnings
    assert warning.startswith("the adapters name 2 base models: /home/somebody/tiny (2), tiny (1).")


@given(st.lists(st.dictionaries(st.sampled_from("klmno"), st.sampled_from([4, 5]), min_size=1), min_size=1, max_size=6))
def test_groups_are_what_a_merge_accepts(several):
    adapters = {
        f"a{i}": LoraAdapter(f"a{i}", {p: LoraModule(torch.ones(1, 3), torch.ones(n, 1), 1.0) for p, n in one.items()})
        for i, one in enumerate(several)
    }
    groups = group([Inspected(name, "", headers=a.headers) for name, a in adapters.items()])
    assert sorted(name for g in groups for name in g.names) == sorted(adapters)

    def check(*names):
        check_inputs([adapters[name] for name in names], [1.0] * len(names), None, parse_rank("keep"))

    for number, one in enumerate(groups):
        if len(one.names) > 1:
            merge([adapters[name] for name in one.names], [1.0] * len(one.names))
        strangers = {frozenset(pair) for some, others in one.strangers for pair in product(some, others)}
        for pair in combinations(one.names, 2):
            if frozenset(pair) in strangers:
                with pytest.raises(MergeError, match="share no module"):
                    merge([adapters[name] for name in pair], [1.0, 1.0])
            else:
                merge([adapters[name] for name in pair], [1.0, 1.0])
        for other, why in zip(groups[:number], one.apart, strict=True):
            if why:
                with pytest.raises(MergeError, match="has shape"):
                    check(*one.names, *other.names)
            else:
                held = [{path for name in g.names for path in adapters[name].modules} for g in (one, other)]
                assert not held[0] & held[1]


# Similarities


def test_the_matrix_is_that_of_dense_deltas_in_table_picture_and_json(tmp_path, capsys):
    mixed = make("c", seed=2)
    first = make("a", seed=1)
    mixed = replace(mixed, modules={
        p: LoraModule(torch.cat([m.A, first.modules[p].A]), torch.cat([m.B, first.modules[p].B], 1), 2.0)
        for p, m in mixed.modules.items()
    })  # fmt: skip
    adapters = [first, make("b", seed=3), mixed, zeroed(make("z"), PATHS)]
    bank, out = save(tmp_path / "bank", *adapters), tmp_path / "out"
    assert inspect([bank], similarity=True, out=str(out)) == 0
    written = json.loads((out / "similarity.json").read_bytes())
    deltas = torch.stack([torch.cat([m.delta().flatten() for m in a.modules.values()]) for a in adapters])
    wanted = torch.nn.functional.cosine_similarity(deltas[:, None], deltas, dim=-1)
    assert written["names"] == ["a", "b", "c", "z"]
    np.testing.assert_allclose(written["cosines"], wanted, atol=1e-5)
    assert Image.open(io.BytesIO((out / "similarity.png").read_bytes())).size[0] > 400
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["3", "c", brief(float(wanted[2, 0])), brief(float(wanted[2, 1]))] in rows


def test_between_adapters_that_do_not_merge_there_is_no_cosine(tmp_path, capsys):
    bank = save(tmp_path / "bank", make("a"), make("b", shape=(5, 5)))
    assert inspect([bank], similarity=True, out=str(tmp_path / "out"), as_json=True) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["similarity"]["cosines"] == [[1.0, None], [None, 1.0]]
    assert captured.err == ""


def test_many_adapters_stand_by_families_and_the_nearest_are_named(tmp_path, capsys):
    families = []
    for number in range(16):
        family, own = make("f", seed=number % 2), make(f"p{number:02}", seed=10 + number)
        modules = {
            p: LoraModule(torch.cat([m.A, own.modules[p].A]), torch.cat([2 * m.B, own.modules[p].B], 1), 2.0)
            for p, m in family.modules.items()
        }
        families.append(replace(own, modules=modules))
    bank = save(tmp_path / "bank", *families)
    assert inspect([bank], similarity=True, out=str(tmp_path / "out")) == 0
    names = json.loads((tmp_path / "out" / "similarity.json").read_bytes())["names"]
    assert len({int(name[1:]) % 2 for name in names[:8]}) == len({int(name[1:]) % 2 for name in names[8:]}) == 1
    shown = capsys.readouterr().out
    assert "120 pairs: mean" in shown
    assert "nearest:" in shown


@given(st.integers(0, 7), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_the_nearest_pairs_are_those_of_all_pairs_sorted(size, count, seed):
    cosines = np.random.default_rng(seed).choice([np.nan, -0.5, 0.25, 1, *np.linspace(0, 1, 9)], (size, size))
    cosines = np.triu(cosines) + np.triu(cosines, 1).T
    names = tuple(f"a{i}" for i in reversed(range(size)))
    pairs = [(cosines[i, j], *sorted((names[i], names[j]))) for i, j in combinations(range(size), 2)]
    known = sorted((pair for pair in pairs if not math.isnan(pair[0])), key=lambda pair: (-pair[0], *pair[1:]))
    similarity = Similarity(names, cosines)
    assert sorted(similarity.values()) == sorted(pair[0] for pair in known)
    nearest = similarity.nearest(count)
    assert [pair[0] for pair in nearest] == [pair[0] for pair in known[:count]]
    assert set(nearest) <= set(known)
    assert similarity.nearest(100) == known


def test_the_nearest_of_thousands_take_little_memory():
    size = 1000
    similarity = Similarity(tuple(map(str, range(size))), np.random.default_rng(0).random((size, size)))
    tracemalloc.start()
    assert len(similarity.nearest(8)) == 8
    assert len(similarity.values()) == size * (size - 1) // 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * size**2  # bytes; a list of pairs takes 130


@pytest.mark.parametrize(("value", "text"), [(1, "1"), (0.999, "1"), (-1, "−1"), (0.934, ".93"), (-0.031, "−.03"),
                                             (0.0, ".00"), (-0.001, ".00")])  # fmt: skip
def test_cosines_are_brief(value, text):
    assert brief(value) == text


def test_what_is_printed_fits_eighty_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "x" * 60
    several = [make(f"{long}\x1b[31m{i}", seed=i, rank=1 + i % 2) for i in range(12)]
    bank = save(tmp_path / "bank", *several, make(f"{long}other", shape=(7, 9)), make("bad" + long))
    spoil(tmp_path / "bank" / ("bad" + long), "another type")
    assert inspect([bank], similarity=True, out=str(tmp_path / "o")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("Wrote")) <= 80
    assert not any("\x1b" in line for line in lines)


def test_real_adapters_of_both_formats(test_data):
    folder = str(test_data / "adapters")
    checkpoints = f"{folder}/mlx-qwen2.5-0.5b-r8/0*.safetensors"
    found = inspection([folder, checkpoints], similarity=True)
    assert all(adapter.error is None for adapter in found.adapters)
    early, late, final = "0000100_adapters", "0000200_adapters", "mlx-qwen2.5-0.5b-r8"
    assert (early, late, final) in [g.names for g in found.groups]
    cosines = {frozenset(pair[1:]): pair[0] for pair in found.similarity.nearest(10**6)}
    assert cosines[frozenset((late, final))] == pytest.approx(1)
    assert 0.91 < cosines[frozenset((early, late))] < 0.995
