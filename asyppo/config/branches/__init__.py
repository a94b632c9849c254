"""The branches of the settings' tree, by subject."""
