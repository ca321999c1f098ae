"""Watermarks that other systems have deployed, read and written bit for bit."""
