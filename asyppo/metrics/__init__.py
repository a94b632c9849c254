"""What a step is measured by."""
