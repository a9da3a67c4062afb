"""`python -m tests.faults [--quick]`: try every fault, print the table, and end with 1 where anything did not hold."""

import argparse
import sys

import torch

from . import FAULTS, attempt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--quick", action="store_true", help="each fault a few times: what `make test` does")
    parser.add_argument("--only", metavar="WORD", default="", help="the faults whose name holds this word")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    print("| fault | tried | held | seconds |\n|---|---:|---:|---:|")
    for fault in FAULTS:
        if arguments.only in fault.name:
            result = attempt(fault, fault.quick if arguments.quick else fault.full)
            held = result.skipped or result.held
            print(f"| {fault.name} | {result.tried} | {held} | {result.seconds:.1f} |", flush=True)
            for problem in result.problems:
                print(f"  {problem}", file=sys.stderr)
            failed += bool(result.problems)
    return 1 if failed else 0


sys.exit(main())
