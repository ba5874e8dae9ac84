"""Numbers that say how good a prompt is, from its scores and answers."""
