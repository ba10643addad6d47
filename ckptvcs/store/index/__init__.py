"""The index of the packs: LMDB editions, and journals of the changes after each edition."""
