"""From names, folders and files to an engine."""
