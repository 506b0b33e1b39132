"""The sides of a dataset, how many samples each gets, and the original guide's shuffle."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mllm_assets.errors import RecipeError

TRAIN, VAL, TEST = SIDES = ("train", "val", "test")
Strategy = Literal["grouped", "guide"]
STRATEGIES = get_args(Strategy)
MIN_TEST = 20  # fewer test samples than this, and than asked for, judge nothing: by default there are none then


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSpec:
    """How many samples go where. Groups of near-duplicates stay together.

    Attributes:
        num_train: Training samples; fewer in proportion where there are not enough.
        num_val: Validation samples, which choose: checkpoints, early stopping, settings.
        num_test: Test samples, which judge a release and choose nothing; fewer in proportion where there are not
            enough, 0 for none. By default as many as num_val of what the other two leave; none where that is less than
            20.
        seed: Chooses which samples, and seeds the augmentations.
        strategy: grouped: no image or near-duplicate on both sides, stable when samples are added. guide: the original
            guide's shuffle, which reads the whole source and keeps duplicates wherever they fall; a release then needs
            allow_leakage.
    """

    num_train: int = 500
    num_val: int = 50
    num_test: int | None = None
    seed: int = 42
    strategy: Strategy = "grouped"

    def __post_init__(self) -> None:
        for name, least in (("num_train", 1), ("num_val", 1), ("num_test", 0)):
            value = getattr(self, name)
            if type(value) is not int and (name, value) != ("num_test", None) or type(value) is int and value < least:
                raise RecipeError(
                    f"split.{name}: expected a whole number of at least {least}, got {value!r}. Change it in the "
                    "dataset's YAML."
                )
        if self.strategy not in STRATEGIES:
            raise RecipeError(
                f"split.strategy: expected one of {', '.join(STRATEGIES)}, got {self.strategy!r}. Correct it in the "
                "dataset's YAML."
            )

    @property
    def wanted_test(self) -> int:
        """The test samples of a source that has enough for all."""
        return self.num_val if self.num_test is None else self.num_test

    @property
    def num_wanted(self) -> int:
        """Samples of all sides."""
        return self.num_train + self.num_val + self.wanted_test

    def sizes(self, num_available: int, num_free: int | None = None) -> tuple[int, int, int]:
        """The sizes of train, val and test for so many samples: as asked for, or in proportion.

        By default test takes nothing from the others, so that a split of before there was a test split stays as it was.

        Of the samples only `num_free` may be tested on, by default all: the others trained or validated before.
        """
        asked = self.num_train + self.num_val
        if self.num_test is None:
            num_test = max(0, min(self.num_val, num_available - asked))
            num_test = num_test if num_test >= min(self.num_val, MIN_TEST) else 0
        else:
            share = num_available * self.num_test // max(self.num_wanted, num_available)
            num_test = min(share, max(0, num_available - 2))
        num_test = num_test if num_free is None else min(num_test, num_free)
        num_left = num_available - num_test
        if num_left >= asked:
            return self.num_train, self.num_val, num_test
        num_train = min(max(num_left * self.num_train // asked, 1), max(0, num_left - 1))
        return num_train, num_left - num_train, num_test


def guide_places(num_rows: int, spec: SplitSpec) -> dict[int, tuple[str, int]]:
    """Row of the source -> side and position in it: a seeded shuffle; first train, then val, then test.

    Source:
        `datasets.Dataset.shuffle(seed)` takes the rows at `numpy.random.default_rng(seed).permutation(num_rows)`. The
        guide has no test split: one by default is made of rows that it leaves.
    """
    sizes = dict(zip(SIDES, spec.sizes(num_rows), strict=True))
    rows = iter(np.random.default_rng(spec.seed).permutation(num_rows).tolist())
    return {next(rows): (side, place) for side, size in sizes.items() for place in range(size)}
