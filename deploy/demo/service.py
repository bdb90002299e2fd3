"""A running `eduba up`, and its commands."""

import json
import pathlib
import signal
import subprocess


class Service:
    """Starts the service with some workers in one process on a free port; stops it at the end of the `with` block."""

    def __init__(self, eduba, workers, log, *arguments):
        """`arguments`: more of `eduba up`."""
        self.eduba = str(eduba)
        self.workers = workers
        self.log = pathlib.Path(log)
        self.arguments = arguments

    def __enter__(self):
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [self.eduba, "up", "--workers", str(self.workers), "--listen", "127.0.0.1:0", "--memory-bytes", "4GiB",
                 *self.arguments],
                stdout=subprocess.PIPE, stderr=log, text=True)
        for line in self.process.stdout:
            if line.startswith("ready: "):
                self.address = line.removeprefix("ready: ").strip()
                return self
        self.process.wait()
        raise SystemExit(f"demo: the service did not start:\n{self.log.read_text()[-2000:]}")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def run(self, *words, show=True):
        """Runs `eduba WORDS --json` and returns its report. Progress goes to stderr, as the program prints it."""
        words = [str(word) for word in words]
        if show:
            print("  $ eduba " + " ".join(pathlib.Path(word).name if "/" in word and not word.startswith("ob") else word
                                          for word in words), flush=True)
        done = subprocess.run([self.eduba, *words, "--json", "--server", self.address], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"demo: 'eduba {words[0]} {words[1]}' failed (above)")
        return json.loads(done.stdout)

    def load(self, name, file, rows=None, window=None, show=True):
        words = ["atlas", "load", name, file, "--key", "obsm/X_pca", "--label", "obs/bulk_labels"]
        words += ["--rows", rows] if rows is not None else []
        words += ["--window", window] if window is not None else []
        return self.run(*words, show=show)

    def annotate(self, name, file, out, rows=None, policy="global", show=True):
        words = ["atlas", "annotate", name, file, "--out", out]
        words += ["--rows", rows] if rows is not None else []
        words += ["--policy", policy] if policy != "global" else []
        return self.run(*words, show=show)

    def delete(self, name):
        self.run("session", "delete", name, show=False)
