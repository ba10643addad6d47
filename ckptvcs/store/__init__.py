"""Bytes <-> ids, durable.  The store does not know what its objects mean."""
