"""Change detection: images of two dates and what changed between them, in folders A, B and label."""
