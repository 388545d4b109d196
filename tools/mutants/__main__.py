"""Tests every mutant that has no result yet, and writes docs/mutants.md."""

import argparse
import concurrent.futures
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from sparse_attn_jax.implementations.cuda import host_sim
from tools.mutants import report, rules
from tools.mutants.build import CSRC, Objects, mutated_sources
from tools.mutants.rules import Mutant

FOLDER = host_sim.ROOT / "build" / "mutants"
RESULTS = Path(__file__).parent / "results.txt"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at a time; default: 1")
    parser.add_argument("--only", default="", help="a regular expression; only mutants are tested whose id it is found in")
    parser.add_argument("--all", action="store_true", help="also mutants of which the report says nothing; writes no report")
    parser.add_argument("--again", action="store_true", help="test survivors again: after a change of the tests")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--timeout", type=float, default=40, help="seconds of a processor that one check may take; default: 40")
    parser.add_argument("--list", action="store_true", help="print the mutants, and do no more")
    parser.add_argument("--check", action="store_true", help="only say whether the report is about the present sources")
    return parser.parse_args()


def main() -> int:
    options = parse()
    by_path = report.all_mutants(rules.KINDS if options.all else report.REPORTED)
    mutants = [mutant for of_path in by_path.values() for mutant in of_path]
    if options.list:
        for mutant in mutants:
            print("\n  ".join(report.survivor_lines(mutant, "")[:2]))
        return 0
    if options.check:
        problems = report.problems(report.REPORT.read_text(), by_path, report.read_reasons())
        print("\n".join(problems) or "docs/mutants.md is about the present sources, and every survivor has a reason")
        return len(problems) > 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = Results(fresh=options.fresh)
    wanted = {None, report.SURVIVED} if options.again else {None}
    todo = {mutant.id for mutant in mutants if re.search(options.only, mutant.id) and results.verdict(mutant) in wanted}
    print(f"{len(mutants)} mutants, {len(todo)} to test", flush=True)
    if todo:
        Session(results, options.timeout).run(by_path, todo, options.jobs)
    results.tidy()
    if options.all:
        return 0
    verdicts = {mutant.id: results.verdict(mutant) for mutant in mutants}
    report.REPORT.write_text(report.report_text(by_path, verdicts, report.read_reasons()))
    problems = report.problems(report.REPORT.read_text(), by_path, report.read_reasons())
    print("\n".join([f"wrote {report.REPORT}", *problems]))
    return len(problems) > 0


class Results:
    """What is known from this run and earlier ones, in a file of lines (mutant, digest of its source, verdict)."""

    def __init__(self, *, fresh: bool):
        self.lock = threading.Lock()
        self.sources = {str(path.relative_to(CSRC)): rules.code_digest(path.read_text()) for path in mutated_sources()}
        if fresh:
            RESULTS.unlink(missing_ok=True)
        lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
        self.known = {(name, source): verdict for name, source, verdict in (line.split(" ", 2) for line in lines)}

    def key(self, mutant: Mutant) -> tuple[str, str]:
        return mutant.id, self.sources[mutant.path]

    def verdict(self, mutant: Mutant) -> str | None:
        """`None` if the mutant was not tested since its source changed."""
        return self.known.get(self.key(mutant))

    def add(self, mutant: Mutant, result: dict) -> None:
        with self.lock, RESULTS.open("a") as file:
            self.known[self.key(mutant)] = result["verdict"]
            print(*self.key(mutant), result["verdict"], file=file)

    def tidy(self) -> None:
        """Leaves one line for each of the present mutants, of any kind, that was tested."""
        mutants = (mutant for of_path in report.all_mutants(rules.KINDS).values() for mutant in of_path)
        keys = [self.key(mutant) for mutant in mutants if self.verdict(mutant) is not None]
        RESULTS.write_text("".join(f"{name} {source} {self.known[name, source]}\n" for name, source in keys))


