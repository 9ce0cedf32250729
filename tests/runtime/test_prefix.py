"""A prefix item: what it writes loads in PEFT, and what is there is not made again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raymerge.config import Training
from raymerge.errors import ModelError, PersonaError
from raymerge.manifest import is_complete, read_manifest
from raymerge.models.prefix import Prefixes, read_prefix
from raymerge.runtime import prefix as item
from raymerge.runtime import training_progress
from raymerge.runtime.events import Item
from raymerge.runtime.tasks import AnswerSource, EvaluateTask, PrefixTask, TrainGroup, Trial
from raymerge.runtime.training_progress import LiveTrainings
from raymerge.runtime.workers import ModelWorker

TRAINING = Training(epochs=4, learning_rate=0.05, batch_size=3).model_dump(mode="json")


@pytest.fixture
def task(personas: str, tmp_path: Path) -> PrefixTask:
    groups = tuple(TrainGroup(name, str(tmp_path / "prefixes" / name), (name,)) for name in ("ada", "bob"))
    return PrefixTask(groups, 5, personas, TRAINING, "{prompt}", "sha256:base", str(tmp_path / "item"))


def files(task: PrefixTask) -> dict[Path, bytes]:
    return {p: p.read_bytes() for group in task.groups for p in sorted(Path(group.folder).iterdir())}


def test_an_item_writes_a_prefix_for_each_group(task: PrefixTask, worker: ModelWorker, tiny_llama: Path) -> None:
    assert worker.train_prefixes(task) == {"skipped": False, "adapters": 2, "failed": {}, "said": []}
    for group in task.groups:
        manifest = read_manifest(group.folder)
        assert manifest is not None
        assert is_complete(group.folder, manifest["key"])
        assert (manifest["grouping"], manifest["steps"], manifest["virtual_tokens"]) == ("prefix", 8, 5)
        assert manifest["personas"] == [group.name]
        assert len(manifest["losses"]) == 8
        assert manifest["losses"][-1] < manifest["losses"][0]
        assert manifest["tokens"] == 6 * 4  # two words, a full stop and the end in each answer
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), group.folder)
        attached = Prefixes(worker.base.model)
        attached.load([read_prefix(group.folder, group.name).embeddings])
        ids = torch.arange(8, 20)[None]
        with torch.inference_mode(), attached.rows([0]):
            assert torch.allclose(model(ids).logits, worker.base.model(ids).logits, atol=1e-4)
        attached.detach()


def test_what_is_there_is_not_made_again(
    task: PrefixTask, worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.train_prefixes(task)
    before = files(task)
    with monkeypatch.context() as patched:
        patched.setattr(item, "train_prefixes", None)
        assert worker.train_prefixes(task) == {"skipped": True}
        other_rank = replace(
            task, training={**TRAINING, "rank": 64, "patience": 1, "tensorboard": True, "dropout": 0.1}
        )
        assert worker.train_prefixes(other_rank) == {"skipped": True}
    Path(task.groups[1].folder, "adapter_model.safetensors").unlink()
    assert worker.train_prefixes(task) == {"skipped": False, "adapters": 1, "failed": {}, "said": []}
    assert files(task) == before
    assert worker.train_prefixes(replace(task, tokens=6))["adapters"] == 2
    assert worker.train_prefixes(replace(task, tokens=6, training={**TRAINING, "epochs": 3}))["adapters"] == 2


def test_one_that_diverges_is_named_and_leaves_nothing(task: PrefixTask, worker: ModelWorker) -> None:
    result = worker.train_prefixes(replace(task, training={**TRAINING, "learning_rate": 1e30}))
    assert result["adapters"] == 0
    assert result["failed"]["ada"] == "ada: training diverged: it became NaN. Lower the learning rate."
    assert not Path(task.groups[0].folder, "adapter_model.safetensors").exists()


def test_one_whose_last_step_broke_it_is_named_and_leaves_nothing(task: PrefixTask, worker: ModelWorker) -> None:
    result = worker.train_prefixes(
        replace(task, training={**TRAINING, "epochs": 1, "batch_size": 6, "warmup": 0, "learning_rate": 1e39})
    )
    assert (result["adapters"], result["failed"].keys()) == (0, {"ada", "bob"})
    assert not any(Path(group.folder, "manifest.json").exists() for group in task.groups)


def test_an_item_can_be_watched_while_it_trains(
    task: PrefixTask, worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from inside, where memory holds five rows: each of the 8 steps, and what was said."""
    told: list[str] = []
    lines: list[str] = []
    live = LiveTrainings(told.append)
    live.expect([Item("train/prefix/0000", "model", "train_prefixes", task)])
    rows = Prefixes.rows

    def looked(self: Prefixes, index: Any) -> Any:
        lines.extend(live.lines(["train/prefix/0000"]))
        if len(index) > 5:
            raise MemoryError
        return rows(self, index)

    monkeypatch.setattr(Prefixes, "rows", looked)
    monkeypatch.setattr(training_progress, "EVERY_S", 0.0)
    result = worker.train_prefixes(task)
    assert result["said"] == ["memory ran out at 3 rows of an adapter at once: 1 from now on, accumulated"]
    assert told == [f"train/prefix/0000: {result['said'][0]}"]
    seen = list(dict.fromkeys(line.split(",")[0] for line in lines))
    assert seen == [f"2 prefixes of train/prefix/0000: {100 * step // 8} %" for step in range(1, 8)]
    assert not Path(task.folder).exists()


