"""Data sets of others as lines to train on: python -m numpy_ref.dataset convert SRC --output DIR.

What is read: COCO's JSON (coco.py), Pascal VOC (voc.py), parquet files as the Hugging Face Hub has them (tables.py) and
WebDataset shards (shards.py). What is written, by convert.py: a folder with `rows.jsonl`, lines {"image", "prefix",
"suffix"}, and the pictures that came inside of a file.
"""
