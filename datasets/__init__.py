"""TFDS builders, a folder each, installed as `sarjax_datasets`."""
