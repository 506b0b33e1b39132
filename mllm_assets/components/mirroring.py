"""What each asset sends to the artefact store when it was made. Without a store nothing here is called."""

import dagster as dg

from mllm_assets.mirror import Mirror

# Sources and models are read again where they come from, and what is on the Hub is there
NOT_MIRRORED = ("raw", "hub_model")


def send(mirror: Mirror, key: dg.AssetKey, result: dg.MaterializeResult) -> None:
    """Mirror what an asset made, before it counts as made: after a failed upload the asset is materialised again.

    Raises:
        MllmAssetsError: The store cannot be reached, or refuses; what was made stays, and the next time only the rest
            is sent.
    """
    owner, name = key.path[0], key.path[-1]
    metadata = result.metadata or {}
    if owner == "pretrained" or name in NOT_MIRRORED:
        return
    path = metadata["path"]
    assert isinstance(path, str), f"{key.to_user_string()} says where it lies by its path below the root"
    directory = mirror.layout.root / path
    match name:
        case "train":
            mirror.push_split(directory)
            mirror.push_history(owner)
        case "val":
            pass  # the same version
        case "dataset_info":
            entries = metadata["entries"]
            assert isinstance(entries, dg.JsonMetadataValue) and isinstance(entries.value, dict) and result.data_version
            mirror.push_entries(owner, result.data_version.value, entries.value)
        case "vision_features":
            mirror.push_features(owner, directory)
        case "checkpoint":
            mirror.push_run(directory)
        case "released_model":
            mirror.push(directory)
            mirror.push_current(owner)
        case _:
            mirror.push(directory)
