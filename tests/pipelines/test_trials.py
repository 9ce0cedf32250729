"""What numbers of epochs are tried on: neighbourhoods, whose merges answer on validation examples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import load_adapter
from raymerge.errors import ProjectError, RoutingError
from raymerge.pipelines.check import checked
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.plan import Plan, Steps
from raymerge.pipelines.run import run
from raymerge.pipelines.train import train
from raymerge.pipelines.trials import ADAPTERS_TRIED, NEIGHBOURHOOD, neighbourhoods
from raymerge.routing.embeddings import encode_embeddings, make_embeddings
from raymerge.routing.inputs import RoutingInputs, make_space
from tests.pipelines.conftest import NAMES

BY_NEIGHBOURS = {"rank": 2, "batch_size": 2, "epochs": [1, 2], "epochs_chosen_by": "neighbours"}


def change(project: str, **keys) -> str:
    value = yaml.safe_load(Path(project).read_text())
    Path(project).write_text(yaml.safe_dump({**value, **keys}))
    return project


def space_of(vectors: np.ndarray, centred: bool = False):
    names = tuple(f"n{i:02d}" for i in range(len(vectors)))
    return make_space(RoutingInputs(names, names, make_embeddings(names, vectors)), centred)[0]


def similarities_of(space) -> dict[tuple[str, str], float]:
    table = space.queries.astype(np.float64) @ space.keys.T.astype(np.float64)
    return {(a, b): table[i, j] for i, a in enumerate(space.personas) for j, b in enumerate(space.personas)}


@given(st.integers(1, 60), st.integers(0, 1000))
def test_a_neighbourhood_is_somebody_and_the_most_similar_of_those_in_no_other(count, seed):
    space = space_of(np.random.default_rng(seed).normal(size=(count, 4)))
    found, near = neighbourhoods(space), similarities_of(space)
    members = [name for hood in found for name in hood]
    assert len(set(members)) == len(members) <= ADAPTERS_TRIED
    assert {len(hood) for hood in found} == {min(count, NEIGHBOURHOOD)}
    assert len(members) > min(count, ADAPTERS_TRIED) - NEIGHBOURHOOD
    left = set(space.personas)
    for hood in found:
        left -= set(hood)
        assert any(
            all(near[centre, out] <= near[centre, one] + 2e-6 for out in left for one in hood if one != centre)
            for centre in hood
        )


def test_families_are_found_whoever_is_named_first():
    families = np.eye(3)[np.arange(24) % 3] + np.random.default_rng(0).normal(size=(24, 3)) / 20
    assert {frozenset(int(name[1:]) % 3 for name in hood) for hood in neighbourhoods(space_of(families + 9, True))} == {
        frozenset({family}) for family in range(3)
    }


def many(project: str, count: int, **keys) -> str:
    """The project with so many personas in families of eight, their vectors in a file, and no adapters."""
    folder = Path(project).parent
    shutil.rmtree(folder / "adapters")
    (folder / "clusters.json").unlink()
    names = [f"n{i:02d}" for i in range(count)]
    lines = [{"persona": name, "prompt": f"w{j}?", "response": f"w{j + 1}.", "split": split}
             for name in names for j, split in enumerate(["train", "validation", "test"])]  # fmt: skip
    (folder / "personas.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    vectors = np.eye(count)[np.arange(count) // 8] + np.eye(count) / 10
    (folder / "mine.parquet").write_bytes(encode_embeddings(make_embeddings(names, vectors)))
    given = {"clusters": {"count": 2}, "embedding": {"source": "mine.parquet"}, "training": BY_NEIGHBOURS}
    return change(project, **given, **keys)


def test_everybody_who_is_tried_is_answered_by_the_equal_merge_of_eight(project):
    plan = Plan(open_project(many(project, 32)), Steps(train=("persona",)))
    items = {item.id: item for item in plan.first()}
    for epochs in (1, 2):
        trained = items[f"try/persona-{epochs}/train"].payload
        scored = [item for name, item in items.items() if name.startswith(f"try/persona-{epochs}/score/")]
        sources = [source for item in scored for source in item.payload.sources]
        assert trained.training["epochs"] == epochs
        assert len(trained.groups) == len(sources) == 24
        places = {group.name: group.folder for group in trained.groups}
        for source in sources:
            assert source.kind == "mixture"
            experts = source.merge.experts
            assert [expert.name for expert in experts] == [
                f"n{i:02d}" for i in range(32) if i // 8 == int(source.persona[1:]) // 8
            ]
            assert all(expert.location == places[expert.name] and expert.weight == 1 / 8 for expert in experts)
            assert source.merge.merges["scale"] == "match_norm"
            assert (source.merge.merges["rank"], source.merge.merges["anchor"]) == ("exact", "auto")
        assert all(item.after == {f"try/persona-{epochs}/train"} for item in scored)
        assert f"try/persona-{epochs}/gather" in items["train/persona/0000"].after


def test_who_has_no_embedding_is_not_tried_and_somebody_must_have_one(project):
    many(project, 9)
    vectors = encode_embeddings(make_embeddings(["n01", "n04"], np.eye(2)))
    (Path(project).parent / "mine.parquet").write_bytes(vectors)
    items = {i.id: i for i in Plan(open_project(project), Steps(train=("persona",))).first()}
    assert [group.name for group in items["try/persona-1/train"].payload.groups] == ["n01", "n04"]
    assert len([group for i in items if i.startswith("train/") for group in items[i].payload.groups]) == 9
    (Path(project).parent / "mine.parquet").write_bytes(encode_embeddings(make_embeddings(["x", "y"], np.eye(2))))
    with pytest.raises(RoutingError, match=r"epochs_chosen_by is neighbours, and no persona can have any"):
        train(project, group_by="persona", local=True)


def test_adapters_wait_for_the_embeddings_that_choose_their_neighbours(project):
    change(project, adapters="new/{persona}", training=BY_NEIGHBOURS, recipes={"own": {"strategy": "own"}})
    plan = Plan(open_project(project), Steps(train=("unified", "persona"), merge=True))
    first = [item.id for item in plan.first()]
    assert plan.placing().embeddings
    assert [name for name in first if "unified" not in name] == ["embed/0000"]
    change(project, training={**BY_NEIGHBOURS, "epochs": 1})
    plan = Plan(open_project(project), Steps(train=("persona",), merge=True))
    assert "train/persona/0000" in [item.id for item in plan.first()]
    assert not plan.placing().embeddings


def test_neighbours_by_the_deltas_of_what_is_trained_are_refused(project):
    change(project, training=BY_NEIGHBOURS, embedding={"source": "deltas"})
    with pytest.raises(ProjectError, match=r"wanted before anything is trained\.\nFound embedding.source: deltas"):
        train(project, group_by="persona", local=True)
    assert not (Path(project).parent / "runs/_shared").exists()
    found = [finding for section in checked(project).sections for finding in section.findings]
    assert any("before anything is trained" in finding.text for finding in found if finding.sign == "bad")
    assert Plan(open_project(project), Steps(train=("unified",))).first()


def of_personas(epochs) -> dict:
    return {"persona": epochs, "cluster": 1, "unified": 1}


def test_neighbours_choose_by_what_their_merge_answers(project):
    folder = Path(project).parent
    training = {**BY_NEIGHBOURS, "learning_rate": 0.01}
    change(project, adapters="new/{persona}", training={**training, "epochs": of_personas([1, 2])})
    assert train(project, group_by="unified", local=True) == 0
    assert train(project, group_by="persona", start_from="unified", local=True) == 0
    chosen = json.loads((folder / "new/p0/manifest.json").read_text())["epochs_chosen"]
    assert chosen["by"] == "neighbours"
    assert load_adapter(str(folder / "new/p0")).started_from == "unified"
    evaluation = {"split": "validation", "batch_size": 4}
    average = {"average": {"strategy": "simple_average", "rank": "exact"}}
    for epochs in (1, 2):  # all six are one neighbourhood
        tried = f"runs/_shared/tries/persona-{epochs}/adapters/{{persona}}"
        alone = {**training, "epochs": of_personas(epochs)}
        keys = {"training": alone, "evaluation": evaluation, "recipes": average}
        change(project, adapters=tried, output=f"runs-{epochs}", **keys)
        assert run(project, local=True) == 0
        scored = json.loads((folder / f"runs-{epochs}/average/evaluation/summary.json").read_text())
        assert chosen["tried"][str(epochs)] == pytest.approx(scored["mean"]["similarity"], abs=1e-4)
    assert chosen["tried"][str(chosen["chosen"])] == max(chosen["tried"].values())


def test_other_seeds_choose_by_neighbours_too_and_again_nothing_is_done(project, capsys):
    folder = Path(project).parent
    change(project, adapters="new/{persona}", training=BY_NEIGHBOURS, recipes={"own": {"strategy": "own"}})
    assert run(project, seeds=2, local=True) == 0
    for place in ("new", "runs/_seeds/1/_trained/adapters"):
        for name in NAMES:
            record = json.loads((folder / place / name / "manifest.json").read_text())["epochs_chosen"]
            assert (record["by"], set(record["tried"])) == ("neighbours", {"1", "2"})
    capsys.readouterr()
    assert run(project, seeds=2, local=True) == 0
    [counted] = [line for line in capsys.readouterr().out.splitlines() if "items done" in line]
    done, _, rest = counted.partition(" items done, ")
    assert rest.startswith(f"{done} of them were there already")
    shutil.rmtree(folder / "new/p0")
    step = next(s for s in checked(project).estimate.steps if s.name == "train persona")
    assert (step.makes, step.there) == (1, 5)
    assert step.operations > 0
