"""What gpu_run.py has measured so far: `gpu_table OUT/PRECISION` prints the tables of compare_with_kronfluence.py."""

import json
import re
import sys
from math import nan
from pathlib import Path

from tests.benchmarks.compare_with_kronfluence import print_times, stage_table
from tests.benchmarks.peer import STAGES
from tests.benchmarks.systems import PAIRWISE, OurRun


def main():
    directory = Path(sys.argv[1])
    parts = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}
    print(f"\n{directory}: {', '.join(sorted(parts)) or 'nothing yet'}")
    for name, value in parts.get("agreement", {}).get("agreement", {}).items():
        print(f"{name:<22} {value:.8g}")
    if "ours" in parts:
        theirs = parts["peer"]["stages"] if "peer" in parts else dict.fromkeys([*STAGES, PAIRWISE], nan)
        result = stage_table([(parts["ours"]["gflops"], OurRun(scores=None, **parts["ours"]["run"]), theirs)])
        for name, row in result["stages"].items():
            modelled = modelled_seconds(parts.get("roofline", {}).get("output", []))
            if modelled:
                row["modelled"] = modelled.get("Total" if name.startswith("Whole") else name.split(",")[0], nan)
        print_times(result)
        print(f"planned {parts['ours']['run']['planned_bytes'] / 1e9:.2f} GB")
    for part in ("ours", "peer"):
        if part in parts:
            print(f"peak memory, {part}: {parts[part]['peak_bytes'] / 1e9:.2f} GB")
    if "compile" in parts:
        seconds = parts["compile"]["run"]["seconds"]
        print("ours with --compile:", ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items()))


def modelled_seconds(lines: list[str]) -> dict[str, float]:
    """{stage: seconds} of a table whose header names a column of seconds; empty where there is none."""
    rows = [[cell.strip() for cell in re.split(r"\||\s{2,}", line.strip("| "))] for line in lines]
    column, seconds = None, {}
    for row in rows:
        at = [number for number, cell in enumerate(row) if re.search(r"\bs\b|second", cell)]
        if column is None:
            column = at[0] if at and len(row) > 1 else None
        elif len(row) > column and re.fullmatch(r"[\d.]+(e[+-]?\d+)?( s)?", row[column]):
            seconds[row[0]] = float(row[column].removesuffix(" s"))
    return seconds


if __name__ == "__main__":
    main()
