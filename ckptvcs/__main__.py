"""`python -m ckptvcs` is `ckpt`."""

import signal


def main() -> None:
    """Run the command line.  Ctrl-C while its modules are loaded ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ckptvcs.descriptors import occupy_standard  # noqa: PLC0415

    occupy_standard()
    from ckptvcs.cli import app  # noqa: PLC0415

    app.main()


if __name__ == "__main__":
    main()
