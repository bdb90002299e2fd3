"""Lets clang check, with -Wthread-safety, that the product's code touches what a lock guards only while the lock is held.

The release build has been configured before. A file whose text after the preprocessor was clean in an earlier run is not checked
again: the user's cache folder has one stamp for each.
    /usr/bin/python3 tests/thread_safety.py [FILE...]
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = ROOT / "build/release/compile_commands.json"
STAMPS = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "eduba-thread-safety"


def arguments(entry):
    """What clang needs of a GCC command: where headers are, and what is defined."""
    words = shlex.split(entry["command"])
    kept = []
    for i, word in enumerate(words):
        if word.startswith(("-I", "-D", "-std")):
            kept.append(word)
        if word == "-isystem":
            kept += [word, words[i + 1]]
    return kept


def check(entry):
    """None, or what clang finds."""
    command = ["clang++", "-w", *arguments(entry), entry["file"]]
    text = subprocess.run([*command, "-E", "-P"], cwd=entry["directory"], capture_output=True)
    stamp = STAMPS / hashlib.sha256(text.stdout).hexdigest()
    if text.returncode == 0 and stamp.exists():
        return None
    flags = ["-fsyntax-only", "-Wthread-safety", "-Werror=thread-safety"]
    result = subprocess.run([*command, *flags], cwd=entry["directory"], capture_output=True, text=True)
    if result.returncode != 0:
        return result.stderr
    stamp.touch()
    return None


def is_product(path):
    inside = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ("build",)
    return inside[0] not in ("build", "tests", "benchmarks") and not path.stem.endswith("_test") and path.suffix == ".cc"


def main():
    STAMPS.mkdir(parents=True, exist_ok=True)
    wanted = {pathlib.Path(name).resolve() for name in sys.argv[1:]}
    entries = {e["file"]: e for e in json.loads(COMMANDS.read_text())
               if (pathlib.Path(e["file"]) in wanted if wanted else is_product(pathlib.Path(e["file"])))}
    if not entries:
        sys.exit("thread safety: no file to check; configure the preset 'release' first")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        findings = [found for found in pool.map(check, entries.values()) if found]
    print("".join(findings), end="", file=sys.stderr)
    if findings:
        sys.exit(1)
    print(f"thread safety: {len(entries)} files clean")


if __name__ == "__main__":
    main()
