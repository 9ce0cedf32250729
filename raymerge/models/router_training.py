"""A router trained through the frozen base: the loss of answers flows through the mixtures' weights into its network.

Every row of a batch runs with its persona's mixture of experts that have not seen it: find_candidates leaves a
persona's own adapter out. Experts and base stay as they are; only the network, a scale and offsets by depth learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raymerge import storage
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.router_learned import Routing, digest_arrays, entropy_of
from raymerge.models.router_passes import Experts, Mixtures, Passes, bytes_by_module
from raymerge.models.router_rows import Shard, Step, cut_shards, steps_of_epoch
from raymerge.models.router_settings import (
    Learner,
    RouterProgress,
    RouterSettings,
    RouterWatch,
    TrainedRouter,
    check_training,
)
from raymerge.models.router_state import Course, decode_course, encode_course
from raymerge.models.training.rows import Encoded, Limits, Taken, encode
from raymerge.models.training.settings import TrainingSettings
from raymerge.routing.router import Candidates, RouterShape

__all__ = ["Learner", "RouterProgress", "RouterSettings", "RouterWatch", "TrainedRouter", "train_router"]

_ROWS = TrainingSettings(truncate=True)  # a row that the base has no room for is cut at the start of its prompt


def train_router(
    base: BaseModel,
    learners: Sequence[Learner],
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    candidates: Candidates,
    experts: Experts,
    shape: RouterShape,
    settings: RouterSettings,
    watch: RouterWatch,
    state: bytes | None = None,
    *,
    experts_bytes: int | None = None,
) -> TrainedRouter:
    """Train a router on the rows of those learners that have any.

    queries: (P, d), keys: (N, d), as in Space; row p of queries and candidates belongs to learners[p].
    experts: by their numbers in keys. Weights of a persona: those of `choose`, times match_norm of the experts it
    chose, times a learned scale, times factors by depth if the settings have `layers`: depths are those of a merge of
    all candidates. Loss: mean cross entropy over the answer tokens (the end token included) of a persona's rows in the
    step, mean over personas. Optimiser: AdamW (Loshchilov and Hutter 2019).
    state: a checkpoint to go on from; on one machine the result has the very bytes of a training without interruption.
    experts_bytes: of factors that are resident at a time. Where all candidates are more, personas that share theirs
    learn together, in turn with others; each still has all of its candidates.
    Raises ModelError if settings are impossible, nobody has rows and candidates, a state does not fit, a loss is not
    finite, or memory holds neither the experts together nor one row beside them.
    """
    sizes = {"queries": len(queries), "candidates": len(candidates.experts)}
    outputs = (len(shape.experts), len(keys)) if shape.network == "mlp" else None
    check_training(learners, settings, sizes, outputs)
    training = _Training(base, learners, (queries, keys), candidates, experts, shape, settings, watch, experts_bytes)
    if state is not None:
        training.go_on(state)
    del state
    return training.run()


class _Training:
    """The router that learns, with its optimiser, its course so far, and the model that says how well it does."""

    def __init__(
        self,
        base: BaseModel,
        learners: Sequence[Learner],
        vectors: tuple[NDArray[np.float32], NDArray[np.float32]],
        candidates: Candidates,
        experts: Experts,
        shape: RouterShape,
        settings: RouterSettings,
        watch: RouterWatch,
        experts_bytes: int | None,
    ) -> None:
        self.settings, self.watch, self.course = settings, watch, Course()
        self.rows = [encode(base, one.rows, _ROWS, one.name) if one.rows else None for one in learners]
        self.validation = [
            encode(base, one.validation, _ROWS, f"{one.name}: validation") if one.validation else None
            for one in learners
        ]
        names = [one.name for one in learners]
        self.personas = _who_learns(learners, candidates, watch)
        union = np.unique(candidates.experts[self.personas])
        sizes = bytes_by_module(base, union[union >= 0].tolist(), experts)
        room = None if experts_bytes is None else experts_bytes // max(1, sum(sizes.values()))
        self.shards = _shards(candidates, self.personas, room, watch)
        self.passes = Passes(base, names, experts, list(sizes), Limits(), settings.rows_per_persona, watch.said)
        self.routing = Routing(shape, settings, vectors, candidates, self.passes.modules, base.device)
        self.learned = self.routing.learned
        self.optimiser = torch.optim.AdamW(
            self.learned.parts(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.identity = {
            "personas": storage.digest_value([[one.name, list(one.rows), list(one.validation)] for one in learners]),
            **self.routing.digests,
            "router": shape.as_record(),
            "settings": asdict(settings),
            "shards": digest_arrays(*(part for shard in self.shards for part in (shard.personas, shard.experts))),
            "dtype": str(base.dtype),
        }
        self.epochs: dict[int, list[Step]] = {}
        self.steps_of_epoch = len(self._epoch(0))
        self.steps = self.steps_of_epoch * settings.epochs

    def go_on(self, state: bytes) -> None:
        """Take the place of the training that a checkpoint is of."""
        self.course, learned, moments = decode_course(state, self.identity)
        self.passes.limits = self.course.limits
        self.learned.load_state_dict(dict(learned))
        for name, parameter in self.learned.named_parameters():
            if f"first.{name}" in moments:
                first, second = (moments[f"{moment}.{name}"].to(parameter.device) for moment in ("first", "second"))
                step = torch.tensor(float(self.course.step))
                self.optimiser.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def run(self) -> TrainedRouter:
        """Train to the end."""
        course, settings = self.course, self.settings
        with self.passes.ready():
            if not course.history:
                self._close_epoch()
            while not self._is_done():
                epoch, place = divmod(course.step, self.steps_of_epoch)
                loss, entropy, tokens = self._step(self._epoch(epoch)[place])
                course.step += 1
                course.losses.append(loss)
                if place + 1 == self.steps_of_epoch:
                    self._close_epoch()
                done, validation = course.step / self.steps_of_epoch, course.history[-1].get("validation")
                self.watch.stepped(
                    RouterProgress(course.step, self.steps, done, settings.epochs, loss, validation, entropy), tokens
                )
                if not self._is_done() and self.watch.due():
                    self.watch.save(self._state())
        self.learned.load_state_dict(dict(course.best))
        learned = self.learned.cpu()
        return TrainedRouter(
            network=learned.network,
            scale=math.exp(float(learned.log_scale.detach())),
            layers=tuple(learned.offsets.detach().tolist()),
            history=tuple(course.history),
            best_epoch=course.best_epoch,
        )

    def _is_done(self) -> bool:
        patience = self.settings.patience
        tired = patience is not None and len(self.course.history) - 1 - self.course.best_epoch >= patience
        return tired or self.course.step == self.steps

    def _epoch(self, epoch: int) -> list[Step]:
        if epoch not in self.epochs:
            counts = [0 if own is None else len(own) for own in self.rows]
            together, height = self.settings.personas_per_step, self.settings.rows_per_persona
            self.epochs = {epoch: steps_of_epoch(self.shards, counts, together, height, self.settings.seed, epoch)}
        return self.epochs[epoch]

    def _mixtures(self, number: int, experts: Tensor, weights: Tensor) -> Mixtures:
        shard = self.shards[number]
        found = self.routing.mixtures(experts, weights, shard.experts, self.passes.bring(shard))
        if not bool(torch.isfinite(found.weights.detach()).all()):
            raise ModelError(
                f"the router's weights are not finite after step {self.course.step}.\n"
                "It has diverged: lower router.learning_rate or router.clip."
            )
        return found

    def _step(self, step: Step) -> tuple[float, float, int]:
        """One optimiser step: its loss, the entropy of its weights, the tokens of its rows."""
        personas = [persona for persona, _ in step.taken]
        taken = {place: _taken(self.rows[p], ranks) for place, (p, ranks) in enumerate(step.taken)}
        experts, weights = self.routing.weights(personas, self.course.allowed)
        mixtures = self._mixtures(step.shard, experts, weights)
        found = self.passes.losses(personas, taken, mixtures)
        entropy = entropy_of(weights).mean()
        # what has the gradient of the loss, beside what is added to it
        objective = (mixtures.weights * found.weights).sum() - self.settings.entropy * entropy
        if mixtures.factors is not None and found.factors is not None:
            penalty = self.settings.layers_penalty * self.learned.offsets.square().mean()
            objective = objective + (mixtures.factors * found.factors).sum() + penalty
        self.optimiser.zero_grad()
        torch.autograd.backward(objective)
        norm = float(nn.utils.clip_grad_norm_(self.learned.parameters(), self.settings.clip))
        if not math.isfinite(norm):
            raise ModelError(
                f"the router's gradient is not finite in step {self.course.step + 1}.\n"
                "It has diverged: lower router.learning_rate."
            )
        for part in self.optimiser.param_groups:
            part["lr"] = self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * self.course.step / self.steps))
        self.optimiser.step()
        self.learned.keep_offsets()
        return float(found.losses.mean()), float(entropy.detach()), found.tokens

    @torch.no_grad()
    def _close_epoch(self) -> None:
        """Write down how an epoch went, keep its router if it is the best, and say who may have whom in the next."""
        course, epoch = self.course, len(self.course.history)
        course.allowed = self.routing.allowed(self.personas)
        entry = {"loss": float(np.mean(course.losses)) if epoch else self._loss_of(self._first_rows())}
        validating = {p: own for p in self.personas if (own := self.validation[p]) is not None}
        if validating:
            entry["validation"] = self._loss_of({p: Taken(own, np.arange(len(own))) for p, own in validating.items()})
        entry["entropy"] = float(entropy_of(self.routing.weights(self.personas, course.allowed)[1]).mean())
        best = min((one["validation"] for one in course.history if "validation" in one), default=math.inf)
        course.history.append(entry)
        course.losses = []
        if entry.get("validation", -math.inf) < best:
            course.best_epoch, course.best = epoch, self.learned.tensors()

    def _first_rows(self) -> dict[int, Taken]:
        """As many rows of everyone as a step takes, those of its first."""
        found: dict[int, Taken] = {}
        for step in self._epoch(0):
            for persona, ranks in step.taken:
                found.setdefault(persona, _taken(self.rows[persona], ranks))
        return found

    def _loss_of(self, taken: Mapping[int, Taken]) -> float:
        """Mean loss over personas, of some of their rows; nothing learns. The resident shard comes first."""
        total = 0.0
        steps = self._epoch(max(0, len(self.course.history) - 1))
        for number in dict.fromkeys([*(step.shard for step in reversed(steps)), *range(len(self.shards))]):
            personas = [p for p in self.shards[number].personas.tolist() if p in taken]
            for begin in range(0, len(personas), self.settings.personas_per_step):
                part = personas[begin : begin + self.settings.personas_per_step]
                mixtures = self._mixtures(number, *self.routing.weights(part, self.course.allowed))
                own = {place: taken[persona] for place, persona in enumerate(part)}
                total += float(self.passes.validation(part, own, mixtures).double().sum())
        return total / len(taken)

    def _state(self) -> bytes:
        self.course.limits = self.passes.limits
        moments: dict[str, Tensor] = {}
        for name, parameter in self.learned.named_parameters():
            own = self.optimiser.state.get(parameter, {})
            if own:
                moments |= {f"first.{name}": own["exp_avg"], f"second.{name}": own["exp_avg_sq"]}
        return encode_course(self.course, self.learned.tensors(), moments, self.identity)


def _who_learns(learners: Sequence[Learner], candidates: Candidates, watch: RouterWatch) -> list[int]:
    """Who has rows of either kind, and experts to choose from; somebody has them with rows to learn from."""
    known = (candidates.experts >= 0).any(1)
    asked = np.array([bool(one.rows or one.validation) for one in learners])
    if not (known & np.array([bool(one.rows) for one in learners])).any():
        raise ModelError(
            "no persona with training examples has an expert to choose from.\n"
            "Expected adapters of others that it may have: add some, or set router.scope to all."
        )
    if lonely := [learners[p].name for p in np.flatnonzero(asked & ~known).tolist()]:
        count = f" ({len(lonely)} such personas)" if len(lonely) > 1 else ""
        watch.said(f"{lonely[0]}: has no expert to choose from, and the router learns without it{count}")
    found: list[int] = np.flatnonzero(asked & known).tolist()
    return found


def _shards(candidates: Candidates, personas: Sequence[int], room: int | None, watch: RouterWatch) -> list[Shard]:
    shards = cut_shards(candidates.experts, np.array(personas), room)
    if len(shards) > 1:
        most = max(len(shard.experts) for shard in shards)
        watch.said(f"experts do not fit into memory together: {len(shards)} shards of up to {most}, in turn")
    return shards


def _taken(rows: Encoded | None, ranks: NDArray[np.int64]) -> Taken:
    assert rows is not None
    return Taken(rows, ranks)
