"""What a sweep tells its user, while it runs and afterwards."""
