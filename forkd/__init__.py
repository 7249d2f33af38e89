"""forkd: a multiprocess pre-fork server daemon for any socket handler.

The package's parts, lowest first: words (errors, signals, states, wire), `config`, `system`, then `master` and `serve`,
which never import each other, then `app` and `cli`.
"""

__version__ = "0.1.0"
