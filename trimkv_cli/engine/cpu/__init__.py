"""Fast path of a CPU: packed matrices, and the decoder behind `make_decoder`."""

from trimkv_cli.engine.cpu.decoder import Decoder, make_decoder
from trimkv_cli.engine.cpu.packed import (
    PackedEmbedding,
    PackedLinear,
    Scratch,
    pack,
    pack_int4,
    pack_vocabulary,
    settle,
)

__all__ = [
    "Decoder",
    "PackedEmbedding",
    "PackedLinear",
    "Scratch",
    "make_decoder",
    "pack",
    "pack_int4",
    "pack_vocabulary",
    "settle",
]
