"""The demo's world: personas made from a seed, and a small Llama to train their adapters on."""

from raymerge.world.make import make_world
from raymerge.world.pretrain import pretrain

__all__ = ["make_world", "pretrain"]
