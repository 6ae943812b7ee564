"""Conversations of many turns: what was said, the states of the cache between turns, and where both are stored."""
