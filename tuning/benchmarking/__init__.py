"""Fixed settings over categories and seeds, scored on test."""
