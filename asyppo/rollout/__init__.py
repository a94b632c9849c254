"""From prompts to a rewarded batch."""
