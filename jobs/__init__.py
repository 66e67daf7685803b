"""What to train: one function per run, each returning a ``Job``; a variant calls its parent and replaces two fields."""
