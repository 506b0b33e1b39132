"""What each piece of an asset's metadata is: for the reference page, and for the test that none is left unsaid."""

from collections.abc import Mapping

from mllm_assets.evaluation.scores import METRICS, definitions

PATH = "Its path below the project's root."
COUNTS = {
    "num_samples": "Rows of this split.",
    "rows": "Eight of its rows, evenly spaced, with their pictures.",
    "report_path": "A page of all samples to filter and search, to open in a browser.",
    "num_raw": "Rows of the source.",
    "num_train": "Rows in train.",
    "num_val": "Rows in val.",
    "num_test": "Rows in test.",
    "num_unused": "Usable rows that are in no split; `unused_reasons` says why.",
    "num_rejected": "Rows that cannot be used; see `<dataset>/sample_quality`.",
    "num_augmented": "Changed copies among the rows of train.",
    "num_corrected": "Samples in a split whose answer a person gave; see `<dataset>/corrections`.",
    "unused_reasons": "Unused rows by reason.",
    "augmentations": "Changed copies by kind of change, and those left out by reason.",
    "num_copies_left_out": "Copies that `augment` did not make, because the row's words name what it changes.",
    "path": PATH,
}
SOURCE = {
    "revision": "The commit that was read, where the source has one.",
    "hub_id": "The repository on the Hugging Face Hub, where it is from there.",
    "license": "Its licence as the YAML says; it is in the model card.",
}

COPIES = {
    "version": "The release that it was made from.",
    "model_card": "What it is, how it is used, and the figures of the comparison.",
    "size_mib": "Size of its weights.",
    "size_of_release_mib": "Size of the release's weights.",
    "agreement": "The share of rows to which it gave the release's greedy answer.",
    "loss_distance_nats": "How far its mean loss is from the release's.",
    "path": PATH,
}

