"""Encode the tensors of checkpoints into packs."""
