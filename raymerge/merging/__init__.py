"""Tensor maths of merging: no files, no model. `merge.merge` is the door; `rank` and `methods` need no torch."""
