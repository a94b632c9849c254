"""A run: its directory, what it writes and shows, how it stops."""
