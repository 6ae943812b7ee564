"""The display of a conversation."""
