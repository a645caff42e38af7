"""sarjax: semantic segmentation of SAR scenes, helped by optical imagery, in JAX."""

__version__ = "0.1.0"
