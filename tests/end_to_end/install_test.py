"""What `cmake --install` puts elsewhere runs there, with the model that comes with it."""

import os
import pathlib
import subprocess
import tempfile
import unittest

import program

BUILD = pathlib.Path(os.environ.get("BUILD", program.ROOT / "build" / "release"))


class InstallTest(unittest.TestCase):
    def test_an_installed_program_reads_and_writes_genes(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            prefix = folder / "prefix"
            subprocess.run([os.environ.get("CMAKE", "cmake"), "--install", BUILD, "--prefix", prefix], check=True,
                           stdout=subprocess.DEVNULL, timeout=program.COMMAND_TIMEOUT_S)
            installed = sorted(str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file())
            nano = sorted(path.name for path in (program.ROOT / "model" / "nano" / "weights").iterdir())
            self.assertEqual(installed, ["bin/eduba"] + [f"share/eduba/models/nano/{name}" for name in nano])
            # Also by a link, as from /usr/local/bin.
            link = folder / "eduba"
            link.symlink_to(prefix / "bin" / "eduba")
            program.EDUBA = str(link)
            with program.Server("--processes", "--workers", 2, "--model", "nano") as server:
                self.assertEqual(server.report("model", "show")["folder"], str(prefix / "share" / "eduba" / "models" / "nano"))
                server.run("session", "create", "cells", "--model")
                server.run("session", "append", "cells", "--text", self.genes(prefix, folder))
                generated = server.report("generate", "cells", "--max-tokens", 5, "--ignore-eos")
                self.assertEqual(len(generated["tokens"]), 5)

    def genes(self, prefix, folder):
        names = (prefix / "share" / "eduba" / "models" / "nano" / "genes.txt").read_text().split("\n")
        text = folder / "genes.txt"
        text.write_text(" ".join(names[10:30]))
        return text


if __name__ == "__main__":
    unittest.main()
