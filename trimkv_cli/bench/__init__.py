"""Measurements; nothing here decides anything."""
