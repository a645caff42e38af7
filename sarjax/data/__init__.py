"""Sources, statistics, pipeline and synthesis: numpy only, no jax."""
