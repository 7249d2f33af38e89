"""Handler forms: how each is told apart and hosted. `load` alone imports user code."""
