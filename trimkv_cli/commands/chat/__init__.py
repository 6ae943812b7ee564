"""`trimkv chat` and its slash commands."""
