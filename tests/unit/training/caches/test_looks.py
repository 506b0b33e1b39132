"""A classifier on frozen features finds wrong labels, and rows find those that look alike."""

import numpy as np
import pytest
import torch

from mllm_assets.training.caches.looks import neighbours, pool, probabilities


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


def test_a_picture_looks_the_same_wherever_in_it_things_are() -> None:
    tokens_KW = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 8)))
    np.testing.assert_allclose(pool(tokens_KW), pool(tokens_KW.flip(0)), rtol=1e-5, atol=1e-6)


def test_the_nearest_rows_are_those_of_the_same_kind_and_never_the_row_itself() -> None:
    draw = np.random.default_rng(0)
    looks_NF = draw.normal(size=(40, 6)) + 8 * (np.arange(40) % 2)[:, None]
    for row, others in enumerate(neighbours(looks_NF)):
        assert row not in others and {other % 2 for other in others} == {row % 2}
