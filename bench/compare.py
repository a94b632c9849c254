"""``python -m bench.compare OLD NEW --ratio 1.1``: exit with 1 if anything got slower than that, or stopped working."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import results
from bench.results import Result, Row


def compare(
    old: Result, new: Result, ratio: float, *, everyone: bool = False, by: str = "seconds"
) -> tuple[list[str], list[str]]:
    """Return a line for each row both have, and a line for each that is worse than allowed.

    ``by`` "floor" compares multiples of the floor, which makes sense of two devices; "seconds" does not.
    """
    before = {_key(case, row): row for case, row in results.rows(old)}
    shared, worse = [], []
    for case, row in results.rows(new):
        was = before.get(_key(case, row))
        if was is None or was["status"] != "ok" or not (everyone or row["ours"]):
            continue
        name = f"{case['op']}, {case['name']}: {row['contender']}"
        if row["status"] == "failing":
            worse.append(f"{name}: was ok, now fails: {row['reason']}")
        elif row["status"] == "ok":
            factor = _figure(row, by) / _figure(was, by)
            line = f"{name}: {_figure(was, by):.4g} -> {_figure(row, by):.4g} {by}, {factor:.2f}x"
            shared.append(line)
            if factor > ratio:
                worse.append(line)
    return shared, worse


def _key(case: dict, row: Row) -> tuple:
    """Same op, shapes, dtype and contender: a case whose shapes changed is another case."""
    return case["op"], case["name"], tuple(sorted(case["sizes"].items())), case["dtype"], row["contender"]


def _figure(row: Row, by: str) -> float:
    return row["floor_multiple"] if by == "floor" else row["seconds"]["median"]


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; 1 if something is worse, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--ratio", type=float, default=1.1, help="how much slower is too slow (default: 1.1)")
    parser.add_argument("--by", choices=["seconds", "floor"], default="seconds", help="floor: multiples of the floor")
    parser.add_argument("--all", action="store_true", help="the other contenders too, not only ours")
    chosen = parser.parse_args(arguments)

    old, new = results.load(chosen.old), results.load(chosen.new)
    if chosen.by == "seconds" and old["device"]["name"] != new["device"]["name"]:
        print(f"{old['device']['name']} and {new['device']['name']} differ: compare them with --by floor")
        return 2
    shared, worse = compare(old, new, chosen.ratio, everyone=chosen.all, by=chosen.by)
    for line in shared:
        print(line)
    if not shared and not worse:
        print("nothing in common")
        return 2
    for line in worse:
        print(f"WORSE than {chosen.ratio}x: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
