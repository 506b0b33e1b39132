"""The tasks of a worker and their results: dataclasses that are sent as JSON.

The JSON names every field of the task. An unknown, missing or mistyped key is refused by its name: launcher and
worker are then of different versions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from mllm_assets.errors import MachineError
from mllm_assets.recipe.spec import TrainSpec
from mllm_assets.worker.evaluation_settings import ROWS_AT_ONCE as ROWS_AT_ONCE
from mllm_assets.worker.evaluation_settings import EvaluationSettings as EvaluationSettings
from mllm_assets.worker.run_settings import AnswerSample
from mllm_assets.worker.typed_json import KeyProblem, decode, encode

DEFAULT_MAX_HIDDEN_STATES_GIB = 16.0
ONE_VERSION = "Launcher and worker must be of one version of mllm_assets: install the same for both."
Manifest = dict[str, Any]  # of a finished directory, as `artifacts.read_manifest` gives it
R = TypeVar("R", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """Where a task computes; without `num_threads` PyTorch chooses.

    Processes above 1 are started by torchrun on one machine, or by Ray Train on those of its cluster.
    """

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    num_processes: int = 1
    spread_by: Literal["torchrun", "ray"] = "torchrun"
    num_threads: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Every `count`-th piece of the work from `index` on."""

    index: int = 0
    count: int = 1

    def of(self, pieces: Sequence[T]) -> Sequence[T]:
        return pieces[self.index :: self.count]


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Task(Generic[R]):
    """What a worker does in one process tree. A task that is not in `TASKS` is known by its module and class."""

    entry: ClassVar[str]  # the `module:function` that does it, given the task and a `Reporter`; it returns R
    accelerator: Accelerator = Accelerator()

    @property
    def name(self) -> str:
        own = f"{type(self).__module__}:{type(self).__name__}"
        return next((name for name, kind in TASKS.items() if kind is type(self)), own)

    @property
    def lock_dir(self) -> Path | None:
        """The directory that no other process may work in."""
        return None

    @property
    def quantizes(self) -> bool:
        """Whether it needs bitsandbytes."""
        return False


@dataclass(frozen=True, kw_only=True)
class RecipeTask(Task[R]):
    """A task of a recipe."""

    recipe: TrainSpec

    @property
    def quantizes(self) -> bool:
        return self.recipe.quantization_bit is not None or self.recipe.uses_bitsandbytes_optimizer


@dataclass(frozen=True, kw_only=True)
class SharedTask(RecipeTask[R]):
    """A task that several workers can share: each does its `part`; the task without it puts their results together."""

    part: Part | None = None
    parts: tuple[Any, ...] = ()  # the results


