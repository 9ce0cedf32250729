"""What `raymerge prompt` is made of; the door is `pipelines.prompt`."""
