"""The folders below one root (`MLLM_ASSETS_ROOT`, by default the working directory)."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one project; see "On disk" in docs/architecture.md."""

    root: Path

    @classmethod
    def from_environment(cls) -> "Layout":
        return cls(Path(os.environ.get("MLLM_ASSETS_ROOT", ".")).resolve())

    @property
    def configs(self) -> Path:
        """The recipes' files."""
        return self.root / "configs"

    @property
    def data(self) -> Path:
        """LLaMA-Factory's `dataset_dir`: `dataset_info.json`, `images/`, one link per dataset."""
        return self.root / "data"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def dataset_info(self) -> Path:
        return self.data / "dataset_info.json"

    @property
    def quality_db(self) -> Path:
        return self.data / "quality.duckdb"

    def raw(self, dataset: str, digest: str) -> Path:
        return self.data / ".raw" / dataset / digest

    def quality(self, dataset: str, digest: str) -> Path:
        return self.data / ".quality" / dataset / digest

    def history(self, dataset: str) -> Path:
        """A dataset's rows in DuckDB, as the artefact store has them."""
        return self.data / ".history" / dataset

    def version(self, dataset: str, digest: str) -> Path:
        return self.data / ".versions" / dataset / digest

    def corrections(self, dataset: str) -> Path:
        """What people decided about a dataset's samples: theirs, to be kept with the project."""
        return self.root / "corrections" / f"{dataset}.jsonl"

    def settled(self, dataset: str, name: str) -> Path:
        """The decisions that hold for a version of a dataset's source."""
        return self.data / ".corrections" / dataset / name

    @property
    def pretrains(self) -> Path:
        return self.root / "pretrains"

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    @property
    def features(self) -> Path:
        return self.root / "cache" / "features"

    @property
    def hidden_states(self) -> Path:
        return self.root / "cache" / "hidden_states"

    @property
    def frozen_weights(self) -> Path:
        return self.root / "cache" / "frozen_weights"

    @property
    def memory_estimates(self) -> Path:
        return self.root / "cache" / "memory_estimates"

    @property
    def rows(self) -> Path:
        return self.root / "cache" / "rows"

    @property
    def folds(self) -> Path:
        """Models that were trained without some rows, until those are scored."""
        return self.root / "cache" / "folds"

    @property
    def evaluations(self) -> Path:
        """What models that no recipe judges so were asked, and their answers."""
        return self.root / "cache" / "evaluations"

    @property
    def ray_jobs(self) -> Path:
        """Requests and results of jobs that are on a Ray cluster; each job's folder goes with it."""
        return self.root / "cache" / "ray_jobs"

    def predictions(self, recipe: str, digest: str) -> Path:
        return self.outputs / recipe / "predictions" / digest

    def own_answers(self, recipe: str, digest: str) -> Path:
        """What a model says of the rows that it was trained on."""
        return self.outputs / recipe / "own_answers" / digest

    def preferences(self, recipe: str, digest: str) -> Path:
        """Pairs of references and a recipe's wrong answers."""
        return self.data / ".preferences" / recipe / digest

    def metrics(self, recipe: str, digest: str) -> Path:
        return self.outputs / recipe / "eval_metrics" / digest

    def gained(self, recipe: str, digest: str) -> Path:
        """What corrections gained."""
        return self.outputs / recipe / "what_it_gained" / digest

    def copies(self, recipe: str, digest: str) -> Path:
        """A release in another form: 8-bit weights, GGUF."""
        return self.outputs / recipe / "copies" / digest

    def benchmarks(self, recipe: str, digest: str) -> Path:
        """What the base and the tuned model score on benchmarks."""
        return self.outputs / recipe / "benchmarks" / digest

    def sweep(self, recipe: str, digest: str) -> Path:
        return self.outputs / recipe / "sweep" / digest

    @property
    def sweeps_db(self) -> Path:
        """Optuna's studies, for any of its tools."""
        return self.data / "sweeps.sqlite3"

    def releases(self, recipe: str) -> Path:
        return self.root / "releases" / recipe

    def relative(self, path: Path) -> str:
        """The path as metadata shows it: relative to the root if it is below it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
