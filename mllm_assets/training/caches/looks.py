"""What the frozen tower's features say of rows: their labels by a simple classifier out of fold, and who looks alike.

A classifier on frozen features is what cleanlab's authors advise: it costs seconds, and learns wrong labels less well
than a model that trains for as long as the run does. Of few rows support vector machines find more than a linear one
(benchmarks/RESULTS.md); their time grows with the square of the number of rows.

Shape suffixes: N rows, K tokens of an image, W values of a token, F values of a row, C labels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mllm_assets.data.sharegpt.dataset import Dataset
from mllm_assets.errors import DataError
from mllm_assets.training.caches.features import FeatureStore, features_task
from mllm_assets.training.caches.margins import NUM_PARTS, PairwiseMachine
from mllm_assets.training.runs.fold_plan import assign_folds
from mllm_assets.worker.fold_task import Looks, LooksTask

if TYPE_CHECKING:
    from mllm_assets.worker.protocol import Reporter

NUM_REPEATS = 4  # of the division into folds, whose mean is less of an accident
NUM_NEIGHBOURS = 10
PENALTY = 0.1  # the inverse strength of the linear classifier's regularisation
MAX_MARGIN_ROWS = 2000  # of which support vector machines take two CPU-minutes, and of twice as many eight
BLOCK_ROWS = 1024


def looks_task(task: LooksTask, reporter: "Reporter") -> Looks:
    """Worker entry: cache the features that are missing, and ask them.

    Raises:
        DataError: A row has no picture.
        RecipeError: The family's features are not cached.
    """
    cached = features_task(task.features, reporter)
    of = task.features
    dataset = Dataset(of.data_dir, media_dir=of.media_dir, read_part=None)
    store = FeatureStore(of.features_root / cached.directory, dataset.digests)
    ids, pooled = [], []
    for row_id, images in _pictures(task, dataset):
        if not images:
            raise DataError(f"Row {row_id} has no picture to look at.")
        ids.append(row_id)
        pooled.append(np.mean([pool(store.batch([path])) for path in images], axis=0))
        reporter.progress("look", len(ids), len(task.groups))
    looks_NF = np.stack(pooled)
    dataset.digests.require_unchanged()
    if not task.labels:
        nearest = {ids[row]: tuple(ids[other] for other in others) for row, others in enumerate(neighbours(looks_NF))}
        return Looks(probabilities={}, neighbours=nearest)
    labels_N, groups = np.array([task.labels[one] for one in ids]), [task.groups[one] for one in ids]
    found_NC = probabilities(looks_NF, labels_N, groups, num_folds=task.num_folds)
    return Looks(
        probabilities={one: tuple(row) for one, row in zip(ids, found_NC.tolist(), strict=True)}, neighbours={}
    )


def _pictures(task: LooksTask, dataset: Dataset) -> Iterator[tuple[str, Sequence[Path]]]:
    seen = set()
    for name in task.features.recipe.train_entries:
        for row in dataset.entry(name).each():
            if row.id in task.groups and row.id not in seen:
                seen.add(row.id)
                yield row.id, row.images


def pool(rows_KW: torch.Tensor) -> np.ndarray:
    """One vector of an image, wherever in it things are: mean, spread, and both ends of each value."""
    values_KW = rows_KW.float().numpy()
    ends = (values_KW.mean(axis=0), values_KW.std(axis=0), values_KW.max(axis=0), values_KW.min(axis=0))
    return np.concatenate(ends)


def probabilities(looks_NF: np.ndarray, labels_N: np.ndarray, groups: Sequence[str], *, num_folds: int) -> np.ndarray:
    """Return the probability of each label by classifiers that did not see the row's group, probabilities_NC.

    What cleanlab finds wrong by them is then not learnt from, and all rows are asked again.
    """
    from cleanlab.filter import find_label_issues  # pyright: ignore[reportMissingImports]

    first_NC = _out_of_fold(looks_NF, labels_N, groups, np.ones(len(labels_N), bool), num_folds)
    is_right_N = ~find_label_issues(labels_N, first_NC, n_jobs=1)
    if len(np.unique(labels_N[is_right_N])) < len(np.unique(labels_N)):
        return first_NC  # of a label all rows would be left out
    return _out_of_fold(looks_NF, labels_N, groups, is_right_N, num_folds)


def _out_of_fold(
    looks_NF: np.ndarray, labels_N: np.ndarray, groups: Sequence[str], is_learnt_N: np.ndarray, num_folds: int
) -> np.ndarray:
    total_NC = np.zeros((len(labels_N), labels_N.max() + 1))
    for seed in range(NUM_REPEATS):
        folds_N = np.array(assign_folds(groups, labels_N.tolist(), num_folds=num_folds, seed=seed))
        for fold in range(num_folds):
            trained_N, asked_N = (folds_N != fold) & is_learnt_N, folds_N == fold
            if asked_N.any():
                classifier = classifier_for(labels_N[trained_N]).fit(looks_NF[trained_N], labels_N[trained_N])
                total_NC[np.ix_(asked_N, classifier.classes_)] += classifier.predict_proba(looks_NF[asked_N])
    return total_NC / NUM_REPEATS


def classifier_for(labels_N: np.ndarray) -> Any:
    """What is to learn rows with these labels."""
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
    from sklearn.pipeline import make_pipeline  # pyright: ignore[reportMissingImports]
    from sklearn.preprocessing import StandardScaler  # pyright: ignore[reportMissingImports]

    rarest = np.unique(labels_N, return_counts=True)[1].min()
    if len(labels_N) <= MAX_MARGIN_ROWS and rarest >= NUM_PARTS:
        return PairwiseMachine()
    return make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=200))


def neighbours(looks_NF: np.ndarray) -> list[list[int]]:
    """Return the rows that look most alike for each row, the nearest first."""
    scaled_NF = (looks_NF - looks_NF.mean(axis=0)) / (looks_NF.std(axis=0) + 1e-9)
    scaled_NF /= np.linalg.norm(scaled_NF, axis=1, keepdims=True) + 1e-9
    count, found = min(NUM_NEIGHBOURS, len(looks_NF) - 1), []
    for start in range(0, len(scaled_NF), BLOCK_ROWS):
        alike_BN = scaled_NF[start : start + BLOCK_ROWS] @ scaled_NF.T
        alike_BN[np.arange(len(alike_BN)), start + np.arange(len(alike_BN))] = -np.inf
        found += np.argsort(-alike_BN, axis=1, kind="stable")[:, :count].tolist()
    return found
