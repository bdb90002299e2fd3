"""Part two of the demo: a model session that has read a whole cell atlas, and what its vectors know of the time course."""

import time

import h5py
import numpy
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from report import heading, table
from service import Service

WORKERS = 1  # A streaming session is computed whole by every worker: more of them on one machine make nothing faster.
# As model/nano/evaluate.py, so that the numbers can be held beside model/nano/weights/report.json.
FIRST = 1000
NEIGHBOURS = 10
COMPONENTS = (2, 10)


def separation(vectors, hours, components):
    """Share of the cells whose NEIGHBOURS nearest others vote for their hour, in standardised principal components."""
    x = PCA(components, random_state=0).fit_transform(vectors)
    x = (x - x.mean(0)) / numpy.maximum(x.std(0), 1e-12)
    return (cross_val_predict(KNeighborsClassifier(NEIGHBOURS), x, hours, cv=LeaveOneOut()) == hours).mean()


def log_counts(atlas):
    with h5py.File(atlas) as file:
        x = file["X"]
        counts = scipy.sparse.csr_matrix((x["data"][:], x["indices"][:], x["indptr"][:]), shape=tuple(x.attrs["shape"]))
        return numpy.log1p(counts.toarray()), file["obs/hours"][:]


def time_course(eduba, atlas, work, whole):
    counts, hours = log_counts(atlas)
    heading(f"A model reads an atlas: {len(hours)} myoblasts at 0, 24, 48 and 72 hours, all in ONE context of eduba-nano")
    with Service(eduba, WORKERS, work / "service_model.log", "--model", "nano") as service:
        service.run("session", "create", "hsmm", "--model")
        ranges, vectors = work / "hsmm_ranges.npy", work / "hsmm_vectors.npy"
        began = time.monotonic()
        top = [] if whole else ["--top-genes", FIRST - 1]
        appended = service.run("session", "append", "hsmm", "--cells", atlas, "--ranges-out", ranges, *top)
        read_s = time.monotonic() - began
        cells = numpy.load(ranges)
        # [CELL] and the most expressed genes; what comes after them in a whole cell is mostly noise.
        cells[:, 1] = numpy.minimum(cells[:, 1], cells[:, 0] + FIRST)
        numpy.save(ranges, cells)
        began = time.monotonic()
        service.run("embed", "hsmm", "--ranges", ranges, "--pool", "mean", "--out", vectors)
        embed_s = time.monotonic() - began
        print(f"  {appended['count']:,} tokens after {appended['at']} sinks read in {read_s:.0f} s "
              f"({appended['count'] / read_s:,.0f} a second), {len(cells)} cells embedded in {embed_s:.0f} s, on {WORKERS} worker")
        service.run("session", "fork", "hsmm", "next-cell")
        said = service.run("generate", "next-cell", "--prompt", "[CELL]", "--max-tokens", 12, "--temperature", 0.7, "--seed", 1)
        print(f"  one more cell, as it would go on: {said['text']} ...")
    # The hours are not in what the model has read: they come in here only.
    rows = [["cells whose 10 nearest have their hour", *(f"{d} components" for d in COMPONENTS)]]
    for name, x in (("eduba-nano, mean hidden state", numpy.load(vectors)), ("log(1 + FPKM) of all genes", counts)):
        rows.append([name, *(f"{separation(x, hours, d):.3f}" for d in COMPONENTS)])
    chance = numpy.unique(hours, return_counts=True)[1].max() / len(hours)
    rows.append(["chance: the commonest hour", *[f"{chance:.3f}"] * len(COMPONENTS)])
    table(rows)
    print("  What eduba-nano is, and how it was trained, is in model/nano/weights/README.md; nobody should use its vectors in place\n"
          "  of PCA. The point is the way: a context of a whole atlas, asked cell by cell.")
