"""CSKV: keep a few numbers per token, from which keys and values are rebuilt; keep the newest tokens exact.

Source: Wang et al., 2024, arXiv 2409.10593, sections 2.2 and 2.3, and the authors' code.

Keys and values of a layer are X W, [n, h] times [h, h_kv]. Replace W by A B with a narrow middle: the cache stores the
features C = X A of each token (r numbers instead of h_kv) and rebuilds X W as C B when a query comes. The window of
newest tokens is kept exactly, and so are the first few tokens (our addition: see StreamingLLM). A prompt is attended to
exactly and compressed when it ends.

`factors`, the mathematics:

1. `moments`: one forward pass; of every layer the mean |x| and the second moment of its input.
2. `factorise`: A and B from the weights alone (SVD), with inputs scaled by how large they are (ASVD), at random, or in
   closed form (our addition): the A B with the least error on the outputs that any training of step 3 could reach.
3. `reconstruct`: train A and B layer by layer on the exact keys and values, no language-model loss.
4. `straight_through`: with 4 bits the features pass through the cache's quantiser during step 3.

`cache`, the attention:

5. `CSKVLayer`: the cache, in a prompt and while decoding. Features are stored before RoPE, because a rotated key has no
   low rank; a rebuilt key is rotated at its token's position. Values are never rebuilt for a single query: (p C_V) B_V
   is the same sum.

All heads of a layer share one A. With grouped queries there is one projection for the layer's key/value heads.

Differences from the authors' code: groups of codes have a float least value (theirs clamps a zero point, which breaks a
group that does not contain 0); the straight-through estimator lets every gradient pass; the scale of ASVD is a mean,
not a sum; codes of values share a scale along the features of a token, not along a head's share of them, since features
belong to no head.
"""

from refimpl.kvcache.cskv.cache import CSKV, CSKVLayer
from refimpl.kvcache.cskv.factors import (
    INITS,
    Factors,
    Fit,
    Moments,
    asvd_scale,
    closed_form,
    decode,
    factorise,
    fit_loss,
    key_codes,
    key_features,
    moments,
    random,
    reconstruct,
    reconstruction_loss,
    straight_through,
    svd,
    value_codes,
    value_features,
    value_group,
)

__all__ = [
    "CSKV",
    "INITS",
    "CSKVLayer",
    "Factors",
    "Fit",
    "Moments",
    "asvd_scale",
    "closed_form",
    "decode",
    "factorise",
    "fit_loss",
    "key_codes",
    "key_features",
    "moments",
    "random",
    "reconstruct",
    "reconstruction_loss",
    "straight_through",
    "svd",
    "value_codes",
    "value_features",
    "value_group",
]
