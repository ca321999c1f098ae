"""Adapters: the watermarks inside generation engines. Each engine is imported by its own adapter only."""
