"""The bounded KV cache: gates that score tokens, slots that hold them, attention over both."""
