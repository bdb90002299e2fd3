"""Checks style and structure: who includes whom, where gRPC, HDF5 and CUDA may appear, that every source belongs to a target,
that every folder with code has a README, that lines fit and that clang-format changes nothing. Run from anywhere: /usr/bin/python3 tests/tidy_test.py"""

import os
import pathlib
import re
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS = 110

# Module -> modules whose headers it may include, besides its own and base. The missing name is the point:
#   the coordinator never sees kernels or attention; attention knows no RPC and no file format; kernels know neither.
MAY_INCLUDE = {
    "base": set(),
    "kernels": set(),
    "collective": set(),
    "attention": {"kernels", "collective"},
    "model": {"kernels", "collective", "attention"},
    "rpc": set(),
    "storage": {"attention"},
    "coordinator": {"rpc", "storage"},
    "worker": {"rpc", "storage", "model", "attention", "kernels", "collective"},
    "ingest": set(),
    "atlas": set(),
    "client": {"rpc"},
    # The program's main: the one place that sees servers and clients together.
    "cli": {"rpc", "client", "ingest", "atlas", "coordinator", "worker", "kernels", "collective", "attention", "model", "benchmarks"},
    "tests": {"kernels", "collective", "attention", "model", "rpc", "coordinator", "worker", "ingest", "client", "cli"},
    "benchmarks": {"kernels", "collective", "attention", "model", "rpc", "client"},
}

# Outside library -> the only places that may include its headers.
CONFINED = {
    r"<?\"?(grpcpp|grpc)/": ("rpc/", "coordinator/", "worker/", "client/", "cli/", "tests/", "benchmarks/measure/"),
    r"<?\"?eduba/v1/.*\.grpc\.pb\.h": ("rpc/", "coordinator/", "worker/", "client/", "cli/", "tests/", "benchmarks/measure/"),
    r"<?\"?eduba/v1/": ("rpc/", "coordinator/", "worker/", "client/", "cli/", "tests/", "benchmarks/measure/"),
    r"<?\"?(hdf5|H5)": ("ingest/", "tests/fuzz/"),
    r"<?\"?sqlite3\.h": ("coordinator/",),
    r"<?\"?gloo/": ("collective/gloo/",),
    r"<?\"?hwy/": ("kernels/",),
    r"<?\"?oneapi/": ("benchmarks/",),
    r"<?\"?(cuda|nccl)": ("kernels/cuda/", "collective/nccl/"),
    r"<?\"?CLI/": ("cli/",),
    r"<?\"?(sentencepiece|pcre2|unicode/)": ("model/tokenizer/",),
}

INCLUDE = re.compile(r'^\s*#\s*include\s+(["<][^">]+[">])', re.MULTILINE)


def tracked(*patterns):
    """Files that git knows or would add, relative to the root."""
    out = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(f for f in out.split("\0") if f and (ROOT / f).exists())


def sources_of_targets(cmake):
    """The source files that a CMakeLists.txt names, relative to its folder, as whole words and not in comments."""
    code = re.sub(r"#.*", "", cmake).replace("${CMAKE_CURRENT_SOURCE_DIR}/", "").replace("${PROJECT_SOURCE_DIR}/", f"{ROOT}/")
    # foreach(name a b c) ... ${name}.cc
    for variable, values, body in re.findall(r"foreach\((\w+) ([^)]*)\)(.*?)endforeach", code, re.S):
        code += " ".join(body.replace("${%s}" % variable, value) for value in values.split())
    return set(re.findall(r"(?<![\w./$}])[\w./-]+\.(?:cc|cu)(?![\w.])", code))


def sources():
    return tracked("*.h", "*.cc", "*.cu", "*.cuh")


