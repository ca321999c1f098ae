"""The code whose speed matters: PRF words, de-duplication, token scoring, keyed sampling. Every backend agrees."""
