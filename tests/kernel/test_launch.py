"""Sizes of launches: every slot is some split's, and a GPU is kept at work."""

from __future__ import annotations

import pytest

from trimkv_kernels.launch import MOST_SPLITS, Chip, decode_launch


@pytest.mark.parametrize("chip", [Chip(0, 132), Chip(89, 1), Chip(90, 132), Chip(120, 170)])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_splits_cover_all_slots_once_and_are_enough(chip: Chip, head_dim: int) -> None:
    """Catches slots that no split reads, one without any, more than a merge takes, and too few for a large GPU."""
    for size in (1, 15, 64, 100, 512, 704, 1024, 4096, 16_384):
        for programs in (1, 8, 12, 64, 512, 5000):
            launch = decode_launch(programs=programs, size=size, head_dim=head_dim, element_size=2, chip=chip)
            assert launch.split_slots % launch.block == 0
            assert (launch.splits - 1) * launch.split_slots < size <= launch.splits * launch.split_slots
            assert launch.splits <= MOST_SPLITS
            can = min(-(-size // launch.block), MOST_SPLITS // 2 + 1)  # what blocks cannot be halved to
            assert launch.splits >= can or launch.splits * programs >= 8 * chip.multiprocessors
