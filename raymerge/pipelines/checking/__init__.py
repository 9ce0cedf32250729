"""What `raymerge check` is made of; the door is `pipelines.check`."""
