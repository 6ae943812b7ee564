"""Which factor set a long-RoPE model (Phi-3) rotates with: chosen per sequence by the engine, never by the batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimkv_cli.cache.releases import rotary_embedding


class LongRope:
    """Hold both factor sets of a model, and put one in force for the next forward.

    transformers picks the set from the largest position of the batch; under a name that it does not know it leaves the
    frequencies alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._rotary = rotary_embedding(model)
        config = self._rotary.config
        original = config.rope_parameters["original_max_position_embeddings"]
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        device = self._rotary.inv_freq.device
        self._sets = [compute(config, device, seq_len=length)[0] for length in (original, original + 1)]
        self._rotary.rope_type = "fixed"

    @staticmethod
    def used_by(config: Any) -> bool:
        """Tell whether a model's config asks for long-RoPE."""
        return bool((getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope")

    def use(self, *, long: bool) -> None:
        """Rotate with the long or the short factors from now on."""
        chosen: torch.Tensor = self._sets[long]
        self._rotary.inv_freq.copy_(chosen)
