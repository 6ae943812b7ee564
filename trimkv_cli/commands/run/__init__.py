"""`trimkv run`."""
