"""Compiled part of `dedup`: one open-addressing table of positions, linear probing, exact comparison."""

from __future__ import annotations

import numpy as np

from assay._compiled import compiled


@compiled()
def mark_first(ids, offsets, width, table, first):
    """Set first[i] where the n-gram that ends at i is new in its document; `table` is scratch space."""
    for d in range(offsets.shape[0] - 1):
        start, stop = offsets[d], offsets[d + 1]
        count = stop - start - width + 1
        if count <= 0:
            continue
        size = 16
        while size < 2 * count:
            size *= 2
        mask = np.uint64(size - 1)
        table[:size] = -1
        for i in range(start + width - 1, stop):
            h = np.uint64(0x9E3779B97F4A7C15)
            for k in range(width):
                h = (h ^ np.uint64(ids[i - k])) * np.uint64(0xFF51AFD7ED558CCD)
                h ^= h >> np.uint64(32)
            slot = h & mask
            while True:
                other = table[slot]
                if other < 0:
                    table[slot] = i
                    first[i] = True
                    break
                same = True
                for k in range(width):
                    if ids[other - k] != ids[i - k]:
                        same = False
                        break
                if same:
                    break
                slot = (slot + np.uint64(1)) & mask
