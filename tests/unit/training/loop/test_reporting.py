"""The table before the first step, and what is said of padding after the last."""

from mllm_assets.training.loop.padding import PaddingCount
from mllm_assets.training.loop.reporting import trainable_lines


def test_padding_is_named_with_its_cure_where_a_tenth_of_the_batches_is_nothing_else() -> None:
    padding = PaddingCount()
    assert padding.share is None and padding.notice("random") is None
    padding.add(88, 8)
    assert padding.notice("random") is None
    padding.add(72, 32)
    assert padding.share == 0.2
    assert padding.notice("random") == (
        "padding: 20% of the places in the batches hold no token. group_by_length: true puts rows of about one length "
        "together."
    )
    assert "group_by_length" not in str(padding.notice("group_by_length"))


def test_equal_layers_in_a_row_share_a_line_and_others_do_not() -> None:
    def row(module: str, num_params: int = 1000) -> dict[str, object]:
        return {"module": module, "num_tensors": 13, "num_params": num_params, "share": 0.0}

    table = [row(f"language_model.layers.{k}") for k in (0, 1, 3)] + [row("language_model.layers.4", 2000)]
    lines = trainable_lines([row("multi_modal_projector"), *table], 20_000)
    assert lines == [
        "module                        tensors      parameters    share",
        "multi_modal_projector              13           1,000    5.00%",
        "language_model.layers.0 to 1       26           2,000   10.00%",
        "language_model.layers.3            13           1,000    5.00%",
        "language_model.layers.4            13           2,000   10.00%",
        "all that trains                    65           6,000   30.00%",
        "of                                             20,000",
    ]
