"""The project file: where things are, how models are run, which recipes there are.

Unknown keys are refused with the allowed ones. A recipe is kept as written here and given its meaning in
`raymerge.recipes`, which knows the strategies and methods.
"""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from raymerge import storage
from raymerge.config.examples import SPLIT_KINDS, PersonaSource, SplitNames, SplitShares
from raymerge.config.router import Router
from raymerge.config.search import Search
from raymerge.config.section import Section
from raymerge.config.sizes import parse_size
from raymerge.config.training import GROUPINGS, Grouping, Training
from raymerge.errors import ProjectError, unknown

__all__ = [
    "DEFAULT_ENCODER", "GROUPINGS", "NOT_RUNS", "Clusters", "Embedding", "Evaluation", "Generation", "Grouping",
    "Hardware", "PersonaSource", "Project", "Router", "Search", "Section", "SplitNames", "SplitShares", "Training",
    "load_project", "load_recipes", "parse_size", "run_name_fault",
]  # fmt: skip

NOT_RUNS = ("plots", "report.html", "comparison.json", "tensorboard", "search", "router")  # what lies beside the runs
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


class Clusters(Section):
    """Given by a file, or `count` of them found by k-means on the persona embeddings."""

    count: int = Field(default=5, ge=1)
    seed: int = 0
    file: str | None = None


class Embedding(Section):
    """What a persona's embedding is: a text encoder over its training examples, its adapter's delta, or a file."""

    model: str = DEFAULT_ENCODER
    source: str = "auto"  # auto: texts where there are any, else deltas; texts; deltas; or a parquet file of vectors
    centred: bool = True


class Generation(Section):
    """How a prompt is rendered and an answer is ended. `prompt_format: chat` uses the tokenizer's template."""

    prompt_format: str = "{prompt}"
    max_new_tokens: int = Field(default=64, ge=1)
    stop: tuple[str, ...] = ()

    @field_validator("prompt_format")
    @classmethod
    def _has_prompt(cls, value: str) -> str:
        if value != "chat" and "{prompt}" not in value:
            raise ValueError("must be `chat` or a text with {prompt} in it")
        return value


class Evaluation(Section):
    """How answers are scored and in which portions they are dealt to the workers."""

    similarity_model: str = DEFAULT_ENCODER
    batch_size: int = Field(default=64, ge=1)
    split: Literal["validation", "test"] = "test"
    personas_per_item: int = Field(default=50, ge=1)
    scales: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)  # that `scale: tuned` chooses from, times match_norm
    tuning_examples: int = Field(default=3, ge=1)  # validation examples of a persona that tuning looks at
    tuning_personas: int = Field(default=100, ge=1)  # evenly chosen
    seed: int = 0

    @field_validator("scales")
    @classmethod
    def _some_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(not 0 < scale < float("inf") for scale in value):
            raise ValueError("give one scale or several, each above 0")
        return value


