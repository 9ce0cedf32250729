"""A router that learns through the frozen base: it finds who fits, keeps its limits, and goes on where it was."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import ModelError
from raymerge.merging.gram import gram
from raymerge.merging.merge import merge
from raymerge.merging.scale import MOST_OFFSET, by_depth, parse_offsets
from raymerge.merging.settings import depths, value_at
from raymerge.models.base import BaseModel
from raymerge.models.layers import linear_modules
from raymerge.models.multilora import MultiLora
from raymerge.models.router_learned import Routing
from raymerge.models.router_passes import Passes, bytes_by_module
from raymerge.models.router_training import Learner, RouterSettings, TrainedRouter
from raymerge.models.training.rows import Limits, Taken, encode
from raymerge.models.training.settings import TrainingSettings
from raymerge.routing.clusters import Clusters
from raymerge.routing.embeddings import make_embeddings
from raymerge.routing.inputs import RoutingInputs, check_inputs, make_space
from raymerge.routing.router import find_candidates, make_network
from tests.models.router_world import (
    ANSWERS,
    PER_GROUP,
    SETTINGS,
    SHAPE,
    InterruptedTrainingError,
    Watch,
    World,
    learner,
    make_world,
    with_random_experts,
)

COUNT = 2 * PER_GROUP
MLP = replace(SHAPE, network="mlp", hidden=8, experts=tuple(f"p{i}" for i in range(COUNT)))


@pytest.fixture(scope="module")
def made(fixed_base: BaseModel) -> World:
    return make_world(fixed_base)


@pytest.fixture
def world(made: World) -> World:
    return replace(made, loads=[])


def assert_same_router(found: TrainedRouter, wanted: TrainedRouter) -> None:
    assert replace(found, network=wanted.network) == wanted
    for name, tensor in wanted.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor)


def own_group(table: Any) -> float:
    """The share of the weights that stays within the group, mean over personas."""
    numbers = np.arange(COUNT)
    return float((table * (numbers[:, None] % 2 == numbers % 2)).sum(1).mean())


class Pass(NamedTuple):
    """A pass through the model. personas: of its batch, in whose order the groups of a pass stand if it is the only
    one. experts: names, int64 (groups, k) into them, and weights (groups, k). factors: by module."""

    personas: list[int]
    names: tuple[str, ...]
    experts: Tensor
    weights: Tensor
    factors: dict[str, float]


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pass]]:
    """Every pass through the model."""
    found: list[Pass] = []
    batch: list[int] = []
    original = MultiLora.weighted

    def weighted(lora: MultiLora, experts: Tensor, weights: Tensor, factors: Mapping[str, Tensor] | None = None) -> Any:
        own = {name: float(factor.detach()) for name, factor in (factors or {}).items()}
        found.append(Pass(list(batch), lora.names, experts.clone(), weights.detach().clone(), own))
        return original(lora, experts, weights, factors)

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(passes: Passes, personas: Sequence[int], *more: Any) -> Any:
            batch[:] = personas
            return method(passes, personas, *more)

        return noted

    with monkeypatch.context() as patch:
        patch.setattr(MultiLora, "weighted", weighted)
        for name in ("losses", "validation"):
            patch.setattr(Passes, name, noting(getattr(Passes, name)))
        yield found


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, weighting="entmax"), MLP], ids=["bilinear", "entmax", "mlp"])
def test_the_router_finds_the_experts_that_fit(world: World, shape: Any) -> None:
    watch = Watch()
    chosen = replace(SETTINGS, epochs=10)
    trained = world.train(chosen, shape, watch)
    untrained = replace(trained, network=make_network(shape, chosen.seed))
    assert own_group(world.weights(untrained, shape)) < 0.6
    assert own_group(world.weights(trained, shape)) > 0.85
    validation = [epoch["validation"] for epoch in trained.history]
    assert validation[trained.best_epoch] == min(validation) < 0.6 * validation[0]
    assert trained.history[-1]["loss"] < 0.6 * trained.history[0]["loss"]
    assert [step.step for step in watch.steps] == list(range(1, watch.steps[-1].steps + 1))
    assert watch.steps[-1].epoch == chosen.epochs == len(trained.history) - 1
    assert watch.steps[-1].validation == validation[-1]
    assert trained.scale != 1
    assert trained.layers == ()


def test_the_model_is_as_it_was(world: World) -> None:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = world.base.model(input_ids=ids).logits
    world.train(replace(SETTINGS, epochs=1))
    assert not any("forward" in layer.__dict__ for layer in linear_modules(world.base.model).values())
    with torch.inference_mode():
        assert torch.equal(world.base.model(input_ids=ids).logits, before)


KINDS: dict[str, tuple[RouterSettings, Any, int | None]] = {
    "plain": (replace(SETTINGS, epochs=2), SHAPE, None),
    "everything": (
        replace(SETTINGS, epochs=3, weight_decay=0.1, entropy=0.02, patience=1, layers=2, clip=0.1),
        replace(SHAPE, max_in_degree=3, weighting="entmax", candidates=3),
        5,
    ),
    "mlp": (replace(SETTINGS, epochs=2, layers=3), replace(MLP, max_in_degree=5), None),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_interrupted_after_any_step_ends_with_the_same_bytes(world: World, kind: str) -> None:
    chosen, shape, experts = KINDS[kind]
    known = world.candidates(most=3) if experts else world.candidates()
    options: dict[str, Any] = {
        "candidates": known,
        "experts_bytes": experts and experts * bytes_of(world.experts[0]),
    }
    whole = Watch(wanted=frozenset(range(1, 99)))
    wanted = world.train(chosen, shape, whole, **options)
    steps, of_epoch = len(whole.steps), whole.steps[0].steps // chosen.epochs
    assert len(whole.states) == steps - 1  # none when nothing is left to do
    for place in sorted({1, of_epoch - 1, of_epoch, of_epoch + 1, steps - 1}):
        later = Watch(wanted=frozenset(range(1, 99)))
        assert_same_router(world.train(chosen, shape, later, whole.states[place - 1], **options), wanted)
        assert later.steps == whole.steps[place:]
        assert later.states == whole.states[place:]
    stopped = Watch(wanted=frozenset([2]), stop=True)
    with pytest.raises(InterruptedTrainingError):
        world.train(chosen, shape, stopped, **options)
    assert stopped.states == whole.states[1:2]


def bytes_of(expert: LoraAdapter) -> int:
    return sum(4 * header.rank * sum(header.shape) for header in expert.headers.values())


def test_a_state_of_another_training_is_refused(world: World) -> None:
    watch = Watch(wanted=frozenset([1]))
    world.train(replace(SETTINGS, epochs=1), watch=watch)
    with pytest.raises(ModelError, match=r"is of another training; what differs: settings\.\nGo on with the same"):
        world.train(replace(SETTINGS, epochs=2), state=watch.states[0])
    with pytest.raises(ModelError, match="what differs: candidates"):
        world.train(replace(SETTINGS, epochs=1), state=watch.states[0], candidates=world.candidates(most=5))
    with pytest.raises(ModelError, match=r"checkpoint of a router: cannot be read\."):
        world.train(replace(SETTINGS, epochs=1), state=watch.states[0][:-1])


def test_nobody_runs_with_its_own_expert(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(one.name for one in world.learners)
    labels = {name: f"cluster_{i % 2}" for i, name in enumerate(names)}
    inputs = RoutingInputs(names, names, make_embeddings(names, world.vectors), Clusters(labels))
    known = find_candidates(make_space(check_inputs(inputs), centred=False)[0], SHAPE)
    with recorded(monkeypatch) as passes:
        world.train(replace(SETTINGS, epochs=2, personas_per_step=1), candidates=known)
    ran: dict[int, set[str]] = {}
    for one in passes:
        (persona,), (experts,), (weights,) = one.personas, one.experts, one.weights
        ran.setdefault(persona, set()).update(one.names[i] for i in experts[weights > 0].tolist())
    assert sorted(ran) == list(range(COUNT))
    for persona, met in ran.items():
        assert len(met) >= SHAPE.k
        assert names[persona] not in met
    alone = replace(world, learners=tuple(one if i == 2 else Learner(one.name) for i, one in enumerate(world.learners)))
    alone.loads.clear()
    alone.train(replace(SETTINGS, epochs=1))
    assert alone.loads == [tuple(i for i in range(COUNT) if i != 2)]


def test_shards_have_the_same_candidates_and_learn_as_much(world: World) -> None:
    known, chosen = world.candidates(most=3), replace(SETTINGS, epochs=8)
    shape, watch = replace(SHAPE, k=3), Watch()
    whole = world.train(chosen, shape, candidates=known)
    assert world.loads == [tuple(range(COUNT))]
    world.loads.clear()
    parts = world.train(chosen, shape, watch, candidates=known, experts_bytes=5 * bytes_of(world.experts[0]))
    shards = set(world.loads)
    assert len(shards) > 1
    assert max(map(len, shards)) <= 5
    assert set().union(*shards) == set(range(COUNT))
    assert watch.texts == [
        f"experts do not fit into memory together: {len(shards)} shards of up to {max(map(len, shards))}, in turn"
    ]
    for key in ("validation", "entropy"):
        assert parts.history[0][key] == pytest.approx(whole.history[0][key], rel=1e-5)
    best, gained = whole.history[whole.best_epoch]["validation"], whole.history[0]["validation"]
    assert parts.history[parts.best_epoch]["validation"] - best < 0.1 * (gained - best)
    # before training, then each epoch's steps and its validation; the resident shard is never loaded again
    assert len(world.loads) <= len(shards) * (1 + 2 * chosen.epochs)
    assert all(one != other for one, other in itertools.pairwise(world.loads))
    with pytest.raises(ModelError, match=r"the 3 candidates of one persona do not fit .* room for 2 experts"):
        world.train(chosen, shape, candidates=known, experts_bytes=2 * bytes_of(world.experts[0]))


def test_no_expert_serves_more_than_it_may(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPE, k=2, max_in_degree=2)
    with recorded(monkeypatch) as passes:
        world.train(replace(SETTINGS, epochs=3, personas_per_step=COUNT), shape)
    served = [torch.bincount(one.experts[one.weights > 0], minlength=COUNT).max() for one in passes]
    assert max(served) == 2
    with recorded(monkeypatch) as passes:
        world.train(replace(SETTINGS, epochs=3, personas_per_step=COUNT), replace(shape, max_in_degree=None))
    assert max(torch.bincount(one.experts.flatten(), minlength=COUNT).max() for one in passes) > 2


def test_who_is_held_out_is_never_looked_at(world: World) -> None:
    chosen, shape = replace(SETTINGS, epochs=2), replace(SHAPE, max_in_degree=3)
    learners = tuple(Learner(one.name) if i in (1, 4) else one for i, one in enumerate(world.learners))
    some = replace(world, learners=learners)
    known = world.candidates()
    other = replace(known, experts=known.experts.copy(), near=known.near.copy(), same=known.same.copy())
    for part in (other.experts, other.near, other.same):
        part[[1, 4]] = part[[1, 4], ::-1]
    assert_same_router(
        some.train(chosen, shape, candidates=other), some.train(chosen, shape, candidates=known)
    )  # fmt: skip


def test_the_bonus_raises_the_entropy(world: World) -> None:
    plain, spread = (world.train(replace(SETTINGS, epochs=8, entropy=bonus)) for bonus in (0.0, 1.0))
    assert spread.history[0] == plain.history[0]
    assert plain.history[-1]["entropy"] < 0.9 * plain.history[0]["entropy"]
    assert spread.history[-1]["entropy"] > 1.2 * plain.history[-1]["entropy"]
    assert spread.history[-1]["entropy"] <= math.log(SHAPE.k) + 1e-5


def test_offsets_by_depth_are_learned_and_penalised(world: World) -> None:
    free, bound = (world.train(replace(SETTINGS, layers=3, layers_penalty=penalty)) for penalty in (0.0, 100.0))
    sizes = [sum(d * d for d in trained.layers) for trained in (free, bound)]
    assert len(free.layers) == len(bound.layers) == 3
    assert sizes[0] > 1e-2
    assert sizes[1] < 0.05 * sizes[0]


def test_offsets_stay_within_what_a_recipe_may_say(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    some = replace(world, learners=tuple(replace(one, validation=()) for one in world.learners))
    with recorded(monkeypatch) as passes:
        trained = some.train(replace(SETTINGS, layers=3, layers_penalty=0.0, learning_rate=1.0, personas_per_step=1))
    largest = max(abs(math.log(factor)) for one in passes for factor in one.factors.values())
    assert largest == pytest.approx(MOST_OFFSET)
    assert parse_offsets({"layers": list(trained.layers)}) == {"layers": list(trained.layers)}


def test_offsets_mean_the_same_depths_in_a_merge_where_experts_leave_layers_out(
    world: World, base: BaseModel, make_adapter: Callable[..., LoraAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers 0 to 2 of 5: a merge knows of no deeper one, so the third has the last offset."""
    torch.manual_seed(0)
    deeper = AutoModelForCausalLM.from_config(replace_layers(base.model.config, 5)).eval().requires_grad_(False)
    base = replace(base, model=deeper)
    outside = ("layers.3.", "layers.4.")
    whole = [make_adapter(base, number, rank=2) for number in range(COUNT)]
    experts = [
        replace(one, name=f"p{i}", modules={p: m for p, m in one.modules.items() if not any(o in p for o in outside)})
        for i, one in enumerate(whole)
    ]
    chosen = replace(SETTINGS, layers=3, layers_penalty=0.0, epochs=1)
    with recorded(monkeypatch) as passes:
        trained = replace(with_random_experts(world, experts), base=base).train(chosen)
    assert trained.best_epoch == chosen.epochs  # so that the last passes are those of what is returned
    last = passes[-1]
    contributors = [experts[i] for i in last.experts[0].tolist()]
    weights = last.weights[0].tolist()
    merged = merge(contributors, [by_depth(weight, trained.layers) for weight in weights], rank="exact")
    assert max(trained.layers) - min(trained.layers) > 0.05
    for path, module in merged.modules.items():
        parts = zip(weights, contributors, strict=True)
        ran = sum(last.factors[path] * weight * expert.modules[path].delta() for weight, expert in parts)
        torch.testing.assert_close(module.delta(), ran, rtol=1e-4, atol=1e-5)


