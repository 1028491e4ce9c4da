"""The platform around ``ssn``: hyperparameter search on Ray, tracked in MLflow, with one champion per category."""
