"""`make check-control`: runs the whole proof of the control plane and prints one summary.

    python -m tests.proof.check [--quick]

Misuses that must not compile, exploration of small worlds, random runs at realistic sizes, sown
bugs, sanitizers, fuzzing. Fails when any part fails; says what it skipped and why.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.compile_fail import test_misuses as misuses
from tests.proof.build import CACHE, CONTROL, ROOT, Build, BuildError, build_all, find_compiler
from tests.proof.mutations import BUGS, Bug, MovedOn, sow

CORPUS = Path(__file__).parent / "corpus"
THREADS = min(2, os.cpu_count() or 1)
# What does not end within so much of a core's time never will; drivers wait for nothing, so that
# a busy machine does not count.
HANG_CPU_S = 120
# The compiler reports the entry of each function but those of these files: of the transitions.
WATCHED = (
    "-finstrument-functions",
    "-finstrument-functions-exclude-file-list="
    + ",".join(
        [
            "/usr/",
            "tests/proof/",
            *sorted(
                f"/{file.name}"
                for file in CONTROL.iterdir()
                if file.stem not in {"transitions", "travel", "verifying", "admission", "events"}
            ),
        ]
    ),
)


class Failed(Exception):
    """A part of the proof does not hold; says which and why."""


def run(*command: str | Path, timeout_s: float = 3600) -> str:
    """Runs a program that must succeed; its output."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def explored(output: str) -> str:
    """What the explorer's last line tells, for a summary."""
    told = re.fullmatch(
        r"explored (\d+) states, (\d+) transitions, (?:(\d+ of \d+) \(event, state\) pairs, )?"
        r"\d+ events in (\d+) configurations",
        last_line(output),
    )
    assert told is not None, output
    states, transitions, pairs, worlds = told.groups()
    reached = f", {pairs} (event, state) pairs" if pairs else ""
    return f"{int(states):,} states of {worlds} worlds, {int(transitions):,} transitions{reached}"


def check_misuses(quick: bool) -> str:
    if quick:
        return "left to the test suite, which has them all (tests/compile_fail)"
    if misuses.COMPILER is None:
        return "skipped: their diagnostics are g++'s, and g++ is not installed"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        prelude = misuses.make_prelude(Path(folder))

        def complaints(program: Path) -> tuple[str | None, str | None]:
            return (
                misuses.complaint_about_misuse(program, prelude),
                misuses.complaint_about_twin(program, prelude),
            )

        found = list(pool.map(complaints, misuses.MISUSES))
    if wrong := [complaint for pair in found for complaint in pair if complaint]:
        raise Failed("\n".join(wrong))
    return f"{len(found)} rejected for their reasons, {len(found)} twins accepted"


def plain_build(*flags: str) -> Build:
    compiler = find_compiler(os.environ.get("CXX", "g++"), "g++", "clang++")
    return Build(flags=(*flags, "-g1"), compiler=compiler)


def watched_build() -> Build:
    """One that counts the pairs it reaches, if the compiler can watch the transitions alone."""
    build = plain_build("-O2")
    return build if "clang" in Path(build.compiler).name else plain_build("-O2", *WATCHED)


def check_exploration(quick: bool) -> str:
    build = watched_build()
    (explore,) = build_all(build, "explore", threads=THREADS)
    output = run(explore, "quick" if quick else "full", str(THREADS))
    if not quick:
        print(output.rstrip())
    unwatched = "; pairs were not counted: that takes g++"
    held = "every order of events tried, every invariant held"
    return f"{explored(output)}; {held}{'' if ' pairs, ' in output else unwatched}"


def check_random_runs(quick: bool) -> str:
    (random_runs,) = build_all(watched_build(), "random_runs", threads=THREADS)
    seeds, events = (4, 25_000) if quick else (20, 50_000)
    with ThreadPoolExecutor(THREADS) as pool:
        runs = [
            pool.submit(run, random_runs, str(events), str(seed)) for seed in range(1, seeds + 1)
        ]
        lines = [last_line(found.result()) for found in runs]
    if not quick:
        print("\n".join(lines))
    retractions = sum(int(re.findall(r"(\d+) retractions", line)[0]) for line in lines)
    evictions = sum(int(re.findall(r"(\d+) evictions", line)[0]) for line in lines)
    return (
        f"{seeds * events:,} events in {seeds} seeded runs, {retractions} retractions, "
        f"{evictions:,} evictions"
    )


def who_catches(bug: Bug, folder: Path, build: Build) -> str | None:
    """What caught the bug, None if nothing did."""
    sown = Build(flags=build.flags, compiler=build.compiler, control=sow(bug, CONTROL, folder))
    # The quickest first; a driver is built only once those before it saw nothing.
    for driver, *arguments in (
        ("faults", "20000"),
        ("fuzz_replay", *sorted(CORPUS.iterdir()), "--random", "10000", "1"),
        ("random_runs", "4000", "2", "1"),
        ("explore", "quick", "1"),
    ):
        try:
            program = sown.program(driver)
        except BuildError as error:
            found = re.search(r"error: (.*)", str(error))
            return f"compiler: {found[1] if found else error}"
        command = [program, *arguments]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as done:
            resource.prlimit(done.pid, resource.RLIMIT_CPU, (HANG_CPU_S, HANG_CPU_S + 5))
            complaint = done.communicate()[1].decode(errors="replace")
        if done.returncode != 0:
            return catcher(complaint, done.returncode)
    return None


