"""Exact groups of near-duplicates among millions of 64-bit hashes: connected components, without listing all pairs.

Two images are near when their 64-bit perceptual hashes differ in at most d bits and the means of a 4x4 RGB thumbnail
differ little (the hash alone is colour-blind: a blue heart equals a brown one). Not covered: crops, rotations and
mirror images.

Of d+1 bands of the hash, two near ones share at least one, so comparing within runs of equal bands is enough. Three
things keep that cheap where hashes are clustered and a plain join would compare all pairs: a run whose members are
linked already is skipped; a long run is banded again by the bits that are left; and where no bits are left, a search
outward from its smallest groups compares each member only with those not reached yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Longer runs are banded again: comparing 1,024 members costs about as much as sorting them once more.
LONG_RUN = 1024
# This many distinct hashes are compared with each other at once (4 MiB of distances).
FEW_HASHES = 2048
# Bands within bands; 5 bands a level share at least 31 of the 64 bits after three.
MAX_LEVELS = 3
COLOR_CHUNK = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class NearForest:
    """Groups of N images and the E = N - number of groups edges that connect them.

    A subset needs a forest of its own: its members may be connected through others.

    Attributes:
        groups_N: The number of each image's group: that of its first member.
        a_E: One end of each edge; with `b_E` every edge is a near pair, and the edges connect each group.
        b_E: The other end.
        num_compared: Pairs of hashes that were compared.
    """

    groups_N: NDArray[np.int64]
    a_E: NDArray[np.int64]
    b_E: NDArray[np.int64]
    num_compared: int


def near_forest(
    hashes_N: NDArray[np.uint64], colors_NC: NDArray[np.uint8], *, distance_bits: int, color_distance: float
) -> NearForest:
    """Group images by near-duplicate, transitively and exactly.

    Args:
        hashes_N: Perceptual hashes.
        colors_NC: Small thumbnails, C values of 0..255 each.
        distance_bits: Largest Hamming distance of a near pair.
        color_distance: Largest mean absolute difference of a near pair's thumbnails.

    Returns:
        The groups and a spanning forest of near pairs, linear in N where all near pairs can be N². It is deterministic.
    """
    search = _Search(hashes_N, colors_NC, distance_bits, color_distance)
    members = np.arange(len(hashes_N))
    search.link_equal_hashes()
    search.link(members, hashes_N, np.zeros(len(hashes_N), np.int64), width=64, level=1)
    a_E, b_E = search.forest.edges()
    return NearForest(groups_N=search.forest.groups(), a_E=a_E, b_E=b_E, num_compared=search.num_compared)


class _Search:
    def __init__(self, hashes: NDArray[np.uint64], colors: NDArray[np.uint8], bits: int, color: float) -> None:
        self.hashes = hashes
        self.colors = colors
        self.bits = bits
        self.color_sum = color * colors.shape[1]
        # the difference of two sums is at most the sum of the differences: a cheap test before the exact one
        self.brightness = colors.sum(axis=1, dtype=np.int64)
        self.forest = Forest(len(hashes))
        self.num_compared = 0

    def link_equal_hashes(self) -> None:
        order = np.argsort(self.hashes, kind="stable")
        runs = run_numbers(np.zeros(len(order), np.int64), self.hashes[order])
        self._link_runs(order, np.zeros(len(order), np.uint64), runs, width=0, level=1)

    def link(
        self,
        members: NDArray[np.int64],
        values: NDArray[np.uint64],
        runs: NDArray[np.int64],
        *,
        width: int,
        level: int,
    ) -> None:
        """Link all near pairs within each run; its members agree in all bits but the `width` in `values`."""
        if width <= self.bits or level > MAX_LEVELS:
            for run in slices(runs):
                self._search_outward(members[run])
            return
        kept = np.concatenate([self._unless_few_hashes(members[run]) for run in slices(runs)]) if level > 1 else None
        if kept is not None:
            members, values, runs = members[kept], values[kept], runs[kept]
        edges = np.linspace(0, width, self.bits + 2).astype(int)
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            rotated = _rotated(values, int(end), width)
            order = np.lexsort((rotated, runs)) if level > 1 else np.argsort(rotated, kind="stable")
            rest_width = width - int(end - start)
            keys = rotated[order] >> np.uint64(rest_width)
            band_runs = run_numbers(runs[order], keys)
            rest = rotated[order] & np.uint64((1 << rest_width) - 1)
            self._link_runs(members[order], rest, band_runs, width=rest_width, level=level)

    def _link_runs(
        self, members: NDArray[np.int64], rest: NDArray[np.uint64], runs: NDArray[np.int64], *, width: int, level: int
    ) -> None:
        kept = self._open_runs(members, runs)
        members, rest, runs = members[kept], rest[kept], runs[kept]
        # neighbours in sorted order are the likeliest pairs: they link most of what is clustered
        self._compare(members, range(1, 4))
        kept = self._open_runs(members, runs)
        members, rest, runs = members[kept], rest[kept], runs[kept]
        run_lengths = lengths(runs)
        is_long = run_lengths > LONG_RUN
        if is_long.any():
            self.link(members[is_long], rest[is_long], runs[is_long], width=width, level=level + 1)
            members, runs, run_lengths = members[~is_long], runs[~is_long], run_lengths[~is_long]
        offset = 4
        while len(members) > offset:
            until = min(offset * 2, int(run_lengths.max()))
            if until <= offset:
                break
            self._compare(members, range(offset, until))
            offset = until
            kept = self._open_runs(members, runs) & (run_lengths > offset)
            members, runs, run_lengths = members[kept], runs[kept], run_lengths[kept]

    def _unless_few_hashes(self, members: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Link a run of few distinct hashes, such as thousands of blank images, at once; returns what is left to do."""
        hashes, inverse = np.unique(self.hashes[members], return_inverse=True)
        if len(hashes) > FEW_HASHES:
            return np.ones(len(members), bool)
        is_near = np.bitwise_count(hashes[:, None] ^ hashes) <= self.bits
        self.num_compared += len(hashes) ** 2 // 2
        has_other = is_near.sum(axis=1) > 1  # one is itself; equal hashes are linked before all others
        self._search_outward(members[has_other[inverse]])
        return np.zeros(len(members), bool)

    def _open_runs(self, members: NDArray[np.int64], runs: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each member's run still holds more than one group."""
        if not len(members):
            return np.zeros(0, bool)
        roots, firsts = self.forest.roots(members), starts(runs)
        return per_member(np.minimum.reduceat(roots, firsts) != np.maximum.reduceat(roots, firsts), runs)

    def _compare(self, members: NDArray[np.int64], offsets: range) -> None:
        """Compare each member with those at `offsets` after it, which may be of another run."""
        hashes, roots = self.hashes[members], self.forest.roots(members)
        pending: list[NDArray[np.int64]] = []
        for offset in offsets:
            distances = np.bitwise_count(hashes[offset:] ^ hashes[:-offset])
            self.num_compared += len(distances)
            (hits,) = np.nonzero(distances <= self.bits)
            hits = hits[roots[hits] != roots[hits + offset]]
            pending.append(self._near_in_color(members[hits], members[hits + offset]))
            if sum(map(len, pending)) > len(members) // 4:
                self.forest.unite(np.concatenate(pending))
                pending, roots = [], self.forest.roots(members)
        if pending:
            self.forest.unite(np.concatenate(pending))

    def _near_in_color(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pairs whose colours are near."""
        near = np.zeros(len(a), bool)
        for start in range(0, len(a), COLOR_CHUNK):
            chunk = slice(start, start + COLOR_CHUNK)
            near[chunk] = self._colors_are_near(a[chunk], b[chunk])
        return np.stack([a[near], b[near]], axis=1)

    def _colors_are_near(self, a: NDArray[np.int64] | np.int64, b: NDArray[np.int64]) -> NDArray[np.bool_]:
        near = np.abs(self.brightness[a] - self.brightness[b]) <= self.color_sum
        close = b[near]
        of_a = self.colors[a] if np.ndim(a) == 0 else self.colors[a][near]
        differences = self.colors[close].astype(np.int16) - of_a
        near[near] = np.abs(differences).sum(axis=1, dtype=np.int64) <= self.color_sum
        return near

    def _search_outward(self, members: NDArray[np.int64]) -> None:
        """Link a run by visiting: compare each member with those of the run that were not reached before it."""
        members = members[np.argsort(self.brightness[members], kind="stable")]
        brightness, hashes = self.brightness[members], self.hashes[members]
        lows = np.searchsorted(brightness, brightness - self.color_sum, side="left")
        highs = np.searchsorted(brightness, brightness + self.color_sum, side="right")
        _, groups, sizes = np.unique(self.forest.roots(members), return_inverse=True, return_counts=True)
        of_group = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
        is_left = np.ones(len(sizes), bool)
        num_left = len(sizes)
        pairs: list[NDArray[np.int64]] = []
        for start in np.argsort(sizes, kind="stable"):  # the largest last: when it is alone, the search ends
            if not is_left[start]:
                continue
            is_left[start] = False
            num_left -= 1
            frontier = list(of_group[start])
            while frontier and num_left:
                member = frontier.pop()
                low = lows[member]
                others = low + np.flatnonzero(is_left[groups[low : highs[member]]])
                self.num_compared += len(others)
                others = others[np.bitwise_count(hashes[others] ^ hashes[member]) <= self.bits]
                reached = others[self._colors_are_near(members[member], members[others])]
                new_groups, first = np.unique(groups[reached], return_index=True)
                is_left[new_groups] = False
                num_left -= len(new_groups)
                pairs.append(np.stack([np.full(len(first), members[member]), members[reached[first]]], axis=1))
                for group in new_groups:
                    frontier.extend(of_group[group])
        if pairs:
            self.forest.unite(np.concatenate(pairs))


def _rotated(values: NDArray[np.uint64], end: int, width: int) -> NDArray[np.uint64]:
    """Move the bits below `end` to the top of `width` bits."""
    if end == width:
        return values
    mask = np.uint64((1 << width) - 1)
    return ((values << np.uint64(width - end)) | (values >> np.uint64(end))) & mask


def run_numbers(runs_N: NDArray[np.int64], keys_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number the runs of equal keys within each run, from 0."""
    return np.cumsum(_begins(runs_N) | _begins(keys_N)) - 1


def starts(runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run begins."""
    return np.flatnonzero(_begins(runs_N))


def lengths(runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The length of each member's run."""
    of_run = np.diff(_bounds(runs_N))
    return np.repeat(of_run, of_run)


def per_member(values_R: NDArray, runs_N: NDArray[np.int64]) -> NDArray:
    """Give each member the value of its run."""
    return np.repeat(values_R, np.diff(_bounds(runs_N)))


def slices(runs_N: NDArray[np.int64]) -> Iterator[slice]:
    """The slice of each run."""
    bounds = _bounds(runs_N).tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        yield slice(start, end)


def _begins(values_N: NDArray) -> NDArray[np.bool_]:
    begins = np.ones(len(values_N), bool)
    begins[1:] = values_N[1:] != values_N[:-1]
    return begins


def _bounds(runs_N: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.append(starts(runs_N), len(runs_N))


class Forest:
    """Union-find over arrays: groups of N members, each alone at first, joined by pairs.

    It keeps as few of the pairs as connect each group; the same pairs in the same order give the same edges.
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
        """Join the groups of P pairs."""
        if not len(pairs_P2):
            return
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

        roots = np.stack([self.roots(pairs_P2[:, 0]), self.roots(pairs_P2[:, 1])], axis=1)
        names, nodes = np.unique(roots, return_inverse=True)
        nodes = np.sort(nodes.reshape(roots.shape), axis=1)
        _, first = np.unique(nodes[:, 0] * len(names) + nodes[:, 1], return_index=True)
        first = first[nodes[first, 0] != nodes[first, 1]]
        # distinct weights identify the chosen pairs and make the choice deterministic
        weights = (first + 1).astype(np.float64)
        shape = (len(names), len(names))
        tree = minimum_spanning_tree(coo_array((weights, (nodes[first, 0], nodes[first, 1])), shape=shape))
        self._kept.append(pairs_P2[np.sort(tree.data.astype(np.int64)) - 1])
        _, groups = connected_components(tree, directed=False)
        self._parent_N[names] = names[_first_members(groups)]

    def groups(self) -> NDArray[np.int64]:
        """The number of each member's group: that of its first member."""
        return _first_members(self.roots(np.arange(len(self._parent_N))))

    def edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The two ends of the pairs that were kept, the lower one first, sorted."""
        pairs = np.concatenate([np.empty((0, 2), np.int64), *self._kept])
        pairs.sort(axis=1)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        return pairs[:, 0], pairs[:, 1]


def _first_members(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Name each member's group by the index of its first member."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return first[inverse]


def pairs_across(
    hashes_N: NDArray[np.uint64],
    colors_NC: NDArray[np.uint8],
    train_N: NDArray[np.bool_],
    val_N: NDArray[np.bool_],
    *,
    distance_bits: int,
    color_distance: float,
) -> Iterator[tuple[int, int, int]]:
    """Near pairs of a training and a validation image, of N, with their Hamming distance; an image may be both.

    Every validation image is paired with the first image of each look in training that is near it, not only, as in
    `near_forest`, with enough to connect each group. Only groups on both sides are compared pairwise.
    """
    limits = {"distance_bits": distance_bits, "color_distance": color_distance}
    groups = near_forest(hashes_N, colors_NC, **limits).groups_N
    on_both = np.intersect1d(groups[train_N], groups[val_N])
    trained = np.flatnonzero(train_N & np.isin(groups, on_both))
    hashes = np.concatenate([hashes_N[trained, None].view(np.uint8), colors_NC[trained]], axis=1)
    trained = trained[np.sort(np.unique(hashes, axis=0, return_index=True)[1])]
    for image in np.flatnonzero(val_N & np.isin(groups, on_both)).tolist():
        others = trained[groups[trained] == groups[image]]
        bits, colors = differences(hashes_N[others], colors_NC[others], hashes_N[image], colors_NC[image])
        near = (bits <= distance_bits) & (colors <= color_distance)
        yield from ((a, image, b) for a, b in zip(others[near].tolist(), bits[near].tolist(), strict=True))


def differences(
    hashes_P: NDArray[np.uint64], colors_PC: NDArray[np.uint8], other_hashes: Any, other_colors: Any
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Hamming distances of P hashes and mean differences of their thumbnails, to P others or to a single one."""
    bits = np.bitwise_count(hashes_P ^ other_hashes).astype(np.int64)
    return bits, np.abs(colors_PC.astype(np.int16) - other_colors).mean(axis=1)
