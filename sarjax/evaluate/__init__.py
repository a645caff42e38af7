"""One exact confusion matrix on device; every metric is derived from it."""
