"""Several processes: who does what, and models in pieces."""
