"""Which configurations a sweep tries, and which of them go on."""
