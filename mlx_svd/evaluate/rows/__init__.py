"""Where the rows of tasks come from, checked."""
