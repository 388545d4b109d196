"""The mutation suite of the CUDA kernels (`tools/mutants`): which mutants its rules find, and what its report has to say."""

import queue
import re
import subprocess
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.mutants import report, rules
from tools.mutants.__main__ import Session
from tools.mutants.build import CSRC, FLAGS, LISTS, VARIANTS, mutated_sources, with_few_variants

SOURCE = """
    // if (a < b) return;
    #define GUARD(x) if (x < 0) return
    #include "other.h"
    namespace toy {

    template <class T, int kSize>
    struct Config {
      static constexpr int kStages = kSize > 128 ? 1 : 2;
      static_assert(kSize % 16 == 0 && kSize <= 256, "a && b");
    };

    class Ring {
     public:
      __device__ Ring(const Tile& tile, int row) : is_row_(row < tile.num_rows) {
        if (!is_row_) return;
        offset_ = row % kRows;
      }
      __device__ bool is_row() const { return is_row_; }

     private:
      bool is_row_;
      int offset_ = 0;
    };

    template <class Config>
    __global__ void __launch_bounds__(Config::kThreads) kernel(const __grid_constant__ Params p) {
      const char* text = "while (a && b) x = 1;"; /* x % 2 */
      ptx::sync_threads();  // wait
      ptx::copy_wait<Config::kStages - 1>();
      const Ring ring(p.tile, 0);
      for (int i = 0; i < kRows; ++i) sums[i] *= factor_of(i);
      for (int part = 0; part < p.count(); ++part) {
        if (part == p.last || p.is_empty) continue;
        const float factor = exp2(part), *from = p.rows[part];
        const std::uint32_t low = bits & 0xffff;
        store(from, part >= 0 && p.is_full ? low : 0, [&](int i) { return i > 1; });
      }
    #if SPARSE_ATTN_HOST_SIM
      ptx::sim_only();
    #else
      ptx::gpu_only();
    #endif
      if constexpr (Config::kStages > 1) *p.total += ptx::ballot(true);
      const int least = a < b ? a : b;
    }

    }  // namespace toy
"""

# (function, what is replaced, by what), in the order of the text.
FOUND = [
    ("Ring::Ring", "row < tile.num_rows", "false"),
    ("Ring::Ring", "row < tile.num_rows", "true"),
    ("Ring::Ring", "<", "<="),
    ("Ring::Ring", "!is_row_", "false"),
    ("Ring::Ring", "!is_row_", "true"),
    ("Ring::Ring", "offset_ = row % kRows;", ";"),
    ("Ring::Ring", "% kRows", ""),
    ("kernel", "ptx::sync_threads();", ";"),
    ("kernel", "ptx::copy_wait<Config::kStages - 1>();", ";"),
    ("kernel", "Config::kStages - 1", "(Config :: kStages - 1) + 1"),
    ("kernel", "sums[i] *= factor_of(i);", ";"),
    ("kernel", "<", "<="),
    ("kernel", "part == p.last", "false"),
    ("kernel", "part == p.last || p.is_empty", "false"),
    ("kernel", "part == p.last || p.is_empty", "true"),
    ("kernel", "p.is_empty", "false"),
    ("kernel", "exp2(part)", "1"),
    ("kernel", "& 0xffff", ""),
    ("kernel", "store(from, part >= 0 && p.is_full ? low : 0, [&](int i) { return i > 1; });", ";"),
    ("kernel", "part >= 0", "true"),
    ("kernel", "part >= 0 && p.is_full ? low : 0", "(0)"),
    ("kernel", "part >= 0 && p.is_full ? low : 0", "(low)"),
    ("kernel", ">=", ">"),
    ("kernel", "p.is_full", "true"),
    ("kernel", "i > 1", "false"),
    ("kernel", "i > 1", "true"),
    ("kernel", ">", ">="),
    ("kernel", "ptx::sim_only();", ";"),
    ("kernel", "*p.total += ptx::ballot(true);", ";"),
    ("kernel", "a < b ? a : b", "(a)"),
    ("kernel", "a < b ? a : b", "(b)"),
]


