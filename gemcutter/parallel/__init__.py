"""One model on several processes: tensor-parallel ranks, the commands between them, and how they are started.

Rank 0, the leader, has the requests, the scheduler and the sampler; the others follow: they run the same steps over their
slices of the weights and their heads of the cache. Read `leader.py` for what is told, `follower.py` for who listens,
`shared_ranks.py` and `distributed_ranks.py` for how sums are taken.
"""
