"""How many bytes a model's weights take, as they are or quantised by bitsandbytes with all of its state."""

from __future__ import annotations

from trimkv_cli.spec import DTYPE_BYTES, Dtype, ModelSpec, Quantisation

_NF4_BLOCK = 64  # weights that share one scale
_SCALE_BLOCK = 256  # scales that share one scale of their own
_SCALE_CODE_BYTES = 1024  # the table of 8-bit scales, one for each matrix
_NF4_CODE_BYTES = 64  # the 16 values, one table for each matrix
_OFFSET_BYTES = 4


def weight_bytes(spec: ModelSpec, dtype: Dtype, quantize: Quantisation, *, packs_nf4: bool = False) -> int:
    """Count the weights; embeddings, norms, biases and output head are never quantised, tied ones count once.

    `packs_nf4`: the device is a CPU with bf16 instructions, for which bitsandbytes lays nf4 out anew.
    """
    small = [shape for shape in spec.matrices if quantisable(shape[1], quantize)]
    whole = spec.weight_numel - spec.num_layers * sum(rows * columns for rows, columns in small)
    each = (matrix_bytes(rows, columns, quantize, packs_nf4=packs_nf4) for rows, columns in small)
    return whole * DTYPE_BYTES[dtype] + spec.num_layers * sum(each)


def matrix_bytes(rows: int, columns: int, quantize: Quantisation, *, packs_nf4: bool) -> int:
    """Count one quantised matrix and its state: int8 has a scale per row, nf4 one per 64 weights."""
    if quantize == "int8":
        return rows * columns + rows * 4
    values, blocks = -(-rows * columns // 2), -(-rows * columns // _NF4_BLOCK)
    if packs_nf4 and packable(rows):
        return values + blocks * 2 + _NF4_CODE_BYTES + _OFFSET_BYTES
    scales = blocks + -(-blocks // _SCALE_BLOCK) * 4 + _SCALE_CODE_BYTES
    return values + scales + _NF4_CODE_BYTES + _OFFSET_BYTES


def quantisable(columns: int, quantize: Quantisation) -> bool:
    """Say whether a matrix is quantised: on a CPU bitsandbytes misreads nf4 whose rows are no whole blocks."""
    return quantize == "int8" or (quantize == "nf4" and columns % _NF4_BLOCK == 0)


def packable(rows: int) -> bool:
    """Say whether the layout for CPUs has room for a matrix with so many rows."""
    return rows % 32 == 0
