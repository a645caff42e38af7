"""Geometry, radiometry and network inputs on device: pure and keyed."""
