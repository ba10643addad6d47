"""`python -m ckptvcs` is `ckpt`."""

from ckptvcs.cli.app import main

main()
