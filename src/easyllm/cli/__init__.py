"""The command line: one thin file a verb group, nothing heavy imported before a verb runs."""
