"""Meta-experience replay (MER): old rows in every batch, and weights that move back part of the way every k updates.

Source: Abbes et al., "Revisiting Replay and Gradient Alignment for Continual Pre-Training of Large Language Models",
2025, arXiv 2508.01908 (CoLLAs 2025). Experience replay with a buffer on disk; Reptile (Nichol et al., 2018, arXiv
1803.02999) in place of the costlier inner loop of the first MER (Riemer et al., 2019).

1. Initialise theta, an empty buffer M and theta_slow = theta.
2. In every step, take (1 - alpha) B new rows and alpha B rows from M, add the new ones to M, and make one optimiser
   step on all of them (`ReplayLoader`, `ReplayBuffer`, and `refimpl.core.train.loop.train`).
3. After every k-th step: theta = theta_slow + epsilon (theta - theta_slow), then theta_slow = theta (`Reptile`).
4. Go on with the next domain; nothing is reset.

For k steps of SGD with rate beta on batches B_1 ... B_k, the expected merge is to first order in beta a gradient step
on ``2 sum_i L(B_i) - sum_(j < i) beta grad L(B_i) . grad L(B_j)``: it increases the inner products of gradients, also
between old and new rows. For AdamW no such result is known, so `gradient_alignment` measures it; `chain_scores`
measures forgetting and transfer.

Differences from the authors' code. A draw is uniform over the whole buffer (theirs takes all rows of a step from one file
of 2000 neighbours) and is made before the new rows of the step are stored. A full buffer becomes a reservoir. No row of
the stream is skipped. Merges use the fp32 weights, and the first comes after k steps, not after one.
"""

from refimpl.continual.meta_experience_replay.buffer import ReplayBuffer, Storage
from refimpl.continual.meta_experience_replay.measures import ChainScores, chain_scores, gradient_alignment
from refimpl.continual.meta_experience_replay.reptile import Merges, Reptile, merge
from refimpl.continual.meta_experience_replay.stream import ReplayLoader, Stage

__all__ = [
    "ChainScores",
    "Merges",
    "ReplayBuffer",
    "ReplayLoader",
    "Reptile",
    "Stage",
    "Storage",
    "chain_scores",
    "gradient_alignment",
    "merge",
]
