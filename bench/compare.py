"""Two runs on one card, held against each other: ``python -m nemokernels.bench.compare OLD NEW``.

Fails where our share of the roofline fell by more than 3 % or three median absolute deviations,
whichever is more, and where a row of the old run is missing from the new one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nemokernels.bench.report import entry, why_missing

TOLERANCE = 0.03
DEVIATIONS = 3.0


class Incomparable(ValueError):
    """Two files that say nothing about each other."""


def load(path: Path) -> dict:
    """A run's document. Raises Incomparable if the file is none."""
    try:
        document = json.loads(Path(path).read_text())
        document["card"]["name"], document["rows"]
    except OSError as error:
        raise Incomparable(f"{path}: cannot be opened ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Incomparable(f"{path}: not a bench result ({error})") from None
    return document


def compare(old: dict, new: dict) -> list[str]:
    """What got worse, a line each; empty if nothing did.

    Raises:
        Incomparable: different cards or versions of the format.
    """
    for what, a, b in (("card", old["card"]["name"], new["card"]["name"]),
                       ("schema", old.get("schema"), new.get("schema"))):  # fmt: skip
        if a != b:
            raise Incomparable(f"{what} {a!r} against {b!r}: their figures cannot be compared")
    after = {record["id"]: record for record in new["rows"]}
    worse = []
    for record in old["rows"]:
        before = entry(record)
        if before is None:
            continue
        found = after.get(record["id"])
        now = entry(found) if found else None
        if now is None:
            reason = why_missing(found) if found else "no such row"
            worse.append(f"{record['id']}: missing ({reason})")
            continue
        spread = max(e["mad"] / e["median"] for e in (before, now))
        allowed = max(TOLERANCE, DEVIATIONS * spread)
        if now["roofline"] < before["roofline"] * (1 - allowed):
            fell = 1 - now["roofline"] / before["roofline"]
            worse.append(
                f"{record['id']}: roofline {before['roofline']:.1%} -> {now['roofline']:.1%}, "
                f"{fell:.1%} less, {allowed:.1%} allowed"
            )
    return worse


def main(paths: list[str]) -> int:
    """0: nothing got worse. 1: something did. 2: the files cannot be compared."""
    if len(paths) != 2:
        print("usage: python -m nemokernels.bench.compare OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        old, new = map(load, paths)
        worse = compare(old, new)
    except Incomparable as error:
        print(f"nemokernels bench: {error}", file=sys.stderr)
        return 2
    for sentence in worse:
        print(sentence)
    print(f"{len(worse)} worse of {sum(entry(r) is not None for r in old['rows'])} rows")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
