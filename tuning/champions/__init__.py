"""From a category's trials to its registered model."""
