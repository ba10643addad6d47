"""torch.distributed.checkpoint: every process codes its own shards, and all of them are one commit.

dcp.save(state, checkpoint_id="step-2000", storage_writer=CkptWriter("runs"))
dcp.load(state, checkpoint_id="step-2000", storage_reader=CkptReader("runs"))

A commit is a directory: `rank-N.pt` for each process, as torch.save would write its part of the
state, and `checkpoint.json` (`chunks.py`), which says what each has.
"""

from ckptvcs.errors import missing_extra

try:
    from ckptvcs.integrations.distributed.reader import CkptReader, load_state
    from ckptvcs.integrations.distributed.writer import CkptWriter
except ImportError as error:
    raise missing_extra("torch") from error

__all__ = ["CkptReader", "CkptWriter", "load_state"]
