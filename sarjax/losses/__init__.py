"""Loss terms: pure functions of arrays, each a (total, weight) pair over valid pixels."""
