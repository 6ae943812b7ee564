"""The terminal of a conversation: what is typed, and answers that grow downwards in the scrollback."""
