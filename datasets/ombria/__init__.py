"""OMBRIA: flood mapping from pairs of Sentinel-1 and Sentinel-2 tiles, before and after."""
