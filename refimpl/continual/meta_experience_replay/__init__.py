"""Meta-experience replay (MER): old rows in every batch, and weights that go back part of the way every k updates.

Source: Abbes et al., "Revisiting Replay and Gradient Alignment for Continual Pre-Training of Large Language Models",
2025, arXiv 2508.01908 (CoLLAs 2025). Experience replay with a buffer on disk; Reptile (Nichol et al., 2018, arXiv
1803.02999) in place of the costlier inner loop of the first MER (Riemer et al., 2019).

1. Initialise theta, an empty buffer M, theta_slow = theta.
2. In every step: (1 - alpha) B new rows and alpha B rows of M; the new ones are added to M; one step of the
   optimiser on all (`ReplayLoader`, `ReplayBuffer`, and `refimpl.core.train.loop.train`).
3. After every k-th step: theta = theta_slow + epsilon (theta - theta_slow), then theta_slow = theta (`Reptile`).
4. Next domain: nothing is reset.

For k steps of SGD with rate beta on batches B_1 ... B_k, the expected merge is to first order in beta a gradient step
on ``2 sum_i L(B_i) - sum_(j < i) beta grad L(B_i) . grad L(B_j)``: it raises the products between gradients, those of
old and new rows among them. With AdamW this is a hope, which `gradient_alignment` measures; `chain_scores` tells what
was lost.

Ours, where it differs. A draw is uniform over the whole buffer (the authors' code takes all rows of a step from one
file of 2000 neighbours) and comes before the step's own rows are stored. A full buffer is a reservoir. No row of the
stream is skipped. Merges are made on the fp32 weights, and start after k steps, not after the first.
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
