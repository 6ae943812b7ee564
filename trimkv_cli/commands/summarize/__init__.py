"""`trimkv summarize`."""