def replace_layers(config: Any, layers: int) -> Any:
    """A copy of a model's configuration with another number of layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers, changed.layer_types = layers, None
    return changed


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=5))
def test_offsets_mean_what_a_merge_makes_of_them(fixed_base: BaseModel, offsets: list[float]) -> None:
    modules = sorted(linear_modules(fixed_base.model))
    routing = routing_of(fixed_base, replace(SETTINGS, layers=len(offsets)))
    routing.learned.offsets.data = torch.tensor(offsets)
    products, weights = torch.eye(3), torch.full((1, 2), 0.5)
    found = routing.mixtures(torch.tensor([[0, 2]]), weights, np.arange(3), products).factors
    assert found is not None
    wanted = [value_at(by_depth(1.0, offsets), path, depth, 1.0) for path, depth in sorted(depths(modules).items())]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def routing_of(base: BaseModel, chosen: RouterSettings) -> Routing:
    world = World(base, (), (), np.eye(4, 12, dtype=np.float32))
    known = replace(world, experts=(LoraAdapter("p", {}),) * 4).candidates()
    vectors = (world.vectors, world.vectors)
    return Routing(SHAPE, chosen, vectors, known, sorted(linear_modules(base.model)), base.device)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1), st.floats(-0.5, 0.5))
def test_a_mixture_has_the_norm_of_its_experts(
    fixed_base: BaseModel, made: World, shares: list[float], log_scale: float
) -> None:
    experts, weights = [1, 4, 6], torch.tensor([shares]) / sum(shares)
    products = gram([made.experts[i] for i in experts])
    routing = routing_of(fixed_base, SETTINGS)
    routing.learned.log_scale.data.fill_(log_scale)
    found = routing.mixtures(torch.tensor([experts]), weights, np.array(experts), products.float()).weights.detach()
    norm = float((found.double() @ products @ found.double().T).sqrt())
    assert norm == pytest.approx(math.exp(log_scale) * float(weights.double() @ products.diagonal().sqrt()), rel=1e-4)


def test_gradients_are_those_of_finite_differences(world: World) -> None:
    known, chosen = world.candidates(), replace(SETTINGS, layers=2)
    names = [one.name for one in world.learners]
    modules = tuple(bytes_by_module(world.base, range(COUNT), world.by_number()))
    passes = Passes(world.base, names, world.by_number(), modules, Limits(), 2, print)
    routing = Routing(SHAPE, chosen, (world.vectors, world.vectors), known, passes.modules, world.base.device)
    rows = [encode(world.base, one.rows, TrainingSettings(), one.name) for one in world.learners]
    taken = {place: Taken(own, np.arange(len(own))) for place, own in enumerate(rows)}
    everyone, resident = list(range(COUNT)), np.arange(COUNT)
    dice = torch.Generator().manual_seed(1)
    for parameter in routing.learned.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=dice)
    with passes.ready():
        products = gram(world.experts).float()
        passes.bring(shard_of(resident))

        def loss() -> Tensor:
            with torch.no_grad():
                mixtures = routing.mixtures(*routing.weights(everyone, None), resident, products)
                return passes.validation(everyone, taken, mixtures).double().mean()

        mixtures = routing.mixtures(*routing.weights(everyone, None), resident, products)
        found = passes.losses(everyone, taken, mixtures)
        assert float(found.losses.double().mean()) == pytest.approx(float(loss()), rel=1e-5)
        assert mixtures.factors is not None
        assert found.factors is not None
        ((mixtures.weights * found.weights).sum() + (mixtures.factors * found.factors).sum()).backward()
        for name, parameter in routing.learned.named_parameters():
            assert parameter.grad is not None
            direction = parameter.grad / parameter.grad.norm()
            values = []
            for step in (0.02, -0.02):
                parameter.data += step * direction
                values.append(float(loss()))
                parameter.data -= step * direction
            assert (values[0] - values[1]) / 0.04 == pytest.approx(float(parameter.grad.norm()), rel=0.02), name


def shard_of(experts: Any) -> Any:
    from raymerge.models.router_rows import Shard

    return Shard(experts, experts)


def test_the_best_epoch_is_kept_and_patience_ends_it(world: World) -> None:
    """Validation answers are the other group's: what is learned makes them worse."""
    swapped = tuple(
        replace(one, validation=learner(i, answers=ANSWERS[::-1]).validation) for i, one in enumerate(world.learners)
    )
    other, watch = replace(world, learners=swapped), Watch()
    long = other.train(replace(SETTINGS, epochs=6), watch=watch)
    assert len(long.history) == 7
    assert long.history[-1]["validation"] > long.history[0]["validation"]
    early = Watch()
    short = other.train(replace(SETTINGS, epochs=6, patience=2), watch=early)
    assert len(short.history) == 1 + short.best_epoch + 2
    assert short.history == long.history[: len(short.history)]
    assert early.steps == watch.steps[: len(early.steps)]
    kept = [one["validation"] for one in long.history]
    assert long.best_epoch == kept.index(min(kept))
    if long.best_epoch == 0:
        first = make_network(SHAPE, SETTINGS.seed).state_dict()
        assert all(torch.equal(long.network.state_dict()[name], tensor) for name, tensor in first.items())
        assert long.scale == 1


