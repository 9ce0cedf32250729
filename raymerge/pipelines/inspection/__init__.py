"""What `raymerge inspect` is made of; the door is `pipelines.inspect`."""
