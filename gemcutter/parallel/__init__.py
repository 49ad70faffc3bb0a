"""One model on several processes: tensor-parallel ranks, stages of a pipeline, the commands between them, and how they start.

Rank 0, the leader, has the requests, the scheduler and the sampler; the others follow: they run the same steps over their
slices of the weights and their heads of the cache, or over the layers of their stage. Read `leader.py` for what is told,
`follower.py` for who listens, `shared_ranks.py` and `distributed_ranks.py` for how sums are taken, `stages.py` and `pipe.py` for
where layers are cut and how rows pass.
"""
