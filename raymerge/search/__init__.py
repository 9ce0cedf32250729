"""Search over recipes: the space, the study that proposes and remembers trials, and the choice among them. No Ray."""
