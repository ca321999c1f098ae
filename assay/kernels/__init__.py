"""The code whose speed matters: PRF words, de-duplication, token scoring, keyed sampling; one answer on every backend."""
