"""A visit to a GPU: tests/test_gpu.py in order of value, each in a process of its own.

    PYTHONPATH=.gpu-kit/site:$PWD python3 tests/gpu_visit.py --deadline 500 --out DIR [--tiny]
    python tests/gpu_visit.py --readme DIR/gpu.json

The first, from the repository's root, leaves DIR/gpu.json: machine, versions, commit, figures, how
each test ended. One that fails or hangs costs itself alone, none begins after the deadline, and the
file is whole after each. The second writes the figures into bbkit/README.md.

.gpu-kit/site is a folder of unpacked wheels, where that machine has no network and lacks some; of
pytest these are enough, for `pip download --no-deps --only-binary=:all: -d wheels` and then
`python -m zipfile -e WHEEL .gpu-kit/site` each: pytest pluggy iniconfig packaging pygments.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Seconds at most, of test_NAME. A later one gets what an earlier one left.
TESTS = {
    "nf4": 60, "onepass": 110, "retention": 90, "float16": 120, "shape05": 150, "pocket": 240,
    "shape7": 200, "benchmark": 120, "export": 120,
}  # fmt: skip
BEGIN, END = "<!-- gpu -->\n", "<!-- end -->"


def command(name: str) -> list[str]:
    """What runs one test."""
    words = ["tests/test_gpu.py", "-k", f"test_{name}", "-p", "no:cacheprovider", "--tb=short"]
    return [sys.executable, "-m", "pytest", *words]


def attempt(name: str, seconds: float, log: Path, env: dict[str, str]) -> dict:
    """Run a test for so long at most; how it ended, its seconds, its last lines if not well."""
    began, code = time.monotonic(), None
    with log.open("w") as file:
        run = subprocess.Popen(
            command(name), stdout=file, stderr=file, cwd=ROOT, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            code = run.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # with the runs that it has begun
            run.wait()
    took, lines = round(time.monotonic() - began, 1), log.read_text(errors="replace").splitlines()
    ended = "failed" if code else "out of time" if code is None else "passed"
    if ended == "passed" and " passed" not in (lines or [""])[-1]:
        ended = "skipped"
    found = {"ended": ended, "seconds": took}
    return found if ended == "passed" else found | {"tail": [x[:300] for x in lines[-25:]]}


def visit(out: Path, deadline: float, names: list[str], tiny: bool, commit: str | None) -> dict:
    """Run the tests by name until the deadline, in seconds from now; what gpu.json holds."""
    from bbkit.machine import gpu
    from bbkit.runs import record

    ends = time.monotonic() + deadline
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    found = record.machine()
    about = {"machine": found["hardware"] | {"gpu": gpu.seen()}, "versions": found["versions"]}
    about |= {"commit": found["git"]["commit"] or commit, "rows": [], "tests": {}}
    roomy = Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 20e9  # 7B takes 15
    with tempfile.TemporaryDirectory(dir="/dev/shm" if roomy else None) as work:
        env = os.environ | {"BBKIT_GPU_ROWS": str(rows.absolute()), "BBKIT_GPU_WORK": work}
        env |= {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        env |= {"BBKIT_GPU_TINY": "1"} if tiny else {}
        env |= {"BBKIT_GPU_COMMIT": commit} if commit else {}
        for name in names:
            left, ended = ends - time.monotonic(), {"ended": "not begun", "seconds": 0.0}
            if left > 0:
                ended = attempt(name, min(left, TESTS[name]), out / f"{name}.txt", env)
            about["tests"][name] = ended
            text = rows.read_text() if rows.exists() else ""
            about["rows"] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
            (out / "gpu.json").write_text(json.dumps(about, indent=1))
            print(f"{name}: {ended['ended']}, {ended['seconds']} s", flush=True)
    return about


def table(found: dict) -> str:
    """The figures as Markdown, with card and versions, and what gave none."""
    from bbkit.runs import report

    def shown(values: dict) -> str:
        names = {k: k.replace("_gb", " GB").replace("_", " ") for k in values}
        return "; ".join(f"{names[k]} {v:.3g}" for k, v in values.items())

    if not found["rows"]:
        return "not measured: no figure"
    last = found["rows"][-1]
    names = ("torch", "transformers", "bitsandbytes")
    versions = ", ".join(f"{name} {last[name]}" for name in names)
    head = f"{last['card']}, {versions}, commit {(last['commit'] or 'unknown')[:7]}:"
    lines = [[row["name"], shown(row["values"])] for row in found["rows"]]
    missing = [f"{n} ({t['ended']})" for n, t in found["tests"].items() if t["ended"] != "passed"]
    end = [f"Tests that did not pass: {', '.join(missing)}."] if missing else []
    return "\n\n".join([head, report.markdown(["", "measured"], lines), *end])


def filled(text: str, found: dict) -> str:
    """bbkit/README.md with its block of GPU figures made from a visit."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"no block {BEGIN.strip()} to {END} in bbkit/README.md; add them")
    return f"{head}{begin}{table(found)}\n{end}{tail}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 where a test failed, 3 without pytest."""
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--out", type=Path, default=Path("gpu-out"), metavar="DIR")
    p.add_argument("--deadline", type=float, default=500.0, help="seconds from the start")
    p.add_argument("--only", default=",".join(TESTS), help="names of tests, in the order to run")
    p.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    p.add_argument("--commit", help="of a copy that has no history")
    p.add_argument("--readme", type=Path, metavar="FILE", help="write a visit's figures, run none")
    args = p.parse_args(argv)
    if args.readme:
        page, found = ROOT / "bbkit" / "README.md", json.loads(args.readme.read_text())
        page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        return 0
    if unknown := [name for name in args.only.split(",") if name not in TESTS]:
        p.error(f"--only {unknown[0]}: use names of {', '.join(TESTS)}")
    if importlib.util.find_spec("pytest") is None:
        wheels = "pytest, pluggy, iniconfig, packaging and pygments"
        print(f"error: no pytest here: unpack the wheels of {wheels} into .gpu-kit/site, as the "
              "head of tests/gpu_visit.py says", file=sys.stderr)  # fmt: skip
        return 3
    found = visit(args.out, args.deadline, args.only.split(","), args.tiny, args.commit)
    return int(any(test["ended"] == "failed" for test in found["tests"].values()))


if __name__ == "__main__":
    sys.exit(main())
