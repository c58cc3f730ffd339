"""No benchmark spends time on wrong code: the tests of what it measures come first."""

import subprocess
import sys
from functools import cache

from benchmarks.environment import ROOT

# files of tests, and the expression that picks from them (pytest's -k)
LAYER_TESTS = (
    ("tests/test_lambda_layer.py", "tests/test_modeling.py", "tests/test_packing.py"),
    "Definition or Tiles or Packing or PositionLambda or Padding or Precision or test_packing",
)
EXPORT_TESTS = (("tests/deployment",), "computes_what_the_model_does")
TEXT_TESTS = (("tests/text",), "not streaming")


@cache
def require_passing_tests(files: tuple[str, ...], expression: str) -> None:
    """Runs tests, once in a process.

    Args:
        files: relative to the repository root.
        expression: picks from their tests, as pytest's -k.

    Raises:
        SystemExit: a test fails, or there is none.
    """
    command = [sys.executable, "-m", "pytest", "--numprocesses=0", "--durations=0", "-k", expression, *files]
    print("Testing the code to be measured ...", file=sys.stderr)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"Nothing was measured, because its tests fail:\n{result.stdout[-3000:]}{result.stderr}")
    print(next(line for line in reversed(result.stdout.splitlines()) if " passed" in line), file=sys.stderr)