# of every asset; of several that one step makes, the first has the figures and the others 0
COST_KEYS: Mapping[str, str] = {
    "cost_wall_s": "Wall clock of the step's body.",
    "cost_cpu_s": "CPU seconds of all its processes, on other machines too.",
    "cost_gpu_s": "Seconds for which a process held a GPU, for each GPU.",
    "cost_peak_memory_gib": "Most main memory of one process, or of a GPU if that was more.",
    "cost_money": "The wall clock at `MLLM_ASSETS_PRICE_PER_HOUR`, where that is set.",
}
# by the last part of the key; "pretrained" is pretrained/<model>
METADATA_KEYS: Mapping[str, Mapping[str, str]] = {
    "raw": {
        "num_samples": "Rows of the source, before any is judged.",
        "rows": "Eight rows, evenly spaced in the source, with their pictures.",
        "size_mib": "Size of the ingested copy.",
        **SOURCE,
        "source_listing": "Digest of the names and times of a watched folder's files; a sensor compares it.",
        "path": PATH,
    },
    "sample_quality": {
        "num_samples": "Rows that were measured.",
        "num_rejected": "Rows that cannot be used.",
        "num_duplicates": "Rows that have an exact or near-duplicate.",
        "num_decoded": "Images that were decoded in this run; the others were measured before.",
        "reject_reasons": "Rejected rows by reason.",
        "flags": "Usable rows with something odd (dark, blurred, repeated caption) by kind.",
        "report": "Histograms, the worst samples and duplicate pairs.",
        "report_path": "The same as a page to open in a browser.",
        "path": PATH,
    },
    "corrections": {
        "num_relabelled": "Samples whose answer a person gave.",
        "num_dropped": "Samples that a person took out of their split.",
        "num_kept": "Samples that a person found right as they are.",
        "num_unmatched": "Decisions about samples that this version of the source does not have; they change nothing.",
        "newest": "The last twenty decisions.",
        "unmatched": "Decisions that change nothing, and why.",
        "decisions_digest": "Digest of the file of decisions; `mllm-assets run` compares it.",
        "path": PATH,
    },
    "train": COUNTS,
    "val": COUNTS,
    "test": COUNTS,
    "dataset_info": {"entries": "What was written into `data/dataset_info.json`.", "path": PATH},
    "pretrained": {"size_mib": "Size of the model's files.", **SOURCE, "model_path": "The model's directory."},
    "vision_features": {
        "num_images": "Images of the recipe's entries.",
        "num_images_computed": "Those that went through the tower in this run; the others were cached.",
        "size_mib": "Size of the cache of this tower.",
        "tower_fingerprint": "Digest of the frozen tower's weights and of how images are prepared.",
        "path": PATH,
    },
    "checkpoint": {
        "training_loss": "Plot of the losses with `plot_loss: true`: all steps, and the last three quarters of them.",
        "final_loss": "Mean training loss since the last line of the log, nats a token.",
        "eval_loss": "Loss on `eval_dataset` at the end, where the recipe evaluates.",
        "num_steps": "Optimizer steps.",
        "mlflow_run": "The run's page or folder, with `report_to: mlflow`.",
        "wandb_run": "The run's page or folder, with `report_to: wandb`.",
        "train_wall_s": "Seconds of training, without loading and caching.",
        "samples_per_s": "Training samples a second.",
        "tokens_per_s": "Training tokens a second, prompt and image included.",
        "padding_share": "Share of the batches' places that hold no token; `group_by_length: true` lowers it.",
        "peak_memory_gib": "Most memory in use: of the GPU, or of the process on a CPU.",
        "memory_estimate_gib": "What the model was expected to need; on a CPU the libraries come on top, about 1 GiB.",
        "published_step": "The step whose model is published; `final_loss` and `eval_loss` are those of that step.",
        "overrides": "What the launch set instead of the recipe's file; `latest` does not point to such a run.",
        "num_trainable_params": "Parameters that train.",
        "quantization": "How the base was held while adapters trained on it, with `quantization_bit`.",
        "model_path": "The model in Hugging Face's format.",
        "path": "The run's directory.",
        "fingerprint": "Digest of all that the run depends on; names its directory.",
        "base_model": "What it was trained from, with Hub id, commit and licence where that is a model of the Hub.",
        "pretrained_model": "The same facts of the model that the first of a chain of recipes started from.",
        "already_finished": "This very run was done before: nothing was trained.",
        "warnings": "Warnings of the run, recipe keys without effect included.",
        "caches": "Which caches it trained from, and why it did not use the others.",
        "device": "Device, precision and number of processes.",
        "trainable": "Module, tensors, parameters and share of what trains; equal layers are one row.",
    },
    "preferences": {
        "pairs": "The first pairs.",
        "num_asked": "Rows that the model was trained on and asked about.",
        "num_pairs": "Answers that were wrong, each a pair with its reference.",
        "left_out": "Answers that are no pair, by reason.",
        "weights_digest": "Digest of the model's weights.",
        "data_digests": "Digest of each entry that it was trained on.",
        "path": PATH,
    },
    "quantized": COPIES,
    "what_it_gained": {
        "gained": "Each metric without and with corrections, and the gain with its interval, for each entry.",
        "num_changed": "Training rows whose answers people changed.",
        "num_dropped": "Training rows that people took out.",
        "run_without": "The run without corrections.",
        "weights_digest": "Digest of the model with corrections.",
        "path": PATH,
    },
    "predictions": {
        "gallery": "Telling samples: picture, question, right answer, both models' answers, loss.",
        "gallery_path": "All samples as a page with both answers, to open in a browser.",
        "num_samples": "Samples that were asked.",
        "num_predictions": "Answers, of both models together.",
        "wall_s": "Seconds that it took.",
        "path": PATH,
        "weights_digest": "The checkpoint that answered.",
        "data_digests": "Digest of each evaluation entry as it was then; a release compares it with the files.",
    },
    "eval_metrics": {
        **{name: text[:1].upper() + text[1:] + "." for name, text in definitions().items() if name in METRICS},
        "num_samples": "Samples that were scored.",
        "path": PATH,
        "metrics": "Each metric of the base and the tuned model and the gain with its interval, for each entry.",
        "gains_over_release": "Each metric's gain over the current release, where there is one.",
        "confusion": "Picture of what was named for each label, of at most 20, and the most frequent mistakes.",
        "gates": "Each gate's figure with its interval, and its threshold; the sentences are in the checks.",
        "definitions": "Library, version and tokeniser of each metric.",
    },
    "released_model": {
        "version": "The release that holds this model.",
        "current": "The release that is in use; another one after a rollback.",
        "model_card": "Its README.md.",
        "path": PATH,
        "leaks": "Validation samples that were trained on, which is allowed only with `allow_leakage`.",
        "gates": "Each gate's figure with its interval and its threshold, as it was judged for this release.",
        **{
            name.replace("cost_", "line_"): f"{text.removesuffix('.')}; over the line up to the release."
            for name, text in COST_KEYS.items()
        },
    },
    "hub_model": {
        "dry_run": "Nothing was sent.",
        "repo_id": "The repository on the Hugging Face Hub.",
        "private": "Only its owner sees it.",
        "revision": "Branch.",
        "version": "The release that was pushed.",
        "files": "Files and their sizes.",
        "num_files": "Number of files.",
        "size_mib": "Size of the files.",
        "commit": "The commit that the push made.",
        "commit_url": "Its page.",
    },
}

PROGRESS_KEYS: Mapping[str, str] = {
    "stage": "What is being done: `train`, `evaluate`, ...",
    "progress": "Steps or rows done, of how many.",
    "time_left": "Of the stage, at its mean speed.",
    "elapsed": "Since the stage began.",
    "num_done": "Steps or rows done.",
    "loss": "The newest training loss.",
    "eval_loss": "The newest loss on `eval_dataset`.",
    "samples_per_s": "Since the stage began.",
    "rows_per_s": "Since the stage began.",
}
