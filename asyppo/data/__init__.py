"""Prompts, and batches of responses."""
