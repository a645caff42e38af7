"""Whole scenes: windows, blending, GeoTIFF out."""
