"""Let `python -m trimkv_cli` be `trimkv`."""

from __future__ import annotations

from trimkv_cli.app import main

if __name__ == "__main__":
    main()
