"""Durable storage of objects by id.  The store does not interpret their content."""