class Hardware(Section):
    """What one worker takes of the Ray cluster, and how many there are at most.

    dtype: what the base computes in; auto is bfloat16 on GPUs that have it, else float32. Factors are kept in float32
    while they are trained, and saved so, whatever it is. float16 has no loss scaling: prefer bfloat16 for training.
    """

    gpus_per_model: float | Literal["auto"] = "auto"  # auto: one where there is any; 2: the base is spread over two
    cpus_per_model: float = Field(default=1, gt=0)
    cpus_per_merge: float = Field(default=1, gt=0)
    max_model_workers: int | None = Field(default=None, ge=1)
    max_merge_workers: int | None = Field(default=None, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"  # of the base, by bitsandbytes: raymerge[quantised]
    expert_cache: str = "256MiB"
    ready_deadline: float = Field(default=600, gt=0)  # seconds; with autoscaling it holds the start of a machine too
    autoscaling: bool = False  # machines are added as workers ask for them: give gpus_per_model and max_*_workers
    max_attempts: int = Field(default=3, ge=1)

    @field_validator("gpus_per_model")
    @classmethod
    def _whole_above_one(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not (0 <= value <= 1 or (value > 1 and value.is_integer())):
            raise ValueError("give a share of one GPU (0.5), or a whole number")
        return value

    @field_validator("expert_cache")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value


class Project(Section):
    """A project file. `location` is where it was read; every relative path starts at `workspace`."""

    location: str
    workspace: str = "."
    base_model: str | None = None
    personas: PersonaSource | None = None
    adapters: str = "adapters/{persona}"
    unified_adapter: str = "unified"
    cluster_adapters: str = "clusters/{cluster}"
    experts: dict[str, str] = Field(default_factory=dict)  # further adapters, for strategy `named`: name -> location
    clusters: Clusters = Clusters()
    embedding: Embedding = Embedding()
    generation: Generation = Generation()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    hardware: Hardware = Hardware()
    output: str = "runs"
    search: Search = Search()
    router: Router = Router()
    recipes: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("personas", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"path": value} if value else None
        if value is None or isinstance(value, (dict, PersonaSource)):
            return value
        raise ValueError("must be a path, or a mapping with `path`")

    @model_validator(mode="after")
    def _placeholders(self) -> Project:
        for key, placeholder in (("adapters", "{persona}"), ("cluster_adapters", "{cluster}")):
            if placeholder not in getattr(self, key):
                raise ValueError(f"{key}: must hold {placeholder}")
        for name in self.experts:
            if name in ("", "all", "base", "unified") or name.startswith("cluster_"):
                raise ValueError(f"experts: the name {name!r} is taken by the adapters of everyone or of a cluster")
        for name in self.recipes:
            fault = run_name_fault(name)
            if fault:
                raise ValueError(f"recipes: {name!r} {fault}")
        return self

    def path(self, location: str) -> str:
        """A location of the project file made absolute."""
        return storage.resolve(self.workspace, location)

    def run_folder(self, recipe: str) -> str:
        """Where a recipe's run lives."""
        return storage.join(self.path(self.output), recipe)

    def shared_folder(self) -> str:
        """What all runs of the output share: embeddings, clusters."""
        return storage.join(self.path(self.output), "_shared")

    def search_folder(self) -> str:
        """Where a search keeps its trials, what it scored, and what it found."""
        return storage.join(self.path(self.output), "search")

    def router_folder(self) -> str:
        """Where the router lies, and how it was tuned."""
        return storage.join(self.path(self.output), "router")

    def adapter_location(self, expert: str) -> str:
        """Where an adapter lies: of a further expert, `unified`, of a cluster (`cluster_03`), of a persona."""
        if expert in self.experts:
            return self.path(self.experts[expert])
        if expert == "unified":
            return self.path(self.unified_adapter)
        if expert.startswith("cluster_"):
            return self.path(self.cluster_adapters.replace("{cluster}", expert))
        return self.path(self.adapters.replace("{persona}", expert))


def run_name_fault(name: str) -> str | None:
    """Why a recipe cannot have this name, which is its run's folder in `output`; None if it can."""
    if not name or name.startswith((".", "_")) or any(c in "/\\" or c.isspace() or not c.isprintable() for c in name):
        return "cannot be the name of a folder: no slash, no space, no leading dot or underscore"
    if name in NOT_RUNS:
        return "is taken by the report, which lies beside the runs"
    return None


def load_project(location: str) -> Project:
    """Read and check a project file. Raises ProjectError with the key and the allowed ones."""
    location = storage.resolve(os.getcwd(), location)
    if not storage.exists(location):
        raise ProjectError(f"{location}: there is no such project file.\n`raymerge init FOLDER` writes one.")
    value = _read_mapping(location, "a project file.\nExpected keys such as base_model, adapters, recipes")
    workspace = storage.resolve(storage.parent(location), str(value.get("workspace", ".")))
    try:
        return Project(**{**value, "location": location, "workspace": workspace})
    except ValidationError as error:
        raise ProjectError(f"{location}: {_explain(error)}") from error


def load_recipes(location: str) -> dict[str, Any]:
    """Read a file of recipes, name -> recipe as a project file has it, such as a search's `best_recipe.yaml`.

    Raises ProjectError if it is not there, is no such file, or a name cannot be a run's.
    """
    location = storage.resolve(os.getcwd(), location)
    if not storage.exists(location):
        raise ProjectError(f"{location}: there is no such file of recipes.")
    expected = "a file of recipes.\nExpected names with a recipe each, such as `best: {strategy: top_k, k: 5}`"
    value = _read_mapping(location, expected)
    if not value or not all(isinstance(recipe, dict) for recipe in value.values()):
        raise ProjectError(f"{location}: is not {expected}.")
    for name in value:
        if fault := run_name_fault(name):
            raise ProjectError(f"{location}: {name!r} {fault}.")
    return value


def _read_mapping(location: str, expected: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(storage.read_bytes(location))
    except yaml.YAMLError as error:
        raise ProjectError(f"{location}: is not YAML.\n{error}") from error
    if not isinstance(value, dict):
        raise ProjectError(f"{location}: is not {expected}.")
    read: dict[str, Any] = _with_text_keys(value)
    return read


def _with_text_keys(value: Any) -> Any:
    """YAML reads the key 2024 as a number; every key of a project file is a name."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(p) for p in problem["loc"] if p not in SPLIT_KINDS) or "project"
        if problem["type"] == "extra_forbidden":
            allowed = _allowed_keys(problem["loc"][:-1])
            lines.append(unknown("key", str(problem["loc"][-1]), allowed, shown=f"`{where}`"))
        else:
            lines.append(f"`{where}`: {problem['msg'].removeprefix('Value error, ')}; found {problem['input']!r}.")
    return "\n".join(lines)


def _allowed_keys(path: tuple[int | str, ...]) -> list[str]:
    models = [Project]
    for part in path:
        fields = [model.model_fields[str(part)] for model in models if part in model.model_fields]
        models = [m for f in fields for m in _sections(f.annotation)] or [m for m in models if m.__name__ == part]
    return sorted({name for model in models for name in model.model_fields if name != "location"})


def _sections(annotation: Any) -> list[Any]:
    """The sections that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections(inner)]
