"""The HSMM atlas (271 human myoblasts, 0 to 72 hours of differentiation; Trapnell et al., 2014) from Debian's r-bioc-hsmmsinglecell
as an .h5ad file: hsmm.py DATA OUT.h5ad, where DATA is the package's data folder. Needs no R."""

import os
import pathlib
import sys

import h5py
import numpy
import scipy.sparse

from rda import read_rda


def write(data, out):
    def read(name):
        return read_rda(data / f"{name}.rda")[name]

    matrix, cells, genes = read("HSMM_expr_matrix"), read("HSMM_sample_sheet"), read("HSMM_gene_annotation")
    rows, columns = (names.data for names in matrix.attributes["dimnames"].data)
    if rows != genes.attributes["row.names"].data or columns != cells.attributes["row.names"].data:
        raise SystemExit(f"demo: {data}: rows and columns of the matrix do not follow the gene and sample tables")
    x = scipy.sparse.csr_matrix(matrix.data.reshape(len(columns), len(rows)))  # R stores column by column: cell by cell.
    text = h5py.string_dtype()
    with h5py.File(out, "w") as file:
        for table, index in (("obs", columns), ("var", rows)):
            file.create_group(table).attrs["_index"] = "_index"
            file[table].create_dataset("_index", data=numpy.array(index, dtype=text))
        file["obs/hours"] = numpy.array([int(hours) for hours in cells.column("Hours")])
        file["var/feature_name"] = numpy.array(genes.column("gene_short_name"), dtype=text)
        group = file.create_group("X")
        group.attrs["encoding-type"] = "csr_matrix"
        group.attrs["shape"] = x.shape
        for part in ("data", "indices", "indptr"):
            group.create_dataset(part, data=getattr(x, part), compression="gzip", compression_opts=1)


def main():
    data, out = map(pathlib.Path, sys.argv[1:])
    unfinished = out.with_suffix(".new")
    write(data, unfinished)
    os.rename(unfinished, out)


if __name__ == "__main__":
    main()
