"""Groups that grow by pairs: union-find over whole arrays, which keeps as few of the pairs as connect each group."""

import numpy as np
from numpy.typing import NDArray


class Forest:
    """Groups of N members, each alone at first.

    The same pairs in the same order give the same edges.
    """

    def __init__(self, num_members: int) -> None:
        self._parent_N = np.arange(num_members)
        self._kept: list[NDArray[np.int64]] = []

    def roots(self, members: NDArray[np.int64]) -> NDArray[np.int64]:
        """The group that each member is in so far."""
        roots = self._parent_N[members]
        while not np.array_equal(further := self._parent_N[roots], roots):
            roots = further
        self._parent_N[members] = roots
        return roots

    def unite(self, pairs_P2: NDArray[np.int64]) -> None:
        """Join the groups of pairs, and keep as few of the pairs as connect them."""
        if not len(pairs_P2):
            return
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

        roots = np.stack([self.roots(pairs_P2[:, 0]), self.roots(pairs_P2[:, 1])], axis=1)
        names, nodes = np.unique(roots, return_inverse=True)
        nodes = np.sort(nodes.reshape(roots.shape), axis=1)
        _, first = np.unique(nodes[:, 0] * len(names) + nodes[:, 1], return_index=True)
        first = first[nodes[first, 0] != nodes[first, 1]]
        # weights that all differ name the chosen pairs, and make the choice the same every time
        weights = (first + 1).astype(np.float64)
        shape = (len(names), len(names))
        tree = minimum_spanning_tree(coo_array((weights, (nodes[first, 0], nodes[first, 1])), shape=shape))
        self._kept.append(pairs_P2[np.sort(tree.data.astype(np.int64)) - 1])
        _, groups = connected_components(tree, directed=False)
        self._parent_N[names] = names[_first_members(groups)]

    def groups(self) -> NDArray[np.int64]:
        """A number for each member, that of its group's first one."""
        return _first_members(self.roots(np.arange(len(self._parent_N))))

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ends of the pairs that were kept, the lower one first, in order."""
        pairs = np.concatenate([np.empty((0, 2), np.int64), *self._kept])
        pairs.sort(axis=1)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        return pairs[:, 0], pairs[:, 1]


def _first_members(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Name each member's group by the index of its first member."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first[inverse]
