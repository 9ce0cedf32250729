"""What training.py prints: one table for each comparison, no wider than WIDTH."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH = 100
Found = Mapping[str, Any]


def show_many(found: Found) -> None:
    """Seconds of all adapters, ours and Trainer's."""
    count, sample = found["adapters"], found["sample"]
    print(f"many: {count} adapters of {found['steps']} steps, base {found['base']}")
    _head("ms each")
    ours, theirs = _in(found["ours_in"]), _in(found["theirs_in"])
    for name, place, key, how in (
        (f"ours, {found['item']} at once", ours, "ours_s", f"measured: all, {_rounds(found)}"),
        ("PEFT + Trainer, one at a time", theirs, "theirs_s", f"extrapolated: {sample} of {count}"),
        ("  trainer.train()'s own loop", theirs, "theirs_loop_s", "extrapolated, same sample"),
        ("floor", ours, "floor_s", "calculated"),
    ):
        _line(name, place, found[key], found[key] / count * 1000, how)
    print(f"  Trainer's settings, the quickest of these: {theirs}, {found['theirs']}")
    for name, seconds in found["tried_s"].items():
        print(f"    {name:45s} {seconds * 1000:7.0f} ms for a short training, median of 3")
    print(f"  ratio {found['ratio']:.2f} (2 asked), to Trainer's loop alone {found['ratio_to_loop']:.2f}", end="")
    print(f", in processor time {found['ratio_busy']:.2f}; our padding {found['padding']:.1%}")
    _show_floor(found, found["ours_s"])
    _show_memory(found)


def show_unequal(found: Found) -> None:
    """Seconds of adapters of unequal size, together and one at a time."""
    (least, median, most), count = found["rows"], found["adapters"]
    rows = f"{least} to {most} rows (median {median:g})"
    print(f"unequal: {count} adapters of {rows}, {found['steps']} steps in all, base {found['base']}")
    _head("ms each")
    for name, key, how in (
        ("ours, together", "together_s", f"measured: all, {_rounds(found)}"),
        ("ours, one at a time", "one_at_a_time_s", f"extrapolated: {found['sample']} of {count}"),
        ("floor", "floor_s", "calculated"),
    ):
        _line(name, _in(found["in"]), found[key], found[key] / count * 1000, how)
    print(f"  one at a time: longest first, extrapolated from {found['sample_steps']} steps of {found['steps']}")
    print(f"  gain {found['ratio']:.2f}, in processor time {found['ratio_busy']:.2f}", end="")
    print(f"; padding of ours together {found['padding']:.1%}")
    _show_floor(found, found["together_s"])
    print()


def show_alone(found: Found) -> None:
    """Tokens a second of one adapter."""
    print(f"alone: one adapter, {found['steps']} steps, {found['tokens']} tokens, base {found['base']}")
    _head("tokens/s")
    measured = f"measured: {_rounds(found)}"
    for name, key, how in (
        ("ours", "ours_s", measured),
        ("PEFT + Trainer", "theirs_s", measured),
        ("  trainer.train()'s own loop", "theirs_loop_s", measured),
        ("floor", "floor_s", "calculated"),
    ):
        _line(name, _in(found["in"]), found[key], found["tokens"] / found[key], how)
    print(f"  Trainer's settings, the quickest of these: {found['theirs']}")
    print(f"    of the loop alone: {found['theirs_loop']}")
    for name, (whole, loop) in found["tried_s"].items():
        times = f"{whole * 1000:7.0f} ms, loop {loop * 1000:7.0f} ms"
        print(f"    {name:33s} {times} for {found['tried_steps']} steps, median of 3")
    ratio = f"{found['ratio']:.2f} (0.9 asked)"
    print(f"  ratio of tokens/s, ours to Trainer's {ratio}, to its loop alone {found['ratio_to_loop']:.2f}")
    print(f"  same work: losses apart {found['losses_apart']:.1e}, adapters {found['adapters_apart']:.1e}")
    _show_floor(found, found["ours_s"])
    _show_memory(found)


def _head(unit: str) -> None:
    print(f"  {'':29s} {'processes x threads':>19s} {'seconds':>9s} {unit:>9s}")


def _line(name: str, place: str, seconds: float, each: float, how: str) -> None:
    print(f"  {name:29s} {place:>19s} {seconds:9.2f} {each:9.0f}  {how}")


def _in(place: tuple[int, int]) -> str:
    return f"{place[0]} x {place[1]}"


def _rounds(found: Found) -> str:
    return "once" if found["rounds"] == 1 else f"median of {found['rounds']}"


def _show_floor(found: Found, ours: float) -> None:
    speed = f"{found['speed'] / 1e9:.0f} G a second"
    print(f"  ours takes {ours / found['floor_s']:.2f} times the floor: the least operations, at {speed},")
    print(f"    the speed of a large product by {found['library']} in all processes")


def _show_memory(found: Found) -> None:
    ours, theirs = found["memory_mib"]["ours"], found["memory_mib"]["theirs"]
    print(f"  peak above the loaded base, a process: ours {ours:.0f} MiB, PEFT + Trainer {theirs:.0f} MiB\n")
