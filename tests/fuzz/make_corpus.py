"""Writes the seeds of the fuzz targets under corpus/: /usr/bin/python3 tests/fuzz/make_corpus.py"""

import io
import pathlib
import random

import numpy

CORPUS = pathlib.Path(__file__).resolve().parent / "corpus"


def npy_seeds():
    arrays = {
        "f32": numpy.arange(6, dtype="<f4").reshape(2, 3),
        "f16": numpy.arange(2, dtype="<f2").reshape(1, 2, 1),
        "i64": numpy.array([3, 1, 9]),
        "mask": numpy.arange(10) % 3 == 0,
        "scalar": numpy.float64(1.5),
        "empty": numpy.zeros((0, 4), dtype="<u2"),
        "fortran": numpy.asfortranarray(numpy.ones((2, 2), dtype="<i4")),
        "big_endian": numpy.ones(2, dtype=">f4"),
        "records": numpy.zeros(1, dtype=[("a", "<f4")]),
        "text": numpy.array(["ab"]),
    }
    for name, array in arrays.items():
        out = io.BytesIO()
        numpy.save(out, array)
        yield name, out.getvalue()
    out = io.BytesIO()
    numpy.lib.format.write_array(out, arrays["f32"], version=(2, 0))
    yield "version2", out.getvalue()


def h5ad_seeds():
    """The target reads decisions from the bytes, so seeds are bytes: random ones of the length that a whole file takes."""
    generator = random.Random(1)
    for i in range(8):
        yield f"random{i}", generator.randbytes(600)


def request_seeds():
    """As for h5ad_fuzz: each byte is a decision."""
    generator = random.Random(2)
    for i in range(8):
        yield f"random{i}", generator.randbytes(400)
    # Session s0 as it is; plan 8 positions, commit, ask a query of one row, finish.
    yield "life", bytes([0, 3, 0, 0, 8, 16, 1, 0, 8, 9, 5, 1, 1, 6, 0, 1, 1, 1, 7, 1, 8, 1] + [0] * 16 + [9, 0])


for target, seeds in {"npy_fuzz": npy_seeds(), "h5ad_fuzz": h5ad_seeds(), "request_fuzz": request_seeds()}.items():
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds:
        (folder / name).write_bytes(content)
