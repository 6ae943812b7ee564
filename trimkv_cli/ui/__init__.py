"""Displays; the only place that knows a terminal."""
