"""What a model, its gates and this machine measure; plain Python."""
