"""The table before the first step."""

from mllm_assets.training.loop.reporting import trainable_lines


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
