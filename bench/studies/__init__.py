"""Studies of a whole step, each a command of its own."""
