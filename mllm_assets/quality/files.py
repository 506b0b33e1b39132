"""The files of a finished assessment, `data/.quality/<dataset>/<digest>/`."""

QUALITY_FILE = "quality.parquet"  # a row a sample, in the order of the source
IMAGES_FILE = "images.parquet"  # a row a different image, in the order of first use
PAIRS_FILE = "pairs.parquet"  # near-duplicate looks, which hold the groups together
DUPLICATES_FILE = "duplicates.parquet"  # the same for people: pairs of samples and their images
