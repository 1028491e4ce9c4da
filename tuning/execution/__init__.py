"""Trials on Ray: placed, fed with features, trained."""
