"""What every gate is: a module that scores the tokens of one layer."""

from __future__ import annotations

from torch import Tensor, nn


class RetentionGate(nn.Module):
    """Score tokens for one layer; subclasses say how."""

    reads_kv = False  # the token's rotated keys and its values are given as hidden states, as `kv_states` joins them

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Return `log_beta` `[B, T, Hkv]`, float32, ≤ 0; a static gate the score itself, any finite number.

        `hidden_states` `[B, T, hidden]` enter `self_attn` (after its layer norm, before QKV); `positions` `[B, T]`
        count from 0. Where a position is −1 (padding) the result has no meaning.
        """
        raise NotImplementedError
