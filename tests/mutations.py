"""Planted faults that the default test run must catch: proof that the tests have power.

    python tests/mutations.py                         plant every fault, one after the other
    python tests/mutations.py causal_mask top_p       only these
    python tests/mutations.py --jobs=4                several at a time, each in its own copy of the tree
    python tests/mutations.py --list                  the table
    python tests/mutations.py --check                 check the table alone: seconds, runs no test

Each fault is a small change to one source file and the tests that must fail with it. The tree is copied, the tests that
are named run once without a fault (they must pass), then each fault is planted in a copy of its own and its tests run
there. A fault whose tests pass has survived: write the cheap test that is missing. Run by hand, outside CI.

When a line of the source moves or changes, `--check` names the fault whose text is no longer there: adapt it.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planted_compute import COMPUTE, Mutation
from planted_rest import REST

ROOT = Path(__file__).parent.parent
TIMEOUT = 900
"""Seconds after which a fault's tests are stopped; a program that hangs counts as caught."""


MUTATIONS = [*COMPUTE, *REST]


def problems(mutations: Iterable[Mutation]) -> list[str]:
    """What is wrong with the table: texts that are not there exactly once, tests that are not there or are slow."""
    found = []
    for mutation in mutations:
        path = ROOT / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{mutation.name}: {mutation.file} has its old text {count} times, not once: {mutation.old!r}")
        found += [f"{mutation.name}: {problem}" for test in mutation.tests.split() if (problem := problem_of(test))]
    names = [mutation.name for mutation in mutations]
    return found + [f"{name}: is there twice" for name in sorted({name for name in names if names.count(name) > 1})]


def problem_of(test: str) -> str | None:
    """What keeps a node id out of the default run, or None."""
    file, *names = re.sub(r"\[.*", "", test).split("::")
    if not (ROOT / file).is_file():
        return f"{file} is not there"
    body, inside = ast.parse((ROOT / file).read_text(encoding="utf-8")).body, False
    for name in names:
        node = next((n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name), None)
        if node is None:
            return None if inside else f"{test} is not there"  # a class may have inherited it
        if any("mark.slow" in ast.unparse(decorator) for decorator in node.decorator_list):
            return f"{test} is slow, so the default run leaves it out"
        body, inside = node.body, isinstance(node, ast.ClassDef)
    return None


def copy_tree(to: Path) -> None:
    """Copy what git knows of the tree and has not ignored; compiled programs are shared with the tree's own tests."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    programs = ROOT / ".pytest_cache" / "d" / "xla"
    programs.mkdir(parents=True, exist_ok=True)
    (to / ".pytest_cache" / "d").mkdir(parents=True)
    (to / ".pytest_cache" / "d" / "xla").symlink_to(programs)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of a copy of the tree as the default run does; returns pytest's status and the end of what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "--no-header", "--tb=line", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return 1, f"nothing after {TIMEOUT} seconds"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])


def plant(mutation: Mutation) -> tuple[str, str]:
    """Run a fault's tests with the fault: `caught`, `SURVIVED` or `ERROR`, and how it went."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        tree = Path(directory)
        copy_tree(tree)
        path = tree / mutation.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        status, text = run_tests(tree, mutation.tests.split())
    word = {0: "SURVIVED", 1: "caught"}.get(status, "ERROR")
    return word, f"{time.monotonic() - begun:.0f} s" + ("" if word == "caught" else f"\n{text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults to plant; all of them if none is given")
    parser.add_argument("--list", action="store_true", help="print the table")
    parser.add_argument("--check", action="store_true", help="check the table alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults to plant at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))} (--list names them)")
    chosen = [mutation for mutation in MUTATIONS if mutation.name in arguments.names or not arguments.names]
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name}\n    {mutation.file}: {mutation.old!r} -> {mutation.new!r}\n    {mutation.tests}")
        return 0
    if wrong := problems(chosen):
        print("\n".join(wrong))
        return 2
    if arguments.check:
        print(f"{len(chosen)} faults, each text once in its file, no test slow")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copy_tree(Path(directory))
        status, text = run_tests(Path(directory), sorted({test for m in chosen for test in m.tests.split()}))
    if status:
        print(f"The tests fail without a fault:\n{text}")
        return 2
    words = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, (word, text) in zip(chosen, pool.map(plant, chosen), strict=True):
            words.append(word)
            print(f"{word:9} {mutation.name:40} {text}", flush=True)
    print(f"{words.count('caught')} of {len(words)} faults are caught")
    return int(words.count("caught") < len(words))


if __name__ == "__main__":
    sys.exit(main())
