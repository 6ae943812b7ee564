"""Attention over a bounded set of slots, and the eviction that keeps it bounded."""

from trimkv_kernels.operations import (
    Obstacle,
    Operations,
    StepOperations,
    operations_for,
    step_operations_for,
    triton_obstacle,
)
from trimkv_kernels.pool import SlotPool
from trimkv_kernels.slots import Journal, LayerTable, Slots

__all__ = [
    "Journal",
    "LayerTable",
    "Obstacle",
    "Operations",
    "SlotPool",
    "Slots",
    "StepOperations",
    "operations_for",
    "step_operations_for",
    "triton_obstacle",
]
