"""Fast path of a GPU: the decoder behind `make_decoder`."""

from trimkv_cli.engine.cuda.decoder import Decoder, make_decoder

__all__ = ["Decoder", "make_decoder"]
