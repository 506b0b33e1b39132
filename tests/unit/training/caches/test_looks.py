"""A classifier on frozen features finds wrong labels, and rows find those that look alike."""

import numpy as np
import pytest
import torch

from mllm_assets.training.caches.looks import classifier_for, neighbours, pool, probabilities
from mllm_assets.training.caches.margins import PairwiseMachine


def test_planted_wrong_labels_are_the_least_likely_out_of_fold() -> None:
    pytest.importorskip("cleanlab")
    draw = np.random.default_rng(0)
    truth_N = np.arange(200) % 4
    looks_NF = draw.normal(size=(200, 12)) + 4 * np.eye(4)[truth_N].repeat(3, axis=1)
    planted = draw.choice(200, 16, replace=False)
    labels_N = truth_N.copy()
    labels_N[planted] = (truth_N[planted] + 1) % 4
    found_NC = probabilities(looks_NF, labels_N, [f"row {n}" for n in range(200)], num_folds=5)
    np.testing.assert_allclose(found_NC.sum(axis=1), 1.0)
    first = np.argsort(found_NC[np.arange(200), labels_N])[:16]
    assert len(set(first) & set(planted)) >= 15


@pytest.mark.parametrize("num_labels", [2, 3])
def test_support_vector_machines_know_curved_borders_and_how_sure_they_are(num_labels: int) -> None:
    """A linear classifier knows no ring from what is inside it, and ranks what it confuses as wrong labels."""
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    labels_N = np.arange(240) % num_labels
    angles_N, radii_N = draw.uniform(0, 2 * np.pi, 240), 1 + 2 * labels_N + draw.normal(scale=0.3, size=240)
    looks_NF = np.stack([radii_N * np.cos(angles_N), radii_N * np.sin(angles_N)], axis=1)
    found_NC = PairwiseMachine().fit(looks_NF[:160], labels_N[:160]).predict_proba(looks_NF[160:])
    np.testing.assert_allclose(found_NC.sum(axis=1), 1.0)
    assert (found_NC.argmax(axis=1) == labels_N[160:]).mean() > 0.95
    assert found_NC[np.arange(80), labels_N[160:]].mean() > 0.9


def test_many_rows_and_rare_labels_get_the_linear_classifier() -> None:
    """The time of the other grows with the square of the rows, and of a label with two rows it knows no margins."""
    pytest.importorskip("sklearn")
    few = np.arange(100) % 2
    assert isinstance(classifier_for(few), PairwiseMachine)
    assert not isinstance(classifier_for(np.arange(2001) % 2), PairwiseMachine)
    assert not isinstance(classifier_for(np.append(few, [2, 2])), PairwiseMachine)


def test_a_picture_looks_the_same_wherever_in_it_things_are() -> None:
    tokens_KW = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 8)))
    np.testing.assert_allclose(pool(tokens_KW), pool(tokens_KW.flip(0)), rtol=1e-5, atol=1e-6)


def test_the_nearest_rows_are_those_of_the_same_kind_and_never_the_row_itself() -> None:
    draw = np.random.default_rng(0)
    looks_NF = draw.normal(size=(40, 6)) + 8 * (np.arange(40) % 2)[:, None]
    for row, others in enumerate(neighbours(looks_NF)):
        assert row not in others and {other % 2 for other in others} == {row % 2}
