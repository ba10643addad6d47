"""torch.distributed.checkpoint: each process encodes its own shard of one commit.

dcp.save(state, checkpoint_id="step-2000", storage_writer=CkptWriter("runs"))
dcp.load(state, checkpoint_id="step-2000", storage_reader=CkptReader("runs"))

The commit is a directory.  `rank-N.pt` holds the part of one process, as torch.save would write it.
`checkpoint.json` (`chunks.py`) lists the chunks of all tensors.
"""

from ckptvcs.errors import missing_extra

try:
    from ckptvcs.integrations.distributed.reader import CkptReader, load_state
    from ckptvcs.integrations.distributed.writer import CkptWriter
except ImportError as error:
    raise missing_extra("torch") from error

__all__ = ["CkptReader", "CkptWriter", "load_state"]
