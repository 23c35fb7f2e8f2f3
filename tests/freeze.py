"""Freezes what the suite answers, and says whether it still answers so.

    python tests/freeze.py check               all parts but the slow ones: 'equal', 'differs as
                                               listed', or a difference, and then exit code 1
    python tests/freeze.py check --all         the slow ones too: every law in virtual time, a run
                                               of the reference plan; some three minutes
    python tests/freeze.py check --only NAME   one part, or all whose name begins so
    python tests/freeze.py write               writes what is missing; what is frozen stays, and
                                               another answer is put beside it as NAME.after

A difference that is meant has its answer in `NAME.after` and its reason in `DIFFERENCES.md`, under
a heading with the name of the file. Everything stands under tests/golden/house/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script: the root instead of this folder, whose `workloads` would hide those of the suite.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.freezing import PARTS, golden
from tests.freezing.doors import surroundings
from tests.freezing.golden import Part


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a part differs otherwise than listed. 2: no such part."""
    parser = argparse.ArgumentParser(
        prog="freeze.py", description="What the suite answers, frozen and compared."
    )
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument(
        "--only", metavar="NAME", help="one part, or all whose name begins so: " + ", ".join(PARTS)
    )
    parser.add_argument("--all", action="store_true", help="the slow parts too")
    args = parser.parse_args(arguments)
    parts = asked(args.only, slow=args.all)
    if not parts:
        parser.error(f"--only {args.only!r}: no such part; there are {', '.join(PARTS)}")
    failed = False
    for part in parts:
        try:
            with surroundings():
                answer = part.make()
        except Exception as error:  # noqa: BLE001  no answer is another answer
            told = f"gives no answer: {type(error).__name__}: {error}"
            failed |= _shown(golden.Finding(part.name, told, fails=True))
            continue
        if args.action == "write":
            print(f"{part.name}: {golden.write(part, answer)}", flush=True)
            continue
        failed |= _shown(golden.check(part, answer))
    if args.action == "check" and not args.only:
        for finding in golden.leftovers(PARTS.values()):
            failed |= _shown(finding)
    return int(failed)


def asked(only: str | None, *, slow: bool) -> list[Part]:
    """The parts that are meant, an exact name before those that begin so."""
    if only in PARTS:
        return [PARTS[only]]
    if only is not None:
        return [part for part in PARTS.values() if part.name.startswith(only)]
    return [part for part in PARTS.values() if slow or not part.slow]


def _shown(finding: golden.Finding) -> bool:
    print(f"{finding.part}: {finding.told}\n{finding.diff}".rstrip(), flush=True)
    return finding.fails


if __name__ == "__main__":
    sys.exit(main())
