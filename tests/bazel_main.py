"""Runs one pytest file as a Bazel test: its exit status is the test's."""

import os
import sys

import pytest


def main() -> int:
    # An editable install answers imports before the path does; the test is of the files that Bazel laid out.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
    results = os.environ.get("XML_OUTPUT_FILE")
    report = [f"--junitxml={results}"] if results else []
    return pytest.main(["-q", "-p", "no:cacheprovider", *report, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
