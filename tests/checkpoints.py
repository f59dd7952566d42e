"""What a rank does for a checkpoint, in one call."""

from rlhf_ray.ppo import checkpoint


def write_rank(folder, role, rank, ranks, state, steps_taken):
    """-> {file: SHA-256}."""
    share = checkpoint.share_of_rank(role, rank, ranks, state)
    return checkpoint.write_share(folder, role, rank, ranks, share, steps_taken)
