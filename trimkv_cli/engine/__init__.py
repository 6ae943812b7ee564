"""The loop that turns requests into tokens inside a memory budget."""
