"""Cells as sentences: the expressed genes of a cell, the most expressed first, one token a gene.

A stream is  [sOS] x SINKS, then for every cell  [CELL] gene gene gene ...  The sinks are put before the stream by
whoever runs the model (train.py, a session); ids.npy and ranges.npy do not contain them.
"""

import numpy as np

SINKS = 4  # As StreamingLLM: one would do for a model trained with it, four cost nothing.
SINK, CELL = 0, 1
SPECIAL = ["[sOS]", "[CELL]"]


def token_names(ensembl_ids, symbols):
    """A gene's symbol where it is the only gene with it, else symbol and Ensembl id: names are unique and have no spaces."""
    symbols = np.asarray(symbols, dtype=object)
    _, index, counts = np.unique(symbols.astype(str), return_inverse=True, return_counts=True)
    return [s if counts[i] == 1 else f"{s}|{e}" for s, e, i in zip(symbols, ensembl_ids, index)]


def expressed(atlas):
    """Columns of the genes that have a token: those seen in any cell. The others (20,659 of HSMM's 47,192) could never
    occur in a sentence, would never be trained, and would be 44 % of the model."""
    return np.flatnonzero(np.asarray((atlas.X > 0).sum(axis=0)).ravel() > 0)


def vocabulary(atlas):
    """Token names by id."""
    return SPECIAL + [atlas.var["feature_name"].iloc[g] for g in expressed(atlas)]


def sentences(atlas, vocabulary):
    """ids int32 [tokens] of all cells in order, and ranges int64 [cells, 2]: begin and end, [CELL] included. Ties keep
    the order of var. A gene without a token is an error."""
    token_of = {name: i for i, name in enumerate(vocabulary)}
    column_token = np.array([token_of.get(name, -1) for name in atlas.var["feature_name"]], dtype=np.int32)
    ids, ranges, at = [], [], 0
    x = atlas.X.tocsr()
    x.sort_indices()
    for cell in range(atlas.n_obs):
        row = slice(x.indptr[cell], x.indptr[cell + 1])
        columns, values = x.indices[row], x.data[row]
        columns, values = columns[values > 0], values[values > 0]
        sentence = column_token[columns[np.argsort(-values, kind="stable")]]
        if (sentence < 0).any():
            raise SystemExit(f"cell {atlas.obs_names[cell]} expresses a gene that genes.txt does not name")
        ids += [np.array([CELL], np.int32), sentence]
        ranges.append((at, at + 1 + len(sentence)))
        at = ranges[-1][1]
    return np.concatenate(ids), np.array(ranges, dtype=np.int64)
