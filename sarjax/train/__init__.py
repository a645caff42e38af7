"""Mesh, state, optimizer, step, checkpoints, teacher, loop."""
