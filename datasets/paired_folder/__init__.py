"""A folder of one's own: SAR, optical or both, with labels, as a description in TOML says."""