def catcher(complaint: str, code: int) -> str:
    """Names who complained, from what was printed."""
    if code == -signal.SIGXCPU:
        return f"hang: no end within {HANG_CPU_S} s of a core"
    if asserted := re.search(r"(\S+):\d+:.*Assertion [`'](.*)' failed", complaint):
        if "/c++/" in asserted[1]:
            return f"library: {asserted[2]}"
        words = re.search(r'&& "(.*)"', asserted[2])
        return f"assertion: {words[1] if words else asserted[2]}"
    wrong = re.search(r"(?:WRONG: |what\(\): +)(.*)", complaint)
    if wrong is None:
        return f"crash: signal {-code}"
    found = re.search(r"(audit|device|client|explorer): .*", wrong[1])
    return found[0] if found else f"fuzz: {wrong[1]}"


def check_bugs(quick: bool) -> str:
    # Those in headers have every unit compiled anew.
    bugs = [bug for bug in BUGS if bug.file.endswith(".cpp")][::6] if quick else list(BUGS)
    build = watched_build() if quick else plain_build("-O1")
    build_all(build, "faults", threads=THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        folders = [CACHE / "sown" / str(BUGS.index(bug)) for bug in bugs]
        found = []
        for bug, caught in zip(
            bugs, pool.map(who_catches, bugs, folders, [build] * len(bugs)), strict=True
        ):
            found.append(caught)
            print(f"  {bug.what:<82} {caught or 'NOT CAUGHT'}"[:170], flush=True)
    survivors = [bug.what for bug, caught in zip(bugs, found, strict=True) if caught is None]
    if survivors:
        raise Failed(f"{len(survivors)} sown bugs were not caught: {'; '.join(survivors)}")
    others = f" of {len(BUGS)} in all" if quick else ""
    by = Counter(caught.split(":")[0] for caught in found if caught is not None)
    counts = ", ".join(f"{name} {count}" for name, count in by.most_common())
    return f"{len(bugs)}/{len(bugs)} caught{others} (by: {counts})"


def check_sanitizers(quick: bool) -> str:
    build = plain_build("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    explore, random_runs, fuzz = build_all(
        build, "explore", "random_runs", "fuzz_replay", threads=THREADS
    )
    address = explored(run(explore, "brief" if quick else "quick", str(THREADS)))
    events, inputs = ("1000", "500") if quick else ("4000", "2000")
    for seed in ("1", "2"):
        run(random_runs, events, seed, "16")
    run(fuzz, *sorted(CORPUS.iterdir()), "--random", inputs, "1")

    # Several schedulers on several threads share nothing: what one thread does shows no race.
    (explore,) = build_all(plain_build("-O1", "-fsanitize=thread"), "explore", threads=THREADS)
    thread = explored(run(explore, "host tier" if quick else "brief", "2"))
    return (
        f"ASan + UBSan clean ({address}; 2 random runs of {events} events; {inputs} random "
        f"inputs); TSan clean ({thread})"
    )


def check_fuzzing(quick: bool) -> str:
    if quick:
        return f"{replay(10_000)}; libFuzzer looks for more without QUICK=1"
    if shutil.which("clang++") is None:
        return f"{replay(50_000)}; libFuzzer comes with clang++, which is not installed"
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    build = Build(flags=(*flags, "-g1", "-fsanitize=fuzzer"), compiler=find_compiler("clang++"))
    try:
        (fuzz,) = build_all(build, "fuzz", threads=THREADS)
    except BuildError as error:
        if "libclang_rt" not in str(error):
            raise
        return f"{replay(50_000)}; clang++ is here without its runtime (Debian: libclang-rt-14-dev)"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [fuzz, folder, CORPUS, "-seed=1", "-max_total_time=120",
             "-max_len=600", "-print_final_stats=1", f"-artifact_prefix={CACHE}/"],
            capture_output=True, text=True, check=False, cwd=folder,
        )  # fmt: skip
    if done.returncode != 0:
        raise Failed(done.stderr[-4000:])
    units = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    return f"{int(units[0]):,} inputs of libFuzzer's, no crash"


def replay(inputs: int) -> str:
    """The fuzz target without libFuzzer, over its corpus and seeded random bytes."""
    (fuzz,) = build_all(watched_build(), "fuzz_replay", threads=THREADS)
    output = run(fuzz, *sorted(CORPUS.iterdir()), "--random", str(inputs), "1")
    return f"{last_line(output)}, no crash"


PARTS: dict[str, Callable[[bool], str]] = {
    "misuses": check_misuses,
    "exploration": check_exploration,
    "random runs": check_random_runs,
    "sown bugs": check_bugs,
    "sanitizers": check_sanitizers,
    "fuzzing": check_fuzzing,
}


def main() -> int:
    """Run the parts, print the summary; 0 if all hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter runs, fewer sown bugs")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable")
    arguments = parser.parse_args()
    summary: dict[str, str] = {}
    failed = False
    for name in arguments.only or PARTS:
        begin_s = time.monotonic()
        try:
            found = PARTS[name](arguments.quick)
        except (Failed, BuildError, MovedOn, subprocess.TimeoutExpired) as error:
            failed = True
            found = "FAILED"
            print(f"{name}: {error}", file=sys.stderr)
        summary[name] = f"{found} ({time.monotonic() - begin_s:.0f} s)"
        print(f"{name}: {summary[name]}", flush=True)
    print("\nThe control plane's proof")
    for name, found in summary.items():
        print(f"  {name:<14}{found}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
