"""The cells of the demo: the real atlas, and a synthetic one of any size made from it."""

import h5py
import numpy

PLANTED = "planted"
# Every synthetic cell is a real one moved by this much in each of its coordinates: about half the distance between neighbours.
NOISE = 0.5
BLOCK = 100_000


def read_atlas(path):
    """(PCA coordinates [cells, 50], labels [cells], names of labels) of the PBMC file, as anndata 0.5 wrote it."""
    with h5py.File(path) as file:
        vectors = file["obsm"]["X_pca"].astype(numpy.float32)
        labels = file["obs"]["bulk_labels"].astype(int)
        names = [name.decode() for name in file["uns/bulk_labels_categories"][:]]
    return vectors, labels, names


def write_h5ad(path, count, dims, labels, names, cell_name, blocks):
    """Writes an .h5ad file as anndata from 0.8 on does: obs with one categorical column, obsm/X_pca from `blocks`."""
    partial = path.with_suffix(".part")
    with h5py.File(partial, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        obs.attrs["column-order"] = numpy.array(["bulk_labels"], dtype=h5py.string_dtype())
        index = obs.create_dataset("_index", data=[f"{cell_name}-{i}" for i in range(count)], dtype=h5py.string_dtype())
        index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        column = obs.create_group("bulk_labels")
        column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        column.create_dataset("codes", data=labels.astype("i1"))
        column.create_dataset("categories", data=names, dtype=h5py.string_dtype())
        vectors = file.create_group("obsm").create_dataset("X_pca", (count, dims), dtype="f4")
        vectors.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        at = 0
        for block in blocks:
            vectors[at:at + len(block)] = block
            at += len(block)
    partial.rename(path)


class Synthetic:
    """`count` cells resampled with noise from `vectors`, and three of a type that occurs nowhere else."""

    def __init__(self, vectors, labels, names, count):
        self.vectors, self.count, self.names = vectors, count, [*names, PLANTED]
        self.random = numpy.random.default_rng(2024)
        self.source = self.random.integers(len(vectors), size=count)
        self.labels = labels[self.source]
        # The type lives where no cell does: as far from the middle as the farthest real cell, in a direction of its own.
        middle = vectors.mean(0)
        direction = self.random.normal(size=vectors.shape[1])
        radius = numpy.linalg.norm(vectors - middle, axis=1).max()
        self.home = (middle + direction / numpy.linalg.norm(direction) * radius).astype("f4")
        # All three lie in the first two thirds, where a window over the last cells does not reach.
        self.planted = numpy.array([count // 10, count // 3, count * 3 // 5])
        self.labels[self.planted] = len(names)

    def _moved(self, vectors):
        return vectors + self.random.normal(scale=NOISE, size=vectors.shape).astype("f4")

    def blocks(self, progress):
        for begin in range(0, self.count, BLOCK):
            end = min(begin + BLOCK, self.count)
            block = self.vectors[self.source[begin:end]]
            block[self.planted[(self.planted >= begin) & (self.planted < end)] - begin] = self.home
            yield self._moved(block)
            progress(end, self.count)

    def more_planted(self, count):
        """New cells of the planted type: what the queries are."""
        return self._moved(numpy.repeat(self.home[None], count, axis=0))
