"""Thin edges to the operating system, each of which checks what it asked for; no policy lives here."""
