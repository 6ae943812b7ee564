"""One file per command: options in, one call, one display."""
