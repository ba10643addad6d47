"""The state of a git repository, read from its files.  git itself is never called."""
