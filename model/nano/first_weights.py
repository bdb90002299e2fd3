"""Where training begins: not at random, but where counting already gets. On two cores the first epochs are better spent so.

log p(gene | rank) over the training cells is a matrix, genes by ranks, of low rank: its left factors become embeddings (and,
the two being tied, the head), its right factors the hidden states that the head needs at each rank. What rank it is, the
first layer reads off the genes in the window: all its heads begin as plain means over the keys they see, and o_proj as the
ridge regression from those means to the right factors. Every other branch begins at zero and adds nothing. Training takes
it from there; nothing is frozen.
"""

import numpy as np
import torch

import atlas_split
from cell_sentences import CELL, SINK, SINKS, SPECIAL
from nano_model import WINDOW

FACTORS = 24  # Of the rank table, and as many of the cells' expression.
CONSTANT = 127  # A dimension that is the same for all tokens: it adds the same to all logits, which changes nothing,
LEVEL = 40.0    # and after the first layer is so large that the norms leave the other dimensions' sizes as they are.
SCALE = 0.3     # Of the factors as embeddings: small beside what the first layer adds.


def means_seen(n, stream):
    """For every token of a stream the mean of n [tokens of the vocabulary, features] over the keys that it sees."""
    rows = np.concatenate([np.zeros((1, n.shape[1])), np.cumsum(n[stream], axis=0)])
    end = np.arange(1, len(stream) + 1)
    begin = np.maximum(end - WINDOW, 0)
    # The window of the first tokens reaches into the sinks, which are seen anyway.
    return (rows[end] - rows[begin] + SINKS * n[SINK]) / (end - begin + SINKS)[:, None]


def set_first_weights(model, expression, train_sentences):
    """expression [training cells, tokens without SPECIAL]; train_sentences: ids after [CELL], the next cell's [CELL] at the end."""
    rng = np.random.default_rng(atlas_split.SEED)
    tokens, width = model.embed_tokens.weight.shape
    bins = 1 + max(atlas_split.rank_bins(len(s))[-1] for s in train_sentences)
    table = np.log(atlas_split.rank_table(train_sentences, tokens, 4.0, 0.05))[:, :bins]
    table -= table.mean(axis=0)
    u, s, v = np.linalg.svd(table, full_matrices=False)
    level, wanted = u[:, :FACTORS] * s[:FACTORS] / np.sqrt(bins), v[:FACTORS].T * np.sqrt(bins)
    x = np.log1p(expression)
    u, s, _ = np.linalg.svd((x - x.mean(axis=0)).T, full_matrices=False)
    table = 0.02 * rng.standard_normal((tokens, width))
    table[:, :FACTORS] = SCALE * level
    table[len(SPECIAL):, FACTORS:2 * FACTORS] += SCALE * u[:, :FACTORS] * s[:FACTORS] / np.sqrt(len(x))
    table[SINK] = 0
    table[:, CONSTANT] = 1.0

    # The first layer's values: 64 dimensions of the normed embeddings, the factors and the constant among them.
    features = [*range(2 * FACTORS), CONSTANT, *range(2 * FACTORS, 63)]
    n = table / np.sqrt((table ** 2).mean(axis=1, keepdims=True) + model.config["rms_norm_eps"])
    gram, moment = 0.0, 0.0
    for sentence in train_sentences:
        m = means_seen(n[:, features], np.concatenate([[CELL], sentence[:-1]]))[::8]
        y = wanted[atlas_split.rank_bins(len(sentence))[::8]]
        y = np.concatenate([y, np.ones((len(y), 1))], axis=1)
        gram, moment = gram + m.T @ m, moment + m.T @ y
    gram += 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram))
    solution = np.linalg.solve(gram, moment)  # [features, FACTORS + 1]
    gain = float(model.norm.weight.detach().mean())
    solution[:, :FACTORS] *= LEVEL / (SCALE * gain * np.sqrt(width))
    solution[:, FACTORS] *= LEVEL

    o = np.zeros((width, width))  # Two query heads share each of two KV heads, and see the same.
    half = len(features) // 2
    for head in range(4):
        rows = solution[half * (head // 2):half * (head // 2) + half] / 2
        o[:FACTORS, half * head:half * (head + 1)] = rows[:, :FACTORS].T
        o[CONSTANT, half * head:half * (head + 1)] = rows[:, FACTORS]
    pick = np.zeros((len(features), width))
    pick[np.arange(len(features)), features] = 1
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.from_numpy(table))
        first = model.layers[0].self_attn
        first.q_proj.weight.zero_()
        first.v_proj.weight.copy_(torch.from_numpy(pick))
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        first.o_proj.weight.copy_(torch.from_numpy(o))
