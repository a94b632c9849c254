"""The algorithm: pure functions on tensors, from rewards and values to losses."""