def test_without_validation_the_last_epoch_is_kept(world: World) -> None:
    some = replace(world, learners=tuple(replace(one, validation=()) for one in world.learners))
    watch = Watch()
    trained = some.train(replace(SETTINGS, epochs=2), watch=watch)
    assert trained.best_epoch == 2
    assert all(set(epoch) == {"loss", "entropy"} for epoch in trained.history)
    assert watch.steps[-1].validation is None
    with pytest.raises(ModelError, match=r"no persona has validation examples, and router\.patience is 1\."):
        some.train(replace(SETTINGS, patience=1))


def test_what_is_not_finite_is_named(world: World, base: BaseModel) -> None:
    base.model.get_input_embeddings().weight.data[base.tokenizer.convert_tokens_to_ids("w15")] = math.nan
    rows = (*world.learners[2].rows[:3], ("w30 w15 w31", "w5 w6"), *world.learners[2].rows[3:])
    learners = [replace(one, rows=rows) if i == 2 else one for i, one in enumerate(world.learners)]
    spoilt = replace(world, base=base, learners=tuple(learners))
    with pytest.raises(
        ModelError, match=r"^p2: the loss of its answer 'w5 w6' is not finite\.\nIts prompt or an expert"
    ):
        spoilt.train(replace(SETTINGS, epochs=1))
    huge = {path: LoraModule(m.A * 1e25, m.B * 1e25, 1.0) for path, m in world.experts[3].modules.items()}
    experts = [LoraAdapter("p3", huge) if i == 3 else one for i, one in enumerate(world.experts)]
    with pytest.raises(ModelError, match="p3: the norm of what it adds to the base is not finite"):
        with_random_experts(world, experts).train(replace(SETTINGS, epochs=1))
    with pytest.raises(ModelError, match=r"not finite (after|in) step \d+\.\nIt has diverged: lower router\.learning"):
        world.train(replace(SETTINGS, learning_rate=3e37, clip=1e30))