def cpu_seconds(process: int) -> float:
    """The time that a process has run."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A process of `worker.py`, which is started anew when it ends or hangs."""

    def __init__(self, unchanged: Path, timeout: float):
        self.unchanged, self.timeout = unchanged, timeout
        self.process = None

    def start(self) -> None:
        cache = dict(
            JAX_COMPILATION_CACHE_DIR=str(FOLDER / "compiled"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
        )
        command = [sys.executable, "-m", "tools.mutants.worker", str(self.unchanged)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, cwd=host_sim.ROOT, env=os.environ | cache, **pipes)

    def judge(self, made: Path, mutant: int, kernels: list[str]) -> dict:
        """The verdict on a mutant of a compiled library, on the checks of these kernels."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps(dict(library=str(made), mutant=mutant, kernels=kernels)).encode() + b"\n")
        self.process.stdin.flush()
        check = None
        while True:
            line = self.read_line()
            if not line:
                verdict = "timeout" if self.process.poll() is None else "crash"
                self.stop()
                return dict(verdict=verdict, check=check, message="")
            result = json.loads(line)
            if "verdict" in result:
                return result
            check = result["begins"]

    def read_line(self) -> bytes:
        """Empty if none came in time, or none will come."""
        begin, waited = cpu_seconds(self.process.pid), 0
        while not select.select([self.process.stdout], [], [], 1)[0]:
            waited += 1
            # A process may have to wait for others. One that does nothing at all hangs too.
            if cpu_seconds(self.process.pid) - begin > self.timeout or waited > 30 * self.timeout:
                return b""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Session:
    """Tests mutants in parallel, says how far it is."""

    def __init__(self, results: Results, timeout: float):
        self.results, self.timeout = results, timeout
        self.objects = Objects(FOLDER / "unchanged")
        self.idle = queue.SimpleQueue()
        self.counts = dict.fromkeys(report.VERDICTS, 0)
        self.lock = threading.Lock()

    def run(self, by_path: dict[str, list[Mutant]], todo: set[str], jobs: int) -> None:
        """Tests the mutants whose ids are in `todo`."""
        unchanged = self.objects.compile_all()
        workers = [Worker(unchanged, self.timeout) for _ in range(jobs)]
        for worker in workers:
            self.idle.put(worker)
        try:
            self.start = time.monotonic()
            own = {path: [mutant for mutant in mutants if mutant.id in todo] for path, mutants in by_path.items()}
            paths = sorted(filter(own.get, own), key=lambda path: len(own[path]), reverse=True)
            # While one source is compiled and checked, mutants of another are tested.
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool, concurrent.futures.ThreadPoolExecutor(2) as sources:
                test = lambda path: self.test_source(path, by_path[path], own[path], pool, len(todo))
                for _ in sources.map(test, paths):
                    pass
        finally:
            for worker in workers:
                worker.stop()

    def test_source(self, path: str, mutants: list[Mutant], todo: list[Mutant], pool, total: int) -> None:
        made, broken = self.objects.compile_mutants(mutants)
        for mutant in todo:
            if mutant in broken:
                self.add(mutant, dict(verdict="does not compile", check=None, message="", seconds=0), total)
        kernels = [str(source.relative_to(CSRC)) for source in self.objects.reached_by(path)]
        judge = lambda number: self.judge(made, number, kernels)
        self.expect_unchanged_passes(judge(0), path)
        todo = [mutant for mutant in todo if mutant not in broken]
        for mutant, result in zip(todo, pool.map(judge, [mutants.index(mutant) + 1 for mutant in todo])):
            self.add(mutant, result, total)
        # Had a mutant harmed the process that tests them all, this would show it.
        self.expect_unchanged_passes(judge(0), path)

    def judge(self, made: Path, number: int, kernels: list[str]) -> dict:
        worker = self.idle.get()
        start = time.monotonic()
        try:
            result = worker.judge(made, number, kernels)
            if result["verdict"] == "crash":
                # What another mutant has left in the process may have done it. This time it is a new one.
                result = worker.judge(made, number, kernels)
            return result | dict(seconds=round(time.monotonic() - start, 1))
        finally:
            self.idle.put(worker)

    def expect_unchanged_passes(self, result: dict, path: str) -> None:
        if result["verdict"] != report.SURVIVED:
            raise RuntimeError(f"the unchanged {path} fails: {result}")
        print(f"the unchanged {path} passes, in {result['seconds']} s", flush=True)

    def add(self, mutant: Mutant, result: dict, total: int) -> None:
        self.results.add(mutant, result)
        with self.lock:
            self.counts[result["verdict"]] += 1
            done = sum(self.counts.values())
        left = (time.monotonic() - self.start) / done * (total - done)
        line = f"{done}/{total}, {self.counts[report.SURVIVED]} survived, {left / 60:.0f} min left; "
        print(f"{line}{mutant.id}: {result['verdict']} {result['check'] or ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
