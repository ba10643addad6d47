"""The index of the packs: editions in LMDB, and journals of what came after them."""
