import pickle

import pytest
from pydantic import ValidationError

from raymerge.config import GROUPINGS, load_project, parse_size
from raymerge.errors import ProjectError
from raymerge.models.router_training import RouterSettings
from raymerge.pipelines.job import worker_kinds
from raymerge.routing.router_shape import RouterShape


def write(folder, text):
    (folder / "p.yaml").write_text(text)
    return str(folder / "p.yaml")


def test_every_path_starts_at_the_workspace(tmp_path):
    project = load_project(write(tmp_path, "workspace: ws\nadapters: a/{persona}/v7\n"))
    assert project.workspace == str(tmp_path / "ws")
    assert project.adapter_location("ann") == str(tmp_path / "ws/a/ann/v7")
    assert project.adapter_location("unified") == str(tmp_path / "ws/unified")
    assert project.adapter_location("cluster_02") == str(tmp_path / "ws/clusters/cluster_02")
    assert project.run_folder("x") == str(tmp_path / "ws/runs/x")


def test_a_workspace_may_be_a_bucket(tmp_path):
    project = load_project(write(tmp_path, "workspace: s3://bucket/team\n"))
    assert project.run_folder("x") == "s3://bucket/team/runs/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptors: x", r"unknown key `adaptors`. Did you mean adapters\?\nAllowed: .*adapters.*base_model"),
        ("training: {rnak: 8}", r"unknown key `training.rnak`. Did you mean rank\?\nAllowed: adapters_per_item, alpha"),
        ("training: {rank: 0}", "`training.rank`: .*found 0"),
        ("training: {epochs: {persona: 3}}", "one for each of persona, cluster, unified"),
        ("adapters: a", "must hold {persona}"),
        ("generation: {prompt_format: 'Q:'}", "must be `chat` or a text with {prompt}"),
        ("hardware: {expert_cache: lots}", "is not a size"),
        ("hardware: {gpus_per_model: 1.5}", r"`hardware.gpus_per_model`: give a share of one GPU \(0.5\), or a whole"),
        ("hardware: {gpus_per_model: -1}", "`hardware.gpus_per_model`: give a share"),
        ("router: {netwrk: mlp}", r"unknown key `router.netwrk`. Did you mean network\?\nAllowed: candidates, "),
        ("router: {network: deep}", "`router.network`: Input should be 'bilinear' or 'mlp'"),
        ("router: {k: 0}", "`router.k`: .*found 0"),
        ("router: {layers: 1}", "`router.layers`: one group has no offset from another"),
        ("router: {held_out: -1}", "`router.held_out`: give names of personas, or how many are drawn; found -1"),
        ("router: {held_out: ann}", "`router.held_out`: give names of personas"),
        ("router: {experts_memory: lots}", "`router.experts_memory`: 'lots' is not a size"),
        ("recipes: {router: {strategy: own}}", "'router' is taken by the report"),
        ("hardware: {quantization: 3bit}", "`hardware.quantization`: Input should be 'none', '8bit' or '4bit'"),
        ("recipes: {../x: {strategy: own}}", "cannot be the name of a folder"),
        ("recipes: {plots: {strategy: own}}", "'plots' is taken by the report"),
        ("1: x", "unknown key `1`"),
        ("training: {1: 2}", r"unknown key `training.1`"),
        ("a: [", "is not YAML"),
        ("just text", "is not a project file"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, message):
    with pytest.raises(ProjectError, match=message):
        load_project(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "`personas`: must be a path, or a mapping with `path`; found 3"),
        ("{persona: user}", "`personas.path`: Field required"),
        (
            "{path: a, promt: x}",
            r"unknown key `personas.promt`. Did you mean prompt\?\nAllowed: messages, path, persona",
        ),
        ("{path: a, messages: m, prompt: x}", "give `messages`, or `prompt` and `response`"),
        ("{path: a, split: 7}", "`personas.split`: must be a column, or a mapping with `column` or `by`; found 7"),
        ("{path: a, split: {by: size}}", "`personas.split.by`: Input should be 'time', 'order' or 'random'"),
        ("{path: a, split: {by: time}}", "`by: time` needs `column`"),
        ("{path: a, split: {by: order, column: x}}", "`by: time` needs `column`"),
        (
            "{path: a, split: {by: random, sed: 0}}",
            r"`personas.split.sed`. Did you mean seed\?\nAllowed: by, column, seed",
        ),
        (
            "{path: a, split: {colum: x}}",
            r"`personas.split.colum`. Did you mean column\?\nAllowed: column, test, train",
        ),
        ("{path: a, split: {by: order, test: 0.5, validation: 0.5}}", "their sum must be below 1"),
        ("{path: a, split: {train: [x], test: x}}", "'x' is given for two splits"),
    ],
)
def test_a_mapping_of_personas_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ProjectError, match=message):
        load_project(write(tmp_path, f"personas: {text}"))


