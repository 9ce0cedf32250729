"""What `raymerge search` is made of: how a trial is scored, what is shown of it, and what becomes of the winner."""
