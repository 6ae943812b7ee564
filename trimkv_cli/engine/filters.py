"""Arithmetic of sampling, vectorised over rows: the tokens that are kept, and the one that is drawn.

Probabilities are summed as 64-bit integers (fixed point), so that a sum does not depend on the order of its terms:
neither on the batch around a row nor on the device's scan. A fraction is an int64 in units of 2^-32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_WEIGHT_ONE = 2**36  # the weight of a row's likeliest token; 2^27 tokens of it still fit in an int64
FRACTION_ONE = 2**32
_TOP_H_TOKENS = 100  # transformers' cap on the tokens whose entropy top-h sums
_BLOCK = 1024
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment and multipliers, as signed 64-bit integers
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def weigh(scores: Tensor, min_p: Tensor) -> Tensor:
    """Turn scores into integer weights, int64 in units of 2^-36 of the likeliest token; rarer ones than that get 0.

    So do tokens less likely than `min_p` [B] times the likeliest one.
    """
    relative = (scores - scores.amax(-1, keepdim=True)).exp_()
    relative.masked_fill_(relative < min_p[:, None], 0.0)
    return relative.mul_(_WEIGHT_ONE).long()


def weigh_likeliest(scores: Tensor, *, top_h: Tensor | None, top_k: Tensor, tail: Tensor, min_p: Tensor) -> Tensor:
    """Do as `weigh`, after cuts by top-h, top-k and top-p, each of which keeps the first tokens of one sorted order.

    Of equal tokens the lower id comes first. Without `top_h` no row is cut by that.
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    cut = ordered < ordered.gather(-1, top_k[:, None] - 1)  # more than `top_k` stay when that one is tied
    relative = ordered.sub_(ordered[:, :1].clone()).exp_()
    weights = (relative * _WEIGHT_ONE).long()
    if top_h is not None:
        cut |= ~_first(count_top_h(weights, top_h), weights)
    weights.masked_fill_(cut, 0)
    weights.masked_fill_(~_first(count_top_p(weights, tail), weights), 0)
    weights.masked_fill_(relative < min_p[:, None], 0)
    return torch.empty_like(weights).scatter_(-1, order, weights)


def count_top_h(ordered: Tensor, top_h: Tensor) -> Tensor:
    """Count the tokens [B] whose summed entropy stays within the fraction `top_h` [B] of that of the top 100."""
    weights = ordered[:, :_TOP_H_TOKENS]
    probs = weights.float() / weights.sum(-1, keepdim=True).float()
    entropy = (torch.special.entr(probs) * _WEIGHT_ONE).long()
    limit = fraction_of(entropy.sum(-1), top_h)
    kept = (entropy.cumsum(-1) <= limit[:, None]).sum(-1).clamp(min=1)
    return torch.where(top_h > 0, kept, ordered.shape[-1])


def count_top_p(ordered: Tensor, tail: Tensor) -> Tensor:
    """Count the tokens [B] left when the least likely go, up to the mass `tail` [B]; `ordered` are their weights."""
    total = ordered.sum(-1)
    return 1 + locate(ordered, total - fraction_of(total, tail) - 1)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw one id per row [B] by its share of `weights` [B, V]: the inverse CDF at the fraction `uniform` [B]."""
    return locate(weights, fraction_of(weights.sum(-1), uniform)).clamp(0, weights.shape[-1] - 1)


def locate(weights: Tensor, target: Tensor) -> Tensor:
    """Count the leading entries of each row [B] over which the running sum of `weights` [B, N] stays ≤ `target` [B].

    Finds the block first, then the entry in it: a whole row's running sum is never written.
    """
    blocks = pad(weights, (0, -weights.shape[-1] % _BLOCK)).view(len(weights), -1, _BLOCK)
    sums = blocks.sum(-1)
    ends = sums.cumsum(-1)
    block = torch.searchsorted(ends, target[:, None], right=True).clamp(max=sums.shape[-1] - 1)
    rest = target[:, None] - (ends - sums).gather(-1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1)
    return (block * _BLOCK + torch.searchsorted(inside, rest, right=True)).squeeze(-1)


def fraction_of(total: Tensor, fraction: Tensor) -> Tensor:
    """Return ⌊total · fraction⌋ exactly, in int64, for 0 ≤ `total` < 2^58 and a `fraction` in units of 2^-32."""
    high, low = total >> 27, total & (2**27 - 1)
    return (high * fraction + (low * fraction >> 27)) >> 5


def random_fraction(seed: Tensor, step: Tensor) -> Tensor:
    """Hash `seed` and `step`, int64 [B] each, to a uniform fraction in units of 2^-32: splitmix64, twice."""
    return _shift_right(_mix(_mix(seed) + (step + 1) * _GOLDEN), 32)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    mask: int = (1 << (64 - count)) - 1
    return (bits >> count) & mask


def _first(count: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device) < count[:, None]
