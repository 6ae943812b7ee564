"""The measures of a model, its gates and this machine; plain Python."""
