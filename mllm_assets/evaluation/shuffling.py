"""Which sample's images stand in for another's."""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

_MOST_SHIFTS = 100  # a pair that still shares a file after so many tries goes without a partner


def shuffled_partners(images: Sequence[Sequence[Hashable]], *, seed: int) -> list[int | None]:
    """Pair each sample with another one that has as many images, all of them different files.

    The pairing is a permutation within the samples of one image count: every sample's images are used once, none by
    its own sample. It depends on the samples and the seed only.

    Returns:
        For each sample the index of its partner; None for a sample without images or without a partner.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, own in enumerate(images):
        if own:
            groups[len(own)].append(index)
    partners: list[int | None] = [None] * len(images)
    generator = random.Random(seed)
    for _, members in sorted(groups.items()):
        order = members[:]
        generator.shuffle(order)
        shift = _best_shift(images, order)
        for position, index in enumerate(order):
            partner = order[(position + shift) % len(order)]
            if set(images[index]).isdisjoint(images[partner]):
                partners[index] = partner
    return partners


def _best_shift(images: Sequence[Sequence[Hashable]], order: Sequence[int]) -> int:
    """The rotation with the fewest pairs that share a file; the first one without any, in almost every dataset."""
    best, best_num_shared = 0, len(order)
    for shift in range(1, min(len(order), _MOST_SHIFTS)):
        rotated = [*order[shift:], *order[:shift]]
        num_shared = sum(not set(images[a]).isdisjoint(images[b]) for a, b in zip(order, rotated, strict=True))
        if num_shared < best_num_shared:
            best, best_num_shared = shift, num_shared
        if not num_shared:
            break
    return best
