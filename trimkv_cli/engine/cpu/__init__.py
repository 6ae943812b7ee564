"""Fast path of a CPU, behind `make_decoder`."""

from trimkv_cli.engine.cpu.decoder import Decoder, make_decoder

__all__ = ["Decoder", "make_decoder"]
