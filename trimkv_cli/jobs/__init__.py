"""Batch jobs: lines in, one record per line out; nothing here knows a model or a terminal."""
