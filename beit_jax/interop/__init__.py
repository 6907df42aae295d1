"""Foreign weights: one two-way name table per family."""
