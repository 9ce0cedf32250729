"""What `raymerge fuse` is made of; the door is `pipelines.fuse`."""
