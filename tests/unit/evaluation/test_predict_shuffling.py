"""Which samples are asked about, and which images replace another sample's."""

from collections import Counter

from mllm_assets.evaluation.predict import shuffled_partners, spread


def test_a_part_of_an_entry_is_from_everywhere_in_it() -> None:
    """Rows are in the order of the source, so the first of them may all be of one class."""
    assert spread(7, 3) == [0, 2, 4]
    assert spread(120, 24)[-2:] == [110, 115]
    assert spread(5, None) == spread(5, 5) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(0, 3) == spread(0, None) == []


def test_every_samples_images_are_used_once_and_never_by_itself() -> None:
    partners = shuffled_partners([[f"{i}.png"] for i in range(50)], seed=1)
    assert sorted(p for p in partners if p is not None) == list(range(50))
    assert all(partner != index for index, partner in enumerate(partners))


def test_partners_have_as_many_images() -> None:
    """Another number of images would not fit the placeholders."""
    images = [["a", "b"], ["c"], ["d", "e"], ["f"], [], ["g", "h", "i"]]
    assert shuffled_partners(images, seed=0) == [2, 3, 0, 1, None, None]


def test_the_same_file_does_not_stand_in_for_itself() -> None:
    """A question asked twice about one image would show no difference."""
    images = [["same"], ["same"], ["x"], ["y"]]
    partners = shuffled_partners(images, seed=3)
    assert all(p is None or images[p] != images[i] for i, p in enumerate(partners))
    assert Counter(p is None for p in partners)[False] == 4
    assert shuffled_partners([["same"], ["same"]], seed=3) == [None, None]


def test_the_same_seed_gives_the_same_partners() -> None:
    images = [[f"{i}.png"] for i in range(20)]
    assert shuffled_partners(images, seed=7) == shuffled_partners(images, seed=7)
    assert shuffled_partners(images, seed=7) != shuffled_partners(images, seed=8)
