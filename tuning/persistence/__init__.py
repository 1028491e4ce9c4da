"""What of a sweep outlives its driver."""
