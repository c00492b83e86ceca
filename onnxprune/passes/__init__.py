"""What to change: a pass reads a model and returns data; surgery alone applies it."""
