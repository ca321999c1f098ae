"""Per-token statistics of a language model's predictions: log-probability, entropy and its kin, ranks, tilted sums."""