def toy_mutants(source: str = SOURCE) -> list[rules.Mutant]:
    return rules.find_mutants("toy.cuh", textwrap.dedent(source))


def test_rules_find_what_can_be_broken_and_nothing_else():
    assert [(mutant.function, mutant.before, mutant.after) for mutant in toy_mutants()] == FOUND


def test_mutants_change_the_text_in_one_place():
    source = textwrap.dedent(SOURCE)
    for mutant in toy_mutants():
        changed = mutant.apply(source)
        assert changed != source and len(source) - len(changed) == len(mutant.before) - len(mutant.after)


def test_ids_differ_and_stay_when_lines_move():
    ids = [mutant.id for mutant in toy_mutants()]
    assert len(set(ids)) == len(ids)
    moved = SOURCE.replace("namespace toy {", "// More.\n\n    namespace toy {").replace("// wait", "// Waits.")
    assert [mutant.id for mutant in toy_mutants(moved)] == ids


RUNS = """
    int limit(int x, int n) { return x % 3 == 0 ? x + 1 : x < n ? x : n; }
    int run(int a, int b) {
      int sum = 0;
      const int factor = a % 5 % 3 + 2, last = a > b && b > 0 || a == 7 ? a : b;
      for (int i = 0; i < last; ++i) {
        if (i == b) continue; else sum += i;
        const auto odd = [&](int j) { return j % 2 == 1; };
        if (odd(i) && i > 2) sum *= factor;
        else sum -= 1;
        sum = limit(sum % 977, 900) & 0x1ff;
      }
      return sum;
    }
"""


