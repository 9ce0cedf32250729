"""The plan of a job: train, merge, evaluate, in any selection.

Planning continues as results arrive: clusters and routing need embeddings, what validation examples choose needs them
scored. So everything that waits for nothing is queued at once, and the rest as soon as what it waits for is there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from raymerge.config import Grouping
from raymerge.errors import RaymergeError
from raymerge.evaluation.scores import kind_of
from raymerge.pipelines import own_trainings, selecting, trainings, tuning
from raymerge.pipelines.checks import check_evaluation, check_recipes, notes_on_methods
from raymerge.pipelines.layout import write_run_files
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.placing import Placed, Placing, check_placing, job_needs_embeddings, place
from raymerge.pipelines.planning import TRAINS_ITS_OWN, Merges, embedding_items, merge_items, merges_of
from raymerge.pipelines.scoring import Scoring, evaluation_items
from raymerge.pipelines.trials import check_trials, sample_of, sample_of_neighbours, trial_items, trials_of
from raymerge.recipes import Recipe
from raymerge.runtime.scheduler import Item, Outcome
from raymerge.runtime.tasks import TrainGroup

# What is queued first; evaluations come last, since they wait for the others.
TURNS = ("try", "train", "tune", "merge")


@dataclass(frozen=True)
class Steps:
    """What a job does: groupings to train, whether to write merged adapters, whether to evaluate.

    cluster: the only one to train of grouping `cluster`, by label or number. starts: what each grouping begins from,
    where that is known; else what the project says, or what the adapters there began from.
    """

    train: tuple[Grouping, ...] = ()
    merge: bool = False
    evaluate: bool = False
    refit: bool = False
    cluster: str | None = None
    starts: Mapping[Grouping, str | None] | None = None


@dataclass
class Room:
    """Planning that waits for a recipe, or for all where `name` is empty: when all of these items are settled, `go_on`
    is given those that failed, and says what is to be done next."""

    name: str
    waits_for: set[str]
    go_on: Callable[[set[str]], list[Item]]
    failed: set[str] = field(default_factory=set)


@dataclass
class Plan:
    """A job's plan, which grows as results arrive.

    trained: folder of an adapter -> the item that trains it. decided: recipes with nothing left open, by name.
    undecided: recipe -> why it could not be carried out.
    """

    opened: Opened
    steps: Steps
    starts: dict[Grouping, str | None] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    rooms: list[Room] = field(default_factory=list)
    decided: dict[str, Recipe] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def experts(self) -> tuple[str, ...]:
        """Personas whose adapter is there or will be."""
        trained = self.opened.trainable if "persona" in self.steps.train else ()
        return tuple(sorted({*self.opened.adapters, *trained}))

    def check(self) -> None:
        """Raise what can be known to be wrong before any item starts, and note what one would not expect."""
        opened, steps = self.opened, self.steps
        known = steps.starts or {}
        self.starts = {g: known[g] if g in known else trainings.start_of(opened, g) for g in steps.train}
        trainings.check_training(opened, self.starts)
        check_trials(opened, steps.train)
        own_trainings.check(opened)
        check_recipes(opened, train=steps.train, merge=steps.merge)
        tuning.check_tuning(opened)
        if steps.evaluate:
            check_evaluation(opened)
        check_placing(opened, self.placing(), refit=steps.refit)
        self.notes = [*opened.notes]
        for grouping, start in self.starts.items():
            if start is not None and opened.project.training.start_from is None:
                self.notes.append(f"{grouping}: training starts from {start}, as that of the adapters there did")
        self.notes += notes_on_methods(opened.recipes.values()) if steps.merge else []
        without = sorted(set(opened.names) - set(opened.trainable)) if steps.train else []
        if without:
            self.notes.append(f"{without[0]}: has no training examples ({len(without)} such personas)")
        chooses = any(recipe.tuned or recipe.strategy == "selective" for recipe in opened.recipes.values())
        if steps.evaluate and chooses and opened.project.evaluation.split == "validation":
            self.notes.append("evaluation.split is validation: rows are scored on the examples that chose their values")

    def first(self) -> list[Item]:
        """Items that wait for no embedding; all of them where none is needed."""
        self.check()
        items = self._trainings("unified")
        if not self._asks_neighbours:
            items += self._trainings("persona")
        embeddings = embedding_items(self.opened, self.experts, self.trained) if self.placing().embeddings else []
        if embeddings:
            self._wait("", embeddings, lambda _: self.rest())
            return embeddings + items
        return items + self.rest()

    def follow(self, outcome: Outcome) -> list[Item]:
        """More items, once the last one that some planning waits for is settled."""
        return self._settled(outcome.item_id, failed=outcome.error is not None)

    def _settled(self, item: str, *, failed: bool) -> list[Item]:
        items: list[Item] = []
        for room in list(self.rooms):
            if item not in room.waits_for:
                continue
            room.waits_for.discard(item)
            room.failed |= {item} if failed else set()
            if not room.waits_for:
                self.rooms.remove(room)
                items += self._open(room)
        return items

    def _open(self, room: Room) -> list[Item]:
        """What a room's planning goes on with. An error is that of its recipe, and stops no other."""
        if not room.name:
            return room.go_on(room.failed)
        try:
            return room.go_on(room.failed)
        except RaymergeError as error:
            return self._give_up(room.name, str(error))

    def _give_up(self, name: str, why: str) -> list[Item]:
        """A recipe is not carried out: what waits for its scores waits for nothing that will come."""
        self.undecided[f"plan/{name}"] = why
        return self._settled(f"gather/{name}/{self._validation}", failed=True)

    def rest(self) -> list[Item]:
        """The trainings that need embeddings, merges and evaluations; those of recipes that leave something open come
        when it is known.

        All that can be routed is routed before anything is written, since routing may refuse one.
        """
        placed = place(self.opened, self.placing(), refit=self.steps.refit)
        recipes = list(self.opened.recipes.values())
        for recipe in recipes:
            if not recipe.tuned and recipe.strategy != "selective":
                placed.route(recipe)
        items = self._trainings("persona", placed) if self._asks_neighbours else []
        items += self._trainings("cluster", placed)
        for recipe in recipes:
            if recipe.strategy == "selective":  # first, since a recipe that it waits for may be given up at once
                self._select(recipe, placed)
        begun = [item for recipe in recipes if recipe.strategy != "selective" for item in self._begin(recipe, placed)]
        return items + sorted(begun, key=_turn)

    def _wait(self, name: str, items: Collection[Item], go_on: Callable[[set[str]], list[Item]]) -> None:
        self.rooms.append(Room(name, {item.id for item in items}, go_on))

    @property
    def _asks_neighbours(self) -> bool:
        """Whether merges of neighbours choose the epochs of personas, so that these wait for embeddings."""
        return self.opened.project.training.of("persona").tries_neighbours

    def _trainings(self, grouping: Grouping, placed: Placed | None = None) -> list[Item]:
        """The items that train a grouping, and those that try its numbers of epochs. placed: None before embeddings."""
        if grouping not in self.steps.train:
            return []
        start = self.starts[grouping]
        every = trainings.train_groups(self.opened, grouping, placed.clusters if placed else None)
        groups = trainings.only_cluster(every, self.steps.cluster)
        if grouping == "cluster":
            self.notes += trainings.alone_in_cluster(groups)
        settings = self.opened.project.training.of(grouping)
        after = trainings.maker_of(self.opened.project, start, self.trained)
        trials = trials_of(self.opened, grouping, settings.choices) if groups else ()

        def make(name: str, tried: tuple[TrainGroup, ...], epochs: int, after: Collection[str]) -> Item:
            task = trainings.training_task(self.opened, grouping, settings.with_epochs(epochs), start)
            return trainings.training_item(self.opened, name, replace(task, groups=tried), after)

        if placed is not None and settings.tries_neighbours:
            sample = sample_of_neighbours(self.opened, every, placed)
        else:
            sample = sample_of(self.opened, every, lambda group: group.personas)
        tries = trial_items(self.opened, grouping, sample, trials, make, after=after)
        waits = after | {item.id for item in tries}
        items = trainings.training_items(self.opened, grouping, groups, start=start, trials=trials, after=waits)
        self.trained |= trainings.trained_by(items)
        return [*tries, *items]

    def _begin(self, recipe: Recipe, placed: Placed) -> list[Item]:
        """A recipe's items, or those that find out what it leaves open."""
        items: list[Item] = []
        if recipe.strategy in TRAINS_ITS_OWN:
            items = own_trainings.items_of(self.opened, recipe, placed.route(recipe)[0])
        trained = self.trained | trainings.trained_by(i for i in items if not i.id.startswith("try/"))
        tries: list[Item] = []
        if recipe.tuned:
            tries = tuning.tuning_items(self.opened, recipe, lambda one: placed.route(one)[0], trained)
            if not tries:
                return self._give_up(recipe.name, tuning.nobody_to_ask(recipe))
        self.trained = trained
        if not tries:
            return [*items, *self._carry_out(recipe, placed)]

        def go_on(failed: set[str]) -> list[Item]:
            values = tuning.chosen(self.opened, recipe, [item for item in tries if item.id not in failed])
            return self._carry_out(recipe, placed, values)

        self._wait(recipe.name, tries, go_on)
        return [*items, *tries]

    def _select(self, recipe: Recipe, placed: Placed) -> None:
        """A selective recipe begins when those it chooses among are scored on validation examples."""
        scored = {f"gather/{name}/{self._validation}": name for name in recipe.strategy_parameters["among"]}

        def go_on(failed: set[str]) -> list[Item]:
            decided = [self.decided[name] for item, name in scored.items() if item not in failed]
            found = selecting.options_of(self.opened, recipe, decided, placed, self._validation)
            candidates = {option.name: option.candidate for option in found}
            chosen = replace(placed, inputs=replace(placed.inputs, candidates=candidates))
            return self._carry_out(
                recipe, chosen, merges=selecting.merges_of_options(found, in_memory=not self.steps.merge)
            )

        self.rooms.append(Room(recipe.name, set(scored), go_on))

    def _carry_out(
        self,
        recipe: Recipe,
        placed: Placed,
        values: Mapping[str, float] | None = None,
        merges: Merges | None = None,
    ) -> list[Item]:
        """Merges and evaluations of a recipe, with the values that were chosen for it. merges: what answers, where that
        belongs to other recipes."""
        final = recipe.resolved(values) if values else recipe
        self.decided[recipe.name] = final
        table, notes = placed.route(final)
        self.notes += [f"{recipe.name}: {note}" for note in notes]
        items: list[Item] = []
        if merges is None:
            merges = merges_of(self.opened, final, table)
        if self.steps.merge:
            there = {group.adapter: merges.locations[group.adapter] for group in table.groups() if group.experts}
            write_run_files(self.opened.project, recipe, table, placed, notes, there)
            items = merge_items(self.opened, final, merges.tasks, self.trained)
        return items + [
            item
            for scoring in self._scorings(recipe)
            for item in evaluation_items(self.opened, final, table, merges, self.trained, scoring)
        ]

    @property
    def _validation(self) -> str:
        """The folder of a run that validation scores go into."""
        return "validation" if self.steps.merge else "validation_in_memory"

    def _scorings(self, recipe: Recipe) -> list[Scoring]:
        """Test examples; and for what competes to be chosen, validation examples, so that test rows choose nothing."""
        split = self.opened.project.evaluation.split
        in_memory = not self.steps.merge
        scorings = []
        if self.steps.evaluate:
            scorings.append(Scoring("evaluation_in_memory" if in_memory else "evaluation", split, in_memory))
        asked = any(recipe.name in one.strategy_parameters.get("among", ()) for one in self.opened.recipes.values())
        competes = self.steps.evaluate and self.steps.merge and kind_of(recipe.name, recipe.as_dict()) == "recipe"
        if asked or (competes and split == "test" and self._has_validation()):
            scorings.append(Scoring(self._validation, "validation", in_memory))
        return scorings

    def _has_validation(self) -> bool:
        personas = self.opened.need_personas("evaluation")
        return len(personas.missing("validation")) < len(personas.names)

    def placing(self) -> Placing:
        """What the job needs to know of its personas."""
        project, recipes = self.opened.project, self.opened.recipes.values()
        return Placing(
            experts=self.experts,
            embeddings=job_needs_embeddings(project, recipes, self.steps.train),
            clusters="cluster" in self.steps.train or any("clusters" in recipe.needs for recipe in recipes),
        )


def _turn(item: Item) -> int:
    step = item.id.partition("/")[0]
    return TURNS.index(step) if step in TURNS else len(TURNS)
