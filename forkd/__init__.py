"""forkd: a multiprocess pre-fork server daemon for any socket handler.

The package's parts, lowest first; each imports only those above it in this list:

* `errors`, `signals`, `states`, `messages`, `compiled`: errors with their exit statuses, the signals, the two tables of
  states, every message that crosses a process, and which twin of the hot path runs.
* `config`: the settings.
* `system`: sockets, shared memory, users, logs and all else that is asked of the operating system.
* `framing`, `client`, `rdp`, `drain`, `ended`, `builtin`: what handlers and programs of users import.
* `master`: the process that starts and replaces workers. It never imports `serve`, nor `serve` it.
* `serve`: what a worker runs.
* `app`: master and workers put together.
* `cli`: the command line.
"""

#: Workers of one daemon at most; the scoreboard has rows for as many, and for as many again that drain.
MOST_WORKERS = 512

#: Seconds that are asked of poll(2), select(2), epoll(7) and socket timeouts at once, of which some take no more than
#: INT_MAX milliseconds. What waits for longer asks again.
LONGEST_WAIT = 1 << 20

#: The environment variable by which one image of the master tells the next the descriptor of its state. With `check:`
#: before the number the next image only tries whether it could go on, and tells.
RESUME = "FORKD_RESUME"

__version__ = "0.1.0"
