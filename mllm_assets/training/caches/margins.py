"""A classifier of few rows: a support vector machine for each pair of labels, whose margins become probabilities.

Shape suffixes: N rows, F values of a row, P pairs of labels, C labels.
"""

from itertools import combinations
from typing import Any

import numpy as np

SOFTNESS = 10.0  # the inverse strength of the machines' regularisation
NUM_PARTS = 5  # of what is learnt: margins of each are measured by machines that did not see it
LEAST = 1e-7  # probability


class PairwiseMachine:
    """As scikit-learn's `SVC(probability=True)`, which it will no longer have; a label needs `NUM_PARTS` rows.

    Source:
        Price et al. 1994, "Pairwise neural network classifiers with probabilistic outputs": from pairs to all labels.
    """

    def __init__(self) -> None:
        from sklearn.pipeline import make_pipeline  # pyright: ignore[reportMissingImports]
        from sklearn.preprocessing import StandardScaler  # pyright: ignore[reportMissingImports]
        from sklearn.svm import SVC  # pyright: ignore[reportMissingImports]

        self._machine: Any = make_pipeline(StandardScaler(), SVC(C=SOFTNESS, decision_function_shape="ovo"))
        self._scales: list[Any] = []
        self.classes_ = np.zeros(0, int)

    def fit(self, looks_NF: np.ndarray, labels_N: np.ndarray) -> "PairwiseMachine":
        """Learn rows, and what margins of theirs mean."""
        from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingImports]
        from sklearn.model_selection import StratifiedKFold, cross_val_predict  # pyright: ignore[reportMissingImports]

        parts = StratifiedKFold(NUM_PARTS)
        unseen_NP: Any = cross_val_predict(self._machine, looks_NF, labels_N, cv=parts, method="decision_function")
        self.classes_ = self._machine.fit(looks_NF, labels_N).classes_
        for number, pair in enumerate(combinations(self.classes_, 2)):
            is_of_N = np.isin(labels_N, pair)
            margins_N1 = unseen_NP.reshape(len(labels_N), -1)[is_of_N, number : number + 1]
            self._scales.append(LogisticRegression(C=1e3).fit(margins_N1, labels_N[is_of_N] == pair[-1]))
        return self

    def predict_proba(self, looks_NF: np.ndarray) -> np.ndarray:
        """The probability of each label, found_NC."""
        margins_NP = self._machine.decision_function(looks_NF).reshape(len(looks_NF), -1)
        odds_NC = np.full((len(looks_NF), len(self.classes_)), 2.0 - len(self.classes_))
        for number, (first, second) in enumerate(combinations(range(len(self.classes_)), 2)):
            of_pair_N2 = self._scales[number].predict_proba(margins_NP[:, number : number + 1]).clip(LEAST, 1 - LEAST)
            odds_NC[:, [first, second]] += 1 / of_pair_N2
        found_NC = 1 / odds_NC
        return found_NC / found_NC.sum(axis=1, keepdims=True)
