"""Products as a processor with bf16 instructions multiplies: microseconds."""

from __future__ import annotations

PRODUCTS: dict[str, float] = {
    "fp32@1": 400.0,
    "bf16@1": 300.0,
    "int8@1": 160.0,
    "int4@1": 70.0,
    "fp32@512": 12_000.0,
    "bf16@512": 5_000.0,
    "int4@512": 11_400.0,
    "unpack": 800.0,
}
