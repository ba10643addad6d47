"""commit_async: a copy of the state, a queue, and the process that commits."""
