"""Whether the reference solutions of HumanEval and MBPP pass in the sandbox that programs of a
model run in, and how long that takes.

    python -m benchmarks.reference_programs humaneval DIR/humaneval.jsonl.gz
    python -m benchmarks.reference_programs mbpp DIR/mbpp.jsonl.gz --skip 10 --rows 200
"""

from __future__ import annotations

import argparse
import time

from alphatoken.cli import readable_errors
from alphatoken.config.evaluation import EvaluationConfig
from alphatoken.config.sections import Source
from alphatoken.data.sources import OpenSource, location
from alphatoken.evaluation.code import PROBLEMS
from alphatoken.evaluation.sandbox import Limits, check_sandbox, run_program

SOLUTIONS = {"humaneval": "canonical_solution", "mbpp": "code"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(PROBLEMS))
    parser.add_argument("data")
    parser.add_argument("--skip", type=int, default=0, help="rows left out at the start")
    parser.add_argument("--rows", type=int, help="rows to run; default: all")
    arguments = parser.parse_args()
    with readable_errors():
        config = EvaluationConfig()
        limits = Limits(config.code_seconds, config.code_megabytes)
        check_sandbox(limits)
        source = Source(path=arguments.data, skip=arguments.skip, first=arguments.rows)
        began, passed, total = time.perf_counter(), 0, 0
        for row in OpenSource(source).raw():
            where = location(source, row.number)
            problem = PROBLEMS[arguments.task](row.fields, where)
            solution = row.fields[SOLUTIONS[arguments.task]]
            total += 1
            if run_program(f"{problem.before}{solution}\n{problem.tests}", limits):
                passed += 1
            else:
                print(f"does not pass: {where}")
        print(f"{passed} of {total} pass, in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
