"""The worker's tasks of `label_issues`: what models that did not see a row say of it."""

from dataclasses import dataclass
from pathlib import Path

from mllm_assets.worker.tasks import FeaturesTask, Task, TrainTask


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldLosses:
    """The loss of rows in nats a token, by their ids, in models that were not trained on them."""

    losses: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FoldsTask(Task[FoldLosses]):
    """Train a recipe once for each fold, without the rows of the fold, and score those. Folds that are done stay.

    Attributes:
        run: The recipe's training as it was planned. Nothing of it is published, and its `run_dir` is not used.
        directory: Where the folds train, and what each said is kept.
        folds: The number of the fold of each row, by its id. Rows without one are always trained on.
        asked: Those of them that are scored: changed copies of a row go with its fold, and are not.
    """

    entry = "mllm_assets.training.loop.folds:folds_task"
    run: TrainTask
    directory: Path
    folds: dict[str, int]
    asked: tuple[str, ...]

    @property
    def lock_dir(self) -> Path | None:
        return self.directory

    @property
    def quantizes(self) -> bool:
        return self.run.quantizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Looks:
    """What the frozen tower's features say of rows, by their ids.

    Attributes:
        probabilities: Of each label, out of fold; empty where rows have no labels.
        neighbours: The rows that look most alike, the nearest first.
    """

    probabilities: dict[str, tuple[float, ...]]
    neighbours: dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class LooksTask(Task[Looks]):
    """Pool the cached features of rows, and find labels by a simple classifier out of fold, or the nearest rows.

    Attributes:
        features: What caches the features, of a recipe with a frozen tower.
        groups: The group of each row that is asked about, by its id: a group is in one fold.
        labels: The number of each row's label; empty: its neighbours are looked for.
        num_folds: Into how many parts the rows are divided.
    """

    entry = "mllm_assets.training.caches.looks:looks_task"
    features: FeaturesTask
    groups: dict[str, str]
    labels: dict[str, int]
    num_folds: int