def test_personas_are_a_path_or_a_mapping(tmp_path):
    assert load_project(write(tmp_path, "output: runs")).personas is None
    plain = load_project(write(tmp_path, "personas: p.jsonl")).personas
    assert plain == load_project(write(tmp_path, "personas: {path: p.jsonl, split: split}")).personas
    text = "personas: {path: p.jsonl, split: {column: part, validation: dev, test: [held, test2]}}"
    assert load_project(write(tmp_path, text)).personas.split.meanings() == {
        "train": "train", "validation": "validation", "test": "test",
        "dev": "validation", "held": "test", "test2": "test",
    }  # fmt: skip
    made = load_project(write(tmp_path, "personas: {path: p.jsonl, split: {by: time, column: said}}")).personas
    assert (made.split.validation, made.split.test) == (0.2, 0.2)
    for source in (plain, made):
        assert pickle.loads(pickle.dumps(source)) == source
        assert hash(source) == hash(source.model_copy())


@pytest.mark.parametrize(
    ("given", "gpus", "each"), [("auto", "auto", 1), ("0.5", 0.5, 1), ("0", 0, 1), ("1", 1, 1), ("2", 2, 2)]
)
def test_gpus_and_bits_of_a_model_reach_its_worker(tmp_path, given, gpus, each):
    project = load_project(write(tmp_path, f"hardware: {{gpus_per_model: {given}, quantization: 4bit}}\n"))
    _, model = worker_kinds(project, "base")
    assert model.num_gpus == gpus
    assert (model.arguments["gpus"], model.arguments["quantization"]) == (each, "4bit")


def test_a_router_is_what_its_shape_and_its_training_are_unless_a_project_says(tmp_path):
    section = load_project(write(tmp_path, "output: runs")).router
    elsewhere = {**vars(RouterShape()), **vars(RouterSettings())}
    of_personas = {"size", "experts"}
    assert {name: value for name, value in section if name in elsewhere} == {
        name: value for name, value in elsewhere.items() if name not in of_personas
    }
    assert {name for name, _ in section} - elsewhere.keys() == {
        "held_out", "trials", "merge_rank", "checkpoint_every", "experts_memory",
    }  # fmt: skip


@pytest.mark.parametrize(("text", "held_out"), [("[bob, ann, 7]", ("bob", "ann", "7")), ("3", 3), ("[]", ())])
def test_who_is_held_out_is_named_or_counted(tmp_path, text, held_out):
    project = load_project(write(tmp_path, f"router: {{held_out: {text}}}"))
    assert project.router.held_out == held_out
    assert project.router_folder() == str(tmp_path / "runs/router")


def test_a_recipe_may_be_named_by_a_number(tmp_path):
    assert set(load_project(write(tmp_path, "recipes: {2024: {strategy: own}}")).recipes) == {"2024"}


def test_a_missing_file_names_the_way_to_one(tmp_path):
    with pytest.raises(ProjectError, match="raymerge init"):
        load_project(str(tmp_path / "none.yaml"))


def test_a_project_is_frozen(tmp_path):
    project = load_project(write(tmp_path, "output: runs"))
    with pytest.raises(ValidationError):
        project.output = "elsewhere"


def test_settings_of_a_grouping_are_single_numbers(tmp_path):
    epochs = "epochs: {persona: [8, 12], cluster: 8, unified: 3}, epochs_chosen_by: neighbours"
    text = f"training: {{{epochs}, learning_rate: 0.001}}"
    training = load_project(write(tmp_path, text)).training
    assert [training.of(g).epochs for g in GROUPINGS] == [(8, 12), 8, 3]
    assert [training.of(g).tries_neighbours for g in GROUPINGS] == [True, False, False]
    assert not training.of("persona").with_epochs(8).tries_neighbours
    assert training.of("cluster").learning_rate == 0.001


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("500 MB", 500 * 10**6), ("4096", 4096), ("1.5kb", 1500), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
