"""What decides a trained adapter: its key, and the number of epochs where several were tried."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge import storage
from raymerge.config import Training
from raymerge.errors import EvaluationError, PersonaError
from raymerge.manifest import write_artefact
from raymerge.personas import Example, from_examples
from raymerge.runtime.tasks import TrainGroup, TrainTask, Trial
from raymerge.runtime.training_inputs import choose_epochs, gather_inputs

PERSONAS = from_examples(
    Example(name, f"w{i}?", f"w{i} w{j}.", split)
    for i, name in enumerate(("a", "b"))
    for j, split in enumerate(("train", "train", "validation", "test"))
)


def make_task(*members: str, trials=(), **settings) -> TrainTask:
    training = Training(**{"epochs": 3, **settings}).of("persona").model_dump(mode="json")
    groups = tuple(TrainGroup(name, f"/nowhere/{name}", (name,)) for name in members or ("a", "b"))
    return TrainTask(groups, "persona", "p.jsonl", training, "{prompt}", "sha256:base", "/nowhere", "/nowhere", trials)


def keys(personas=PERSONAS, dtype="float32", **settings) -> list[str]:
    return [g.key for g in gather_inputs(make_task(**settings), personas, dtype).groups.values()]


def test_adapters_trained_when_there_were_fewer_settings_are_still_what_is_wanted():
    before = {
        "rank": 8, "alpha": 16.0, "target_modules": "all-linear", "epochs": 3, "learning_rate": 2e-4, "batch_size": 8,
        "warmup": 0.1, "weight_decay": 0.0, "clip": 1.0, "seed": 0, "shared_init": True, "start_from": None,
    }  # fmt: skip
    parts = {
        "rows": [["w0?", "w0 w0."], ["w0?", "w0 w1."]],
        "training": before,
        "prompt_format": "{prompt}",
        "base": "sha256:base",
        "dtype": "float32",
        "start": None,
        "name": None,
    }
    assert keys()[0] == storage.digest_value(parts)


@pytest.mark.parametrize(
    "setting",
    [{"adapters_per_item": 3}, {"checkpoint_every": 1}, {"tensorboard": True}, {"micro_batch": 2},
     {"gradient_checkpointing": True}, {"epochs": (3,)}, {"epochs_chosen_by": "neighbours"}],
)  # fmt: skip
def test_what_cannot_change_an_adapter_is_not_in_its_key(setting):
    assert keys(**setting) == keys()


@pytest.mark.parametrize(
    "setting",
    [{"rank": 4}, {"rslora": True}, {"dropout": 0.1}, {"epochs": 4}, {"learning_rate": 1e-3}, {"batch_size": 2},
     {"patience": 2}, {"max_length": 9}, {"truncate": True}, {"seed": 1}, {"shared_init": False},
     {"target_modules": ("q_proj",)}],
)  # fmt: skip
def test_what_changes_an_adapter_changes_its_key(setting):
    assert not {*keys(**setting)} & {*keys()}
    assert keys(dtype="bfloat16") != keys()


def test_rows_count_where_they_are_looked_at():
    def with_another(split: str):
        rows = [e for name in PERSONAS.names for e in PERSONAS.examples(name)]
        return from_examples([*rows, Example("a", "w9?", "w9.", split)])

    assert keys(with_another("train"))[0] != keys()[0]
    assert keys(with_another("train"))[1] == keys()[1]
    assert keys(with_another("validation")) == keys()
    assert keys(with_another("validation"), patience=1)[0] != keys(patience=1)[0]
    assert keys(with_another("test"), patience=1) == keys(patience=1)


def test_missing_examples_are_refused_by_name():
    few = from_examples([Example("a", "w1?", "w2.", "train"), Example("b", "w1?", "w2.", "test")])
    with pytest.raises(PersonaError, match=r"^b: has no training examples"):
        gather_inputs(make_task(), few, "float32")
    with pytest.raises(PersonaError, match=r"^a: has no validation examples, and training\.patience looks at them"):
        gather_inputs(make_task("a", patience=1), few, "float32")


def evaluate(folder, mean: float | None) -> str:
    summary = storage.encode_json({"mean": {"similarity": mean}})
    write_artefact(str(folder), {"summary.json": summary}, {}, "some key")
    return str(folder)


@given(st.dictionaries(st.integers(1, 50), st.sampled_from([0.1, 0.2, 0.3, None]), min_size=2, max_size=5))
def test_the_best_trial_is_chosen_and_the_smaller_number_of_equals(tmp_path_factory, means):
    folder = tmp_path_factory.mktemp("trials")
    trials = tuple(Trial(epochs, "", evaluate(folder / str(epochs), mean)) for epochs, mean in means.items())
    task = make_task(epochs=tuple(means), trials=trials)
    there = {epochs: mean for epochs, mean in means.items() if mean is not None}
    if not there:
        with pytest.raises(EvaluationError):
            choose_epochs(task)
        return
    choice = choose_epochs(task)
    assert choice.tried == there
    assert there[choice.chosen] == max(there.values())
    assert all(there[n] < there[choice.chosen] for n in there if n < choice.chosen)
    assert choice.as_record()["by"] == "own"
    inputs = gather_inputs(task, PERSONAS, "float32")
    assert inputs.settings.epochs == choice.chosen
    assert [g.key for g in inputs.groups.values()] == keys(epochs=choice.chosen)


def test_an_unfinished_trial_does_not_take_part(tmp_path):
    trials = tuple(Trial(n, "", evaluate(tmp_path / str(n), n / 10)) for n in (4, 8))
    task = make_task(epochs=(4, 8, 16), trials=(*trials, Trial(16, "", str(tmp_path / "none"))))
    assert choose_epochs(task).chosen == 8
    (tmp_path / "8" / "summary.json").write_text("{")
    assert choose_epochs(task).chosen == 4
    (tmp_path / "4" / "manifest.json").unlink()
    with pytest.raises(EvaluationError, match=r"^training\.epochs \[4, 8, 16\]: none of them was tried to the end"):
        choose_epochs(task)


def test_the_record_says_that_merges_of_neighbours_chose(tmp_path):
    trials = tuple(Trial(n, "", evaluate(tmp_path / str(n), n / 10)) for n in (4, 8))
    task = make_task(epochs=(4, 8), trials=trials, epochs_chosen_by="neighbours")
    assert choose_epochs(task).as_record() == {"chosen": 8, "by": "neighbours", "tried": {"4": 0.4, "8": 0.8}}


def test_one_number_of_epochs_needs_no_trial():
    assert choose_epochs(make_task(epochs=5)) is None
    assert choose_epochs(make_task(epochs=(5, 5))).chosen == 5
