"""The policy, its critics, and how they are loaded."""