def test_epochs_are_chosen_by_their_trials(
    task: PrefixTask, worker: ModelWorker, evaluate_task: EvaluateTask, tmp_path: Path
) -> None:
    trials = []
    for epochs, persona in ((1, "ada"), (2, "bob")):
        folder = str(tmp_path / "trials" / str(epochs))
        Path(folder).mkdir(parents=True)
        Path(folder, "summary.json").write_text(json.dumps({"mean": {"similarity": epochs / 10}}))
        Path(folder, "manifest.json").write_text(json.dumps({"key": "k", "files": {}, "persona": persona}))
        trials.append(Trial(epochs, f"{folder}-adapters", folder))
    chosen = replace(task, training={**TRAINING, "epochs": [1, 2]}, trials=tuple(trials))
    worker.train_prefixes(chosen)
    manifest = read_manifest(task.groups[0].folder)
    assert manifest is not None
    assert manifest["steps"] == 4
    assert manifest["epochs_chosen"] == {"chosen": 2, "by": "own", "tried": {"1": 0.1, "2": 0.2}}


def test_nobody_without_examples_gets_a_prefix(task: PrefixTask, worker: ModelWorker) -> None:
    with pytest.raises(PersonaError, match="cyd: has no training examples"):
        worker.train_prefixes(replace(task, groups=(TrainGroup("cyd", "/nowhere", ("cyd",)),)))
    with pytest.raises(ModelError, match="a prefix of 127 tokens leaves 1 of the model's 128 places"):
        worker.train_prefixes(replace(task, tokens=127))


def test_prefixes_answer_beside_the_base(
    task: PrefixTask, worker: ModelWorker, evaluate_task: EvaluateTask, tiny_llama: Path
) -> None:
    """Each persona's answers are those that PEFT generates with its prefix, one by one; cyd has the base's."""
    worker.train_prefixes(task)
    own = tuple(AnswerSource(group.name, "prefix", location=group.folder) for group in task.groups)
    evaluation = replace(evaluate_task, sources=(*own, AnswerSource("cyd", "base")))
    assert worker.evaluate(evaluation)["failed"] == {}
    table = pq.read_table(Path(evaluation.folder, "generations.parquet")).to_pylist()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = worker.base.tokenizer
    wrapped: Any = {group.name: PeftModel.from_pretrained(model, group.folder) for group in task.groups}
    for row in table:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = wrapped.get(row["persona"], model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert row["generated"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert len({row["generated"] for row in table}) > 3


def test_a_prefix_that_cannot_be_used_fails_its_own_persona(
    task: PrefixTask, worker: ModelWorker, evaluate_task: EvaluateTask, saved: Any
) -> None:
    worker.train_prefixes(task)
    place = task.groups[0].folder
    sources = (
        AnswerSource("ada", "prefix", location=place),
        AnswerSource("bob", "prefix", location=saved("lora", 1)),
        AnswerSource("cyd", "prefix", location="/nowhere"),
    )
    failed = worker.evaluate(replace(evaluate_task, sources=sources))["failed"]
    assert failed.keys() == {"bob", "cyd"}
    assert "is no prefix" in failed["bob"]
    wide = {**evaluate_task.generation, "max_new_tokens": 124}
    failed = worker.evaluate(replace(evaluate_task, sources=sources[:1], generation=wide))["failed"]
    assert failed == {"ada": "ada: a prefix of 5 tokens leaves 123 of the model's 128 places."}
