"""Every byte of a run before anything is loaded; plain Python."""