def test_source_with_all_mutants_runs_each_as_if_it_were_alone(cpp_compiler, tmp_path):
    source = textwrap.dedent(RUNS)
    mutants = rules.find_mutants("runs.cc", source)
    switched = rules.with_switch(source, mutants, {mutant.id: i for i, mutant in enumerate(mutants, 1)})
    assert len(switched.splitlines()) == len(source.splitlines())
    alone = [source, *(mutant.apply(source) for mutant in mutants)]
    program = [f"namespace m{i} {{\n{text}\n}}" for i, text in enumerate(alone)]
    program += ['extern "C" { int sparse_attn_mutant; }', switched, "#include <cstdio>", "int main() {"]
    for i in range(len(alone)):
        calls = [f"{name}({a}, {b})" for a, b in ((0, 0), (3, 9), (9, 3), (7, 20), (40, 11)) for name in ("run", f"m{i}::run")]
        program.append(f"  sparse_attn_mutant = {i};")
        program += [f'  std::printf("%d %d\\n", {x}, {y});' for x, y in zip(calls[::2], calls[1::2])]
    (tmp_path / "main.cc").write_text("\n".join([*program, "}"]))
    subprocess.run([cpp_compiler, "-w", "-std=c++20", tmp_path / "main.cc", "-o", tmp_path / "main"], check=True)
    lines = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [tuple(line.split()) for line in lines]
    assert len(pairs) == 5 * len(alone) and all(one == other for one, other in pairs)
    unlike = {i // 5 for i, pair in enumerate(pairs) if pair != pairs[i % 5]}
    assert len(unlike) > 0.8 * len(mutants)


def test_the_same_change_in_two_equal_lines_has_two_ids():
    both = SOURCE.replace("ptx::sync_threads();  // wait", "ptx::sync_threads();\n  ptx::sync_threads();")
    assert len({mutant.id for mutant in toy_mutants(both)}) == len(FOUND) + 1


def test_digest_of_code_ignores_comments():
    source = textwrap.dedent(SOURCE)
    assert rules.code_digest(source) == rules.code_digest(source.replace("// wait", "// Waits."))
    assert rules.code_digest(source) != rules.code_digest(source.replace("kRows", "kColumns"))


def test_sources_of_the_kernels_have_mutants_in_every_function():
    sources = {str(path.relative_to(CSRC)): path.read_text() for path in mutated_sources()}
    assert "common/tile.cuh" in sources and "sm80/attention_forward.cuh" in sources
    for path, source in sources.items():
        found = {mutant.function for mutant in rules.find_mutants(path, source)}
        kernels = re.findall(r"__launch_bounds__\(.*\)\s+(\w+)\(", source)
        assert found and found.issuperset(kernels), path


def test_few_variants_are_left():
    text = with_few_variants((CSRC / LISTS).read_text())
    calls = re.findall(r"add_attention<kArch, Variant, T, (\d+), ([\d, ]+)>\(", text)
    assert {int(head_dim): tuple(map(int, sizes.split(", "))) for head_dim, sizes in calls} == VARIANTS
    for add in ("add_selection", "add_paged"):
        (head_dims,) = re.findall(rf"{add}<kArch, Variant, T, ([\d, ]+)>\(", text)
        assert tuple(map(int, head_dims.split(", "))) == tuple(VARIANTS)
    assert "-DSPARSE_ATTN_FLOAT16=0" in FLAGS and "#if SPARSE_ATTN_FLOAT16\n  add.template operator()<ptx::Float16>();" in text


# --- the report ---


def toy_report(survivors: int = 1, reasons=None) -> str:
    mutants = {"sm80/toy.cuh": toy_mutants()}
    verdicts = {m.id: report.SURVIVED if i < survivors else "simulator" for i, m in enumerate(mutants["sm80/toy.cuh"])}
    return report.report_text(mutants, verdicts, reasons or {})


def test_report_without_a_reason_for_a_survivor_is_a_problem():
    mutants = toy_mutants()
    by_path = {"sm80/toy.cuh": mutants}
    (problem,) = report.problems(toy_report(), by_path, {})
    assert mutants[0].id in problem and "has no reason" in problem
    reasons = {mutants[0].id: "Both are equal."}
    assert report.survivors_in(toy_report(reasons=reasons)) == reasons
    assert report.problems(toy_report(reasons=reasons), by_path, reasons) == []


def test_report_about_other_sources_is_a_problem():
    changed = toy_mutants(SOURCE.replace("part == p.last", "part != p.last"))
    (problem,) = report.problems(toy_report(survivors=0), {"sm80/toy.cuh": changed}, {})
    assert problem == "the report is not about the present sm80/toy.cuh; run `make mutants`"
    problems = report.problems(toy_report(survivors=0), {"sm90/toy.cuh": toy_mutants()}, {})
    assert [problem.split(";")[0].split()[-1] for problem in problems] == ["sm80/toy.cuh", "sm90/toy.cuh"]


def test_report_of_mutants_that_were_not_tested_is_a_problem():
    by_path = {"sm80/toy.cuh": toy_mutants()}
    verdicts = {mutant.id: None if i < 2 else "crash" for i, mutant in enumerate(by_path["sm80/toy.cuh"])}
    (problem,) = report.problems(report.report_text(by_path, verdicts, {}), by_path, {})
    assert problem == "2 mutants of sm80/toy.cuh are not tested; run `make mutants`"


def test_reason_for_a_mutant_that_is_no_survivor_is_a_problem():
    (problem,) = report.problems(toy_report(survivors=0), {"sm80/toy.cuh": toy_mutants()}, {"x": "Why."})
    assert problem == "reasons.toml has a reason for x, which is no survivor"


def test_survivors_in_the_committed_report_have_their_reasons():
    assert report.survivors_in(report.REPORT.read_text()) == report.read_reasons()


@pytest.mark.parametrize("bad", ["void f() { (1]; }", "void f() { } }"])
def test_source_whose_brackets_do_not_match(bad):
    with pytest.raises((ValueError, IndexError)):
        rules.find_mutants("bad.cuh", bad)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [(["crash", "survived"], "survived"), (["crash", "crash"], "crash"), (["simulator", "survived"], "simulator")],
)
def test_crash_counts_if_a_new_process_crashes_too(verdicts, expected):
    """A process that has run other mutants may have been harmed by them."""
    left = iter(verdicts)
    worker = SimpleNamespace(judge=lambda *order: dict(verdict=next(left)))
    session = SimpleNamespace(idle=queue.SimpleQueue())
    session.idle.put(worker)
    assert Session.judge(session, Path("library.so"), 1, [])["verdict"] == expected
    assert session.idle.get_nowait() is worker