class Structure(unittest.TestCase):
    def test_modules_include_only_what_they_may(self):
        for path in sources():
            module = path.split("/")[0]
            for include in INCLUDE.findall((ROOT / path).read_text()):
                other = include.strip('"<>').split("/")[0]
                if other not in MAY_INCLUDE or other in (module, "base"):
                    continue
                self.assertIn(other, MAY_INCLUDE[module], f"{path} includes {include}: {module} may not know {other}")

    def test_outside_libraries_stay_in_their_places(self):
        for path in sources():
            for include in INCLUDE.findall((ROOT / path).read_text()):
                for pattern, places in CONFINED.items():
                    if re.match(pattern, include):
                        self.assertTrue(path.startswith(places), f"{path} includes {include}: only {places} may")

    def test_headers_are_guarded_by_their_path(self):
        for path in tracked("*.h"):
            guard = "EDUBA_" + re.sub(r"[/.]", "_", path).upper() + "_"
            text = (ROOT / path).read_text()
            if "-inl." in path and "HWY_TARGET_TOGGLE" in text:
                continue  # Highway's per-target headers are included once per target.
            self.assertIn(f"#ifndef {guard}\n#define {guard}\n", text, path)

    def test_every_source_is_built(self):
        named = set()
        for path in tracked("CMakeLists.txt", "*/CMakeLists.txt"):
            folder = (ROOT / path).parent
            for name in sources_of_targets((ROOT / path).read_text()):
                named.add(os.path.relpath(folder / name, ROOT))
        self.assertEqual([path for path in tracked("*.cc", "*.cu") if path not in named], [], "no target has these files")

    def test_every_folder_says_what_it_is(self):
        folders = {str(pathlib.PurePosixPath(path).parent) for path in sources()} | {"proto", "deploy", "docs", "docs/adr"}
        missing = sorted(f for f in folders | {f.split("/")[0] for f in folders} if not (ROOT / f / "README.md").exists())
        self.assertEqual(missing, [], "these folders have no README.md")

    def test_nothing_names_a_machine(self):
        pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root)/")
        for path in tracked():
            if path == "tests/tidy_test.py" or path == "LICENSE":
                continue
            try:
                text = (ROOT / path).read_text()
            except UnicodeDecodeError:
                continue
            for number, line in enumerate(text.splitlines(), 1):
                self.assertIsNone(pattern.search(line), f"{path}:{number} names a path of one machine")


class Format(unittest.TestCase):
    def test_clang_format_changes_nothing(self):
        files = sources()
        result = subprocess.run(["clang-format", "--dry-run", "--Werror", *files], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr[-4000:] + "\nrun: clang-format -i on these files")

    def test_text_files_end_with_one_newline(self):
        for path in tracked("*.h", "*.cc", "*.cu", "*.py", "*.sh", "*.md", "*.cmake", "*.proto", "*CMakeLists.txt"):
            text = (ROOT / path).read_text()
            self.assertTrue(text.endswith("\n") and not text.endswith("\n\n"), path)

    def test_comments_fit_in_110_columns(self):
        """clang-format sees to the code, but leaves comments to their authors (ReflowComments: false)."""
        wide = [f"{path}:{number}" for path in sources() for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
                if len(line) > COLUMNS and re.search(r"(^|\s)//", line) and "http" not in line and "NOLINT" not in line]
        self.assertEqual(wide, [], f"longer than {COLUMNS} columns")

    def test_lines_of_prose_fit_in_110_columns(self):
        """Tables, code and links may be longer."""
        wide = []
        for path in tracked("*.md"):
            fenced = False
            for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
                fenced ^= line.lstrip().startswith("```")
                free = fenced or line.startswith("    ") or line.lstrip().startswith("|") or "](" in line or "http" in line
                if len(line) > COLUMNS and not free:
                    wide.append(f"{path}:{number}")
        self.assertEqual(wide, [], f"longer than {COLUMNS} columns")

    def test_shell_scripts_parse(self):
        for path in tracked("*.sh", ".ci/run"):
            subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(0 if unittest.main(exit=False, verbosity=1).result.wasSuccessful() else 1)