def test_rows_that_memory_has_no_room_for_go_in_turn(world: World) -> None:
    chosen = replace(SETTINGS, epochs=2)
    wanted = world.train(chosen)

    def check(_module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    watch, later = Watch(wanted=frozenset([2])), Watch()
    hook = world.base.model.model.layers[0].register_forward_pre_hook(check)
    try:
        found = world.train(chosen, watch=watch)
        assert_same_router(world.train(chosen, watch=later, state=watch.states[0]), found)
    finally:
        hook.remove()
    assert sorted(watch.texts) == [
        "memory ran out at the rows of a persona: 1 at once from now on, accumulated",
        "memory ran out at the rows of several personas: those of 1 from now on, in turn",
    ]
    assert later.texts == []
    for name, tensor in wanted.network.state_dict().items():
        torch.testing.assert_close(found.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("weighted", [
            "memory runs out at one row of one persona, beside 8 experts (1 MiB).",
            "CUDA out of memory. Tried to allocate 2 GiB.",
            "Set router.experts_memory so that fewer experts are in memory at a time, lower router.k, or set "
            "hardware.dtype to one of fewer bytes; a larger GPU helps too.",
        ]),
        ("load", [
            "8 experts do not fit into memory together.",
            "CUDA out of memory. Tried to allocate 2 GiB.",
            "Set router.experts_memory to less than is free, or lower router.candidates.",
        ]),
    ],
)  # fmt: skip
def test_what_memory_cannot_hold_is_told_with_what_a_router_could_change(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str, told: list[str]
) -> None:
    def run_out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(MultiLora, method, run_out)
    with pytest.raises(ModelError) as caught:
        world.train()
    assert str(caught.value).splitlines() == told
    assert not any("forward" in layer.__dict__ for layer in linear_modules(world.base.model).values())


