"""Which rows are asked about together, by a model that saw none of them."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from mllm_assets.artifacts import digest_json


def assign_folds(groups: Sequence[str], labels: Sequence[Hashable], *, num_folds: int, seed: int = 0) -> list[int]:
    """Return each row's fold. A group is in one fold; labels and rows are spread evenly.

    It depends on the groups' names, the labels and the seed only.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    order = sorted(members, key=lambda group: (-len(members[group]), digest_json([seed, group])))
    of_label: list[Counter[Hashable]] = [Counter() for _ in range(num_folds)]
    sizes = [0] * num_folds
    folds = [0] * len(groups)
    for group in order:
        rows = members[group]
        label = Counter(labels[row] for row in rows).most_common(1)[0][0]
        fold = min(range(num_folds), key=lambda one: (of_label[one][label], sizes[one], one))
        for row in rows:
            folds[row] = fold
            of_label[fold][labels[row]] += 1
        sizes[fold] += len(rows)
    return folds
