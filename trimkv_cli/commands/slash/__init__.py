"""The commands inside a conversation: one file per group, all listed in `table`."""
