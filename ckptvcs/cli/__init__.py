"""The command line: arguments in, calls on Repo, text or JSON out.  Nothing is decided here."""
