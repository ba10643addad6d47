"""`python -m ckptvcs` is `ckpt`."""

import contextlib
import errno
import os
import signal
import sys


def main() -> None:
    """Run the command line.  Ctrl-C while its modules are loaded ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ckptvcs.store.descriptors import occupy_standard  # noqa: PLC0415

    occupy_standard()
    try:
        from ckptvcs.cli import app  # noqa: PLC0415
    except (ImportError, MemoryError, OSError) as error:
        reason = str(error) or os.strerror(errno.ENOMEM)
        sys.exit(_refused(f"error: cannot load ckptvcs: {reason}"))
    app.main()


def _refused(line: str) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or full
        # Without the modules that make texts plain: all but ASCII is escaped.
        sys.stderr.write(line.encode("unicode_escape").decode("ascii") + "\n")
    return 8  # of errors.StorageError


if __name__ == "__main__":
    main()
