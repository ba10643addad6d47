"""The operations of users on a repository, one per module; each module loads on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptvcs.ops import average as average
    from ckptvcs.ops import bisect as bisect
    from ckptvcs.ops import bundle as bundle
    from ckptvcs.ops import checkout as checkout
    from ckptvcs.ops import clone as clone
    from ckptvcs.ops import command as command
    from ckptvcs.ops import commit as commit
    from ckptvcs.ops import diff as diff
    from ckptvcs.ops import disk_usage as disk_usage
    from ckptvcs.ops import each as each
    from ckptvcs.ops import export as export
    from ckptvcs.ops import fetch as fetch
    from ckptvcs.ops import gc as gc
    from ckptvcs.ops import import_folder as import_folder
    from ckptvcs.ops import log as log
    from ckptvcs.ops import note as note
    from ckptvcs.ops import read as read
    from ckptvcs.ops import refs as refs
    from ckptvcs.ops import repair as repair
    from ckptvcs.ops import request as request
    from ckptvcs.ops import resume as resume
    from ckptvcs.ops import series as series
    from ckptvcs.ops import show as show
    from ckptvcs.ops import stats as stats
    from ckptvcs.ops import status as status
    from ckptvcs.ops import tensor as tensor
    from ckptvcs.ops import verify as verify
    from ckptvcs.ops import watch as watch


def __getattr__(name: str) -> object:
    try:
        return import_module(f"ckptvcs.ops.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"ckptvcs.ops.{name}":
            raise
        raise AttributeError(f"module 'ckptvcs.ops' has no attribute {name!r}") from error
