"""`raymerge search --fuse A B C --prompts FILE`: the weights at which a few adapters answer best."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from raymerge.pipelines.search import find, prepare, with_settings
from raymerge.pipelines.searching.aim import aim_of
from raymerge.pipelines.searching.chosen import show
from raymerge.pipelines.searching.fused import Fused, as_project


def search_fuse(asked: Fused, *, settings: Mapping[str, Any], restart: bool = False, local: bool = False) -> int:
    """Search, and print the weights and the command that fuses with them. Returns the exit status."""
    opened = with_settings(as_project(asked), settings)
    chosen = find(prepare(opened, restart=restart, local=local), local=local)
    show(chosen, aim_of(opened.project))
    weights = chosen.written["weights"]
    places = " ".join(shlex.quote(f"{name}={place}") for name, place in opened.project.experts.items())
    listed = ",".join(f"{weights[name]:.4f}" for name in opened.project.experts)
    print(f"raymerge fuse {places} --weights={listed} --rank exact --out DIR", flush=True)  # = for a first one below 0
    return 0
