"""scoredraw."""
