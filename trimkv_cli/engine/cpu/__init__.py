"""The fast path of a CPU, behind `make_decoder`."""
