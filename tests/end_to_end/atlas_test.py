"""`eduba atlas`: calls from the real program beside the definition in float64, the same bytes for any number of workers, and what users get
wrong."""

import csv
import pathlib
import tempfile
import unittest

import h5py
import numpy as np

import program

DIMS = 12
CELLS = 700
QUESTIONS = 40
TYPES = ["B cell", "T cell, naïve", 'the "odd" one']
WINDOW = 300


def write_h5ad(path, vectors, codes=None, prefix="cell"):
    """As anndata from 0.8 on writes it. A code of -1 is a cell without a label."""
    with h5py.File(path, "w") as file:
        obs = file.create_group("obs")
        obs.attrs["_index"] = "barcode"
        obs.create_dataset("barcode", data=[f"{prefix}-{i}" for i in range(len(vectors))], dtype=h5py.string_dtype())
        if codes is not None:
            obs.create_dataset("kind/codes", data=codes.astype("i1"))
            obs.create_dataset("kind/categories", data=TYPES, dtype=h5py.string_dtype())
        file.create_dataset("obsm/X_pca", data=vectors, chunks=(16, DIMS), compression="lzf")


def read_calls(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Atlas(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.dir = pathlib.Path(cls.folder.name)
        random = np.random.default_rng(11)
        middles = random.normal(scale=3, size=(4, DIMS)) + 40  # Off the origin: centring must matter.
        cls.codes = random.integers(-1, 3, CELLS)
        cls.vectors = (middles[cls.codes] + random.normal(size=(CELLS, DIMS))).astype("f4")
        cls.questions = (middles[random.integers(-1, 3, QUESTIONS)] + random.normal(size=(QUESTIONS, DIMS))).astype("f4")
        cls.questions[-5:-1] += 4   # Like nothing in the reference,
        cls.questions[-1] += 30  # nor so that anything in it would weigh more than the smallest float.
        write_h5ad(cls.path("reference.h5ad"), cls.vectors, cls.codes)
        write_h5ad(cls.path("questions.h5ad"), cls.questions, prefix="question")
        cls.server = program.Server("--workers", 3)
        cls.addClassCleanup(cls.server.__exit__, None)
        cls.loaded = cls.load("reference", "--window", WINDOW)

    @classmethod
    def path(cls, name):
        return str(cls.dir / name)

    @classmethod
    def load(cls, name, *more, file="reference.h5ad", server=None):
        return (server or cls.server).report("atlas", "load", name, cls.path(file), "--key", "obsm/X_pca", "--label", "obs/kind",
                                             *more)

    @classmethod
    def annotate(cls, name, out, *more, file="questions.h5ad", server=None):
        report = (server or cls.server).report("atlas", "annotate", name, cls.path(file), "--out", cls.path(out), *more)
        return read_calls(cls.path(out)), report

    def expected(self, loaded, vectors, codes, questions, last=CELLS):
        """(label weights [questions, labels], novelty) by the definition, in float64, from the `last` reference cells as stored."""
        centre = vectors.astype(np.float64).mean(0).astype(np.float32)
        stored = program.to_bf16(vectors - centre)[-last:].astype(np.float64)
        codes = codes[-last:]
        squared = (((questions - centre.astype(np.float64))[:, None] - stored[None]) ** 2).sum(-1)
        exponents = -squared / (2 * loaded["sigma"] ** 2)
        sink = -loaded["sink_distance"] ** 2 / (2 * loaded["sigma"] ** 2)
        top = np.maximum(exponents.max(1, keepdims=True), sink)
        weights = np.exp(exponents - top)
        labels = np.stack([weights[:, codes == code].sum(1) for code in (0, 1, 2, -1)], 1)
        novelty = np.exp(sink - top[:, 0])
        return labels, novelty / (novelty + labels.sum(1))

    def check(self, calls, labels, novelty):
        names = [*TYPES, "(unlabelled)"]
        for i, call in enumerate(calls):
            if labels[i].sum() == 0:
                self.assertEqual((call["label"], call["probability"], call["novelty"]), ("", "0", "1"))
                continue
            shares = labels[i] / labels[i].sum()
            best, second = np.argsort(-shares)[:2]
            self.assertEqual(call["label"], names[best])
            self.assertAlmostEqual(float(call["probability"]), shares[best], delta=2e-4)
            self.assertAlmostEqual(float(call["second_probability"]), shares[second], delta=2e-4)
            self.assertAlmostEqual(float(call["novelty"]), novelty[i], delta=2e-4)

    def test_calls_are_the_kernel_regression_of_the_definition(self):
        calls, report = self.annotate("reference", "calls.csv")
        self.assertEqual([call["cell"] for call in calls], [f"question-{i}" for i in range(QUESTIONS)])
        labels, novelty = self.expected(self.loaded, self.vectors, self.codes, self.questions)
        self.check(calls, labels, novelty)
        self.assertEqual(report["cells"], QUESTIONS)
        self.assertEqual(report["reference_cells"], CELLS)
        self.assertEqual(report["novel"], int((novelty > 0.5).sum()))
        self.assertTrue((novelty[-5:] > 0.99).all() and (novelty[:-5] < 0.9).all(), novelty)
        self.assertEqual(labels[-1].sum(), 0)

    def test_any_number_of_workers_writes_the_same_bytes(self):
        self.annotate("reference", "three.csv")
        for workers in (1, 2, 5):
            with program.Server("--workers", workers) as server:
                loaded = self.load("reference", server=server)
                self.assertEqual(loaded["digest"], self.loaded["digest"])
                self.annotate("reference", "other.csv", server=server)
            self.assertEqual((self.dir / "other.csv").read_bytes(), (self.dir / "three.csv").read_bytes())

    def test_lists_choose_rows_in_their_order(self):
        random = np.random.default_rng(12)
        chosen = random.permutation(CELLS)[:500]
        np.save(self.path("chosen.npy"), chosen.astype("u2"))
        loaded = self.load("chosen", "--rows", self.path("chosen.npy"))
        self.assertEqual(loaded["cells"], 500)
        mask = np.zeros(QUESTIONS, bool)
        mask[3:30:4] = True
        np.save(self.path("mask.npy"), mask)
        calls, _ = self.annotate("chosen", "masked.csv", "--rows", self.path("mask.npy"))
        self.assertEqual([call["cell"] for call in calls], [f"question-{i}" for i in np.flatnonzero(mask)])
        labels, novelty = self.expected(loaded, self.vectors[chosen], self.codes[chosen], self.questions[mask])
        self.check(calls, labels, novelty)
        backwards = np.arange(QUESTIONS)[::-1]
        np.save(self.path("backwards.npy"), backwards)
        calls, _ = self.annotate("chosen", "backwards.csv", "--rows", self.path("backwards.npy"))
        forwards, _ = self.annotate("chosen", "forwards.csv")
        self.assertEqual(calls, forwards[::-1])

    def test_a_window_sees_the_last_cells_only(self):
        calls, _ = self.annotate("reference", "window.csv", "--policy", "window")
        labels, novelty = self.expected(self.loaded, self.vectors, self.codes, self.questions, last=WINDOW)
        self.check(calls, labels, novelty)
        _, of_all = self.expected(self.loaded, self.vectors, self.codes, self.questions)
        self.assertTrue((novelty[:-5] > of_all[:-5]).all())

    def expect_refused(self, *arguments, naming):
        """Exit code 1, nothing on stdout, one line on stderr with all of `naming`; sessions are as they were."""
        before = self.server.report("session", "list")
        result = program.eduba("atlas", *arguments, server=self.server.address)
        self.assertEqual(result.returncode, 1, result)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr, r"\Aeduba: atlas [^\n]+\n\Z")
        for text in naming:
            self.assertIn(text, result.stderr)
        self.assertEqual(self.server.report("session", "list"), before)

    def test_mistakes_of_load_are_named_and_leave_no_session(self):
        def refused(*naming, file="reference.h5ad", key="obsm/X_pca", label="obs/kind", more=()):
            self.expect_refused("load", "new", self.path(file), "--key", key, "--label", label, *more, naming=naming)

        refused("reference.h5ad: obs: found no column cell_type; there is kind", label="obs/cell_type")
        refused("reference.h5ad: found no X; there is obs, obsm", key="X")
        refused("obsm: found no X_umap; there is X_pca", key="obsm/X_umap")
        refused("missing.h5ad: cannot open", file="missing.h5ad")
        content = (self.dir / "reference.h5ad").read_bytes()
        (self.dir / "truncated.h5ad").write_bytes(content[:-1000])
        refused("truncated.h5ad: truncated or broken", file="truncated.h5ad")
        (self.dir / "text.h5ad").write_text("cell,label\n")
        refused("text.h5ad: not an HDF5 file", file="text.h5ad")
        broken = self.vectors.copy()
        broken[613, 4] = np.nan
        write_h5ad(self.path("nan.h5ad"), broken, self.codes)
        refused("nan.h5ad: obsm/X_pca: found nan for cell 613", file="nan.h5ad")
        np.save(self.path("beyond.npy"), np.array([0, CELLS]))
        refused(f"beyond.npy: found row {CELLS} at index 1", more=["--rows", self.path("beyond.npy")])
        np.save(self.path("none.npy"), np.zeros(0, "i8"))
        refused("none.npy: found no cells", more=["--rows", self.path("none.npy")])
        np.save(self.path("one.npy"), np.array([5]))
        refused("found 1 reference cells, wanted 2 or more", more=["--rows", self.path("one.npy")])
        self.expect_refused("load", "reference", self.path("reference.h5ad"), "--key", "obsm/X_pca", "--label", "obs/kind",
                            naming=["reference"])

    def test_mistakes_of_annotate_are_named_and_leave_no_file(self):
        def refused(*naming, session="reference", file="questions.h5ad", more=()):
            self.expect_refused("annotate", session, self.path(file), "--out", self.path("refused.csv"), *more, naming=naming)
            self.assertEqual(list(self.dir.glob("refused*")), [])

        refused("nothing", session="nothing")
        self.server.run("session", "create", "plain", "--query-heads", 1, "--kv-heads", 1, "--head-dim", 8)
        refused("session plain: found session notes without the mark of an atlas", session="plain")
        with h5py.File(self.path("narrow.h5ad"), "w") as file:
            file["obs/_index"] = np.array([b"a"])
            file["obsm/X_pca"] = np.zeros((1, 3), "f4")
        refused(f"narrow.h5ad: obsm/X_pca: found 3 columns, wanted {DIMS}", file="narrow.h5ad")
        broken = self.questions.copy()
        broken[QUESTIONS - 1, 0] = np.inf
        write_h5ad(self.path("inf.h5ad"), broken)
        refused("found inf for cell 39", file="inf.h5ad")
        without_window = self.load("no_window")
        self.assertEqual(without_window["cells"], CELLS)
        refused("window", session="no_window", more=["--policy", "window"])


if __name__ == "__main__":
    unittest.main()
