"""Which cells are trained on, and what simple statistics already know about them: the baselines."""

import anndata
import numpy as np

SEED = 20240617
TEST_SHARE, DEV_SHARE = 0.10, 0.03


def load(folder):
    """The atlas, ids as int64, ranges, and the number of tokens in the vocabulary."""
    atlas = anndata.read_h5ad(folder / "hsmm.h5ad")
    vocabulary = (folder / "genes.txt").read_text().split("\n")[:-1]
    return atlas, np.load(folder / "ids.npy").astype(np.int64), np.load(folder / "ranges.npy"), len(vocabulary)


def split(hours):
    """Indices of the cells to train on, to choose with (dev) and to report on (test): the same shares of every time point."""
    rng = np.random.default_rng(SEED)
    train, dev, test = [], [], []
    for hour in sorted(set(hours)):
        cells = rng.permutation(np.flatnonzero(hours == hour))
        tests, devs = round(TEST_SHARE * len(cells)), max(1, round(DEV_SHARE * len(cells)))
        test += list(cells[:tests])
        dev += list(cells[tests:tests + devs])
        train += list(cells[tests + devs:])
    return np.sort(train), np.sort(dev), np.sort(test)


def rank_bins(length):
    """Bin of every rank of a cell (rank 0: the most expressed gene): as wide as the square root of the rank."""
    return np.floor(np.sqrt(np.arange(length))).astype(np.int64)


def rank_table(sentences, tokens, smoothing, share):
    """p(token | bin of its rank) [tokens, bins]: counts over `sentences` (ids after [CELL]), smoothed over bins by a
    Gaussian of `smoothing` bins, then `share` parts of the unigram."""
    bins = 128  # sqrt(16,384): no human cell expresses more genes.
    counts = np.zeros((tokens, bins))
    for sentence in sentences:
        np.add.at(counts, (sentence, rank_bins(len(sentence))), 1.0)
    kernel = np.exp(-0.5 * ((np.arange(bins)[:, None] - np.arange(bins)) / smoothing) ** 2)
    smooth = counts @ kernel
    smooth /= np.maximum(smooth.sum(axis=0), 1e-300)
    return (1 - share) * smooth + share * unigram(sentences, tokens)[:, None]


def unigram(sentences, tokens):
    """p(token) [tokens], half a count added to each."""
    counts = np.bincount(np.concatenate(sentences), minlength=tokens) + 0.5
    counts[:1] = 1e-9  # [sOS] is never predicted.
    return counts / counts.sum()
