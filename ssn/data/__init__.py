"""Datasets: manifests, raw layouts, splits, shards."""
