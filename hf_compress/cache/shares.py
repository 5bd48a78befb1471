"""Which process builds which shard: each has about as many tokens to ask the teacher for.

Shards hold examples by falling length, so dealing them out in turn would give the first process the longest ones. What an earlier build
left is only looked at, and is dealt out apart: where one of two processes died, what is missing was all its own.
"""

from __future__ import annotations

from collections.abc import Collection

from hf_compress.cache.plan import Plan


def shares(plan: Plan, present: Collection[int], count: int) -> list[list[int]]:
    """The shards of each process, ascending.

    Args:
        plan: of the build.
        present: the numbers of the shards that are there already.
        count: how many processes there are.
    """
    tokens = [int(plan.lengths[plan.span(shard)].sum()) for shard in range(len(plan.shards))]
    given: list[list[int]] = [[] for _ in range(count)]
    for place, shard in enumerate(sorted(present)):
        given[place % count].append(shard)
    load = [0] * count
    for shard in sorted(set(range(len(plan.shards))) - set(present), key=lambda shard: (-tokens[shard], shard)):
        least = load.index(min(load))
        given[least].append(shard)
        load[least] += tokens[shard]
    return [sorted(own) for own in given]
