"""Makes the atlas that eduba-nano is trained on, from Debian's package r-bioc-hsmmsinglecell.

    pip install rdata anndata
    python fetch_hsmm.py --out DIR [--deb r-bioc-hsmmsinglecell_1.18.0-1_all.deb]

Writes into DIR:
  hsmm.h5ad    271 cells x 47,192 genes, CSR float64 FPKM (11,249 values are too small for a float32); obs: hours (0, 24, 48, 72), media, state, pseudotime;
               var: index = Ensembl id with version, gene_short_name, biotype, feature_name (the token's name)
  genes.txt    the vocabulary: line i names token i (cell_sentences.py)
  ids.npy      int32 [2,017,741]: every cell's sentence, one after the other, in the order of obs: ONE context
  ranges.npy   int64 [271, 2]: the begin and end of every cell's sentence in ids.npy
R is not needed. Without --deb the package is fetched by `apt-get download`.
"""

import argparse
import pathlib
import subprocess
import tempfile

import anndata
import numpy as np
import pandas as pd
import rdata
import scipy.sparse

import cell_sentences

PACKAGE = "r-bioc-hsmmsinglecell"
DATA = "usr/lib/R/site-library/HSMMSingleCell/data"


def unpack(deb, folder):
    if deb is None:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
        deb = next(folder.glob(f"{PACKAGE}_*.deb"))
    subprocess.run(["dpkg", "-x", str(deb), str(folder / "unpacked")], check=True)
    return folder / "unpacked" / DATA


def read(data):
    def table(name):
        return rdata.read_rda(data / f"{name}.rda")[name]

    matrix, cells, genes = table("HSMM_expr_matrix"), table("HSMM_sample_sheet"), table("HSMM_gene_annotation")
    if list(matrix.dim_0.values) != list(genes.index) or list(matrix.dim_1.values) != list(cells.index):
        raise SystemExit(f"{data}: rows and columns of the matrix do not follow the gene and sample tables")
    obs = pd.DataFrame({
        "hours": pd.Categorical(cells["Hours"].astype(int), categories=[0, 24, 48, 72], ordered=True),
        "media": pd.Categorical(cells["Media"].astype(str)),
        "state": pd.Categorical(cells["State"].astype(str)),
        "pseudotime": cells["Pseudotime"].to_numpy(np.float64),
    }, index=pd.Index(cells.index.astype(str), name="cell"))
    var = pd.DataFrame({
        "gene_short_name": genes["gene_short_name"].astype(str).to_numpy(object),
        "biotype": pd.Categorical(genes["biotype"].astype(str)),
    }, index=pd.Index(genes.index.astype(str), name="ensembl_id"))
    var["feature_name"] = cell_sentences.token_names(var.index, var["gene_short_name"])
    x = scipy.sparse.csr_matrix(matrix.values.T)
    return anndata.AnnData(X=x, obs=obs, var=var)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--deb", type=pathlib.Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        atlas = read(unpack(args.deb, pathlib.Path(folder)))

    vocabulary = cell_sentences.vocabulary(atlas)
    ids, ranges = cell_sentences.sentences(atlas, vocabulary)
    atlas.write_h5ad(args.out / "hsmm.h5ad", compression="gzip")
    (args.out / "genes.txt").write_text("".join(name + "\n" for name in vocabulary))
    np.save(args.out / "ids.npy", ids)
    np.save(args.out / "ranges.npy", ranges)
    print(f"{atlas.n_obs} cells x {atlas.n_vars} genes, {atlas.X.nnz} non-zero; {len(vocabulary)} tokens in the vocabulary, "
          f"{len(ids)} in the context")


if __name__ == "__main__":
    main()
