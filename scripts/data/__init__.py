"""Makes data sets.

python -m scripts.data.shards        WebDataset shards from folders or a tar archive of images
python -m scripts.data.index         the index of such shards, to train from a URL
python -m scripts.data.digits_coco   scikit-learn's digits as a detection data set in COCO's format
"""
