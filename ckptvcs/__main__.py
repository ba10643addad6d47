"""Run `ckpt` as `python -m ckptvcs`."""

import contextlib
import errno
import os
import signal
import sys


def main() -> None:
    """Run the command line.  Ctrl-C while its modules are loading ends it silently."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ckptvcs.store.descriptors import occupy_standard  # noqa: PLC0415

    occupy_standard()
    try:
        from ckptvcs.cli import app  # noqa: PLC0415
    except (ImportError, MemoryError, OSError) as error:
        reason = str(error) or os.strerror(errno.ENOMEM)
        line = f"error: cannot load ckptvcs: {reason}"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed or full
            # ckptvcs.text may not be loaded, so everything that is not ASCII is escaped.
            sys.stderr.write(line.encode("unicode_escape").decode("ascii") + "\n")
        sys.exit(8)  # errors.StorageError.exit_code
    app.main()


if __name__ == "__main__":
    main()
