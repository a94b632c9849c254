"""Reward functions, and what calls them."""
