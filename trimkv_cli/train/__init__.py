"""Trains retention gates by distillation from the frozen model."""
