"""Training of retention gates by distillation from the frozen model."""