def test_an_error_that_is_not_of_memory_stays_what_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(MultiLora, "load", break_down)
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal memory access"):
        world.train()


def test_a_base_in_bfloat16_learns_too(world: World, base: BaseModel) -> None:
    exact = world.train(replace(SETTINGS, epochs=6))
    half = replace(world, base=replace(base, model=base.model.bfloat16(), dtype=torch.bfloat16))
    rounded = half.train(replace(SETTINGS, epochs=6))
    losses = [trained.history[-1]["validation"] for trained in (rounded, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in rounded.network.state_dict().values())


def test_experts_of_a_conv1d_base(
    world: World, gpt2: BaseModel, make_adapter: Callable[..., LoraAdapter]
) -> None:  # fmt: skip
    experts = [make_adapter(gpt2, number, rank=1 + number % 3) for number in range(COUNT)]
    trained = replace(with_random_experts(world, experts), base=gpt2).train(replace(SETTINGS, layers=2))
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, r"router\.epochs is 0\.\nExpected a number above 0"),
        ({"learning_rate": math.nan}, r"router\.learning_rate is nan\.\nExpected a finite number"),
        ({"layers": 1}, r"router\.layers is 1\.\nExpected 0, or 2 and more"),
        ({"patience": 0}, r"router\.patience is 0\."),
        ({"layers_penalty": -1.0}, r"router\.layers_penalty is -1\.0\.\nExpected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(world: World, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        world.train(replace(SETTINGS, **wrong))


def test_inputs_that_do_not_fit_are_refused(world: World) -> None:
    with pytest.raises(ModelError, match="queries have 8 rows for 7 personas"):
        replace(world, learners=world.learners[:7]).train()
    with pytest.raises(ModelError, match="the mlp has 7 outputs for 8 experts"):
        world.train(shape=replace(MLP, experts=MLP.experts[:7]))
    with pytest.raises(ModelError, match="no persona has training examples"):
        replace(world, learners=tuple(Learner(one.name) for one in world.learners)).train()
    known = world.candidates()
    nobody = replace(known, experts=np.full_like(known.experts, -1))
    with pytest.raises(ModelError, match="no persona with training examples has an expert to choose from"):
        world.train(candidates=nobody)
    only = replace(known, experts=known.experts.copy())
    only.experts[:7] = -1
    learners = (*world.learners[:7], replace(world.learners[7], rows=()))  # who validates, and teaches nothing
    with pytest.raises(ModelError, match="no persona with training examples has an expert to choose from"):
        replace(world, learners=learners).train(candidates=only)


def test_who_has_no_expert_to_choose_from_is_named(world: World) -> None:
    known, watch = world.candidates(), Watch()
    for lonely in (6, 2):
        known.experts[lonely] = -1
        world.train(replace(SETTINGS, epochs=1), watch=watch, candidates=known)
    said = "has no expert to choose from, and the router learns without it"
    assert watch.texts == [f"p6: {said}", f"p2: {said} (2 such personas)"]
