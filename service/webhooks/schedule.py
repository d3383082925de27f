"""When a delivery is tried again: ten attempts over a little more than three days."""

MINUTE, HOUR = 60.0, 3600.0
DELAYS_S = (0.0, 5.0, 5 * MINUTE, 30 * MINUTE, 2 * HOUR, 5 * HOUR, 10 * HOUR, 14 * HOUR, 20 * HOUR, 24 * HOUR)
JITTER = 0.1  # of the delay: a server that comes back is not met by everybody at once


def next_attempt(made: int, chance: float, retry_after_s: float | None = None) -> float | None:
    """Seconds to wait after `made` attempts, 0 for a new message; None when there is no further attempt.

    chance: uniform in [0, 1). It only lengthens, so that what Retry-After asks for is kept.
    """
    if made >= len(DELAYS_S):
        return None
    return max(DELAYS_S[made], retry_after_s or 0.0) * (1 + JITTER * chance)