@dataclass(frozen=True, kw_only=True)
class BuildTask(Task[Manifest]):
    """Build the tiny model."""

    entry = "mllm_assets.training.models.tiny:build_task"
    directory: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """The vision features that a recipe reads, or a part of them.

    Attributes:
        directory: Relative to `features_root`.
        digest: Of tower and images.
        num_images: Different ones.
        num_computed: Of them, now.
        dtype: None where there is no image.
    """

    directory: str
    digest: str
    tower_fingerprint: str
    num_images: int
    num_computed: int
    num_bytes: int
    dtype: str | None
    num_computed_by_worker: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeaturesTask(SharedTask[Features]):
    """Compute the vision features of all images of a recipe's training and evaluation entries."""

    entry = "mllm_assets.training.caches.features:features_task"
    model_dir: Path
    data_dir: Path
    features_root: Path
    media_dir: Path | None = None
    parts: tuple[Features, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What a run may cache; a root that is None turns that cache off.

    Attributes:
        features_dir: The features that an upstream step computed. Nothing is added to them: an image that is not there
            means that the data changed.
        features_root: Where features may be computed, where no step did it before.
        hidden_states_root: Where hidden states may be computed.
        weights_root: Where what does not train of a base's large weight files is kept for the models of all runs.
        estimates_root: Where the memory of simulated steps is kept.
        max_hidden_states_gib: Most that one run's hidden states may take on disk.
    """

    features_dir: Path | None = None
    features_root: Path | None = None
    hidden_states_root: Path | None = None
    weights_root: Path | None = None
    estimates_root: Path | None = None
    max_hidden_states_gib: float = DEFAULT_MAX_HIDDEN_STATES_GIB


@dataclass(frozen=True, kw_only=True)
class TrainTask(RecipeTask[Manifest]):
    """Train a planned run; see `training.runs.plan.RunPlan`.

    Attributes:
        rows_root: Where rows are that were encoded before.
        data_digests: Of each entry when the run was named; what has changed since is refused.
        pretrained_fingerprint: Of the model, when the run was named.
        model_files: Digest, inode and time of change of the model's files where they were read to name the run.
        stages: The runs that the model went through, this one last, as the manifest holds them.
        resume_from: The checkpoint that the recipe names.
        notes: Warnings about the recipe.
        adapters: The directories of `adapter_name_or_path`; `pretrained_fingerprint` covers them.
        regroup: Whether micro-batches may be regrouped to the largest that fits.
        answers: What the model is asked while it trains, where metrics of answers are measured.
        overrides: Values instead of those of the recipe's file, of what decides about the weights.
    """

    entry = "mllm_assets.training.loop.engine:train_task"
    asks_with: ClassVar[str] = "mllm_assets.evaluation.in_training:AnswersInTraining"  # above the training's room
    rewards_with: ClassVar[str] = "mllm_assets.evaluation.rewards:RewardedAnswers"  # there too
    recipe_name: str
    model_dir: Path
    data_dir: Path
    rows_root: Path
    run_dir: Path
    fingerprint: str
    data_digests: dict[str, str]
    pretrained_fingerprint: str
    stages: tuple[dict[str, Any], ...]
    media_dir: Path | None = None
    caches: CacheSettings = CacheSettings()
    resume_from: Path | None = None
    notes: tuple[str, ...] = ()
    regroup: bool = False
    answers: AnswerSample = AnswerSample()
    adapters: tuple[Path, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    model_files: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    @property
    def lock_dir(self) -> Path | None:
        return self.run_dir

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics of answers that are measured at each evaluation."""
        if not self.recipe.measures_answers:
            return self.answers.metrics
        return tuple(dict.fromkeys((str(self.recipe.answer_metric), *self.answers.metrics)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one model gave, by the sample's position as text, as JSON has it."""

    losses: dict[str, tuple[float, int]]  # in nats, and the number of supervised tokens
    shuffled_losses: dict[str, tuple[float, int]]  # the same with the partner's images, of samples that have one
    answers: dict[str, tuple[str, int, float]]  # text, number of tokens, seconds
    batch_sizes: dict[str, int] = field(default_factory=dict)  # most rows at once, by the name of one of the above
    answered_by: dict[str, str] = field(default_factory=dict)  # the server that gave the answers, where one did


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The manifest of the predictions; of a part, which writes nothing, each model's results.

    `model_files` are those of the tuned model that were read, as `FileDigests.states` gives them.
    """

    manifest: Manifest
    measured: dict[str, Measured]
    model_files: dict[str, tuple[str, int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluateTask(SharedTask[Evaluation]):
    """Ask models about entries, whose rows are encoded as in training.

    Attributes:
        entries: Those that are asked about.
        model_dir: The tuned model.
        base_model_dir: The one that it was trained from.
        data_digests: Of each entry when the predictions were named; what has changed since is refused.
        unrelated_digests: Of each of `settings.unrelated`, in the same way.
        model_digests: Of each model that is asked, in the same way: its fingerprint, that of its weights, or that of a
            checkpoint's files.
        directory: Where the predictions go; a complete one is returned unchanged.
        features_root: Answer from the vision tower's cached output, which training shares; None to run the tower.
        rows_root: Where many rows are kept encoded, and what is known of an entry; without it they are in memory.
    """

    entry = "mllm_assets.evaluation.predict:evaluate_task"
    recipe_name: str
    entries: tuple[str, ...]
    model_dir: Path
    base_model_dir: Path
    data_dir: Path
    data_digests: dict[str, str]
    model_digests: dict[str, str]
    directory: Path
    settings: EvaluationSettings
    media_dir: Path | None = None
    unrelated_digests: dict[str, str] = field(default_factory=dict)
    models: tuple[Literal["base", "tuned"], ...] = ("base", "tuned")
    features_root: Path | None = None
    rows_root: Path | None = None
    parts: tuple[Evaluation, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What a release gave, loaded by transformers alone; the losses in nats per token on a fixed row."""

    num_missing: int
    num_unexpected: int
    num_params: int
    loss: float
    oldest_transformers: str | None = None  # that computes the same from its files
    adapter_loss: float | None = None
    adapter_max_logit_difference: float | None = None

    def facts(self) -> dict[str, Any]:
        """The known values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class VerifyTask(Task[Verification]):
    """Load a release as any user would, and compare it with the checkpoint; an adapter is put on the base model."""

    entry = "mllm_assets.releases.check:verify"
    directory: Path
    checkpoint_dir: Path
    base_model_dir: Path


TASKS: Mapping[str, type[Task[Any]]] = {
    "build_pretrained": BuildTask,
    "vision_features": FeaturesTask,
    "train": TrainTask,
    "evaluate": EvaluateTask,
    "release": VerifyTask,
}


def to_json(task: Task[Any]) -> dict[str, Any]:
    """JSON-able values; `from_json` reads them back."""
    return {"task": task.name, **encode(task)}


def from_json(values: Mapping[str, Any]) -> Task[Any]:
    """Read a task.

    Raises:
        MachineError: It is not one. Names the key.
    """
    name = values.get("task")
    kind = TASKS.get(str(name))
    if kind is None:
        module, _, own = str(name).partition(":")
        kind = getattr(import_module(module), own, None) if own else None
        if not (isinstance(kind, type) and issubclass(kind, Task)):
            raise MachineError(f"Unknown task {name!r}: expected one of {', '.join(TASKS)}. {ONE_VERSION}")
    try:
        return decode(kind, {key: value for key, value in values.items() if key != "task"})
    except KeyProblem as problem:
        raise MachineError(f"The task {name}: {problem} {ONE_VERSION}") from None


def result_from_json(task: Task[R], value: Any) -> R:
    """Read what a task gave.

    Raises:
        MachineError: It is something else. Names the key.
    """
    [base] = type(task).__orig_bases__  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return decode(get_args(base)[0], value)
    except KeyProblem as problem:
        raise MachineError(f"The result of the task {task.name}: {problem} {ONE_VERSION}") from None
