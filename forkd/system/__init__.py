"""Thin edges to the operating system: each checks what it asked for; no policy is here.

In reading order:

* Sockets: `listeners` binds and hands over listening sockets, with `host_addresses` (all those of a host's name),
  `udp_groups` (a datagram socket for each worker), `unix_paths` (paths taken over from dead owners), `inherited`
  (sockets that the process was started with) and `socket_options`; `socket_stats` reads the kernel's tables,
  and `client_list` finds a daemon's clients there.
* Shared memory: `scoreboard` has a row for each worker and the accept times of its connections; `shared_counters` has
  counts for limits, without a lock; `handler_metrics` has what handlers count.
* Users and limits: `identity` looks them up, `privileges` drops them by `capabilities`, `rlimits` are resource limits;
  `safe_paths` are those that no other user can lead elsewhere; `tls_files` are read for those who may not.
* The process: `process` (title, signals, stacks, end), `proc` (memory, signals, network namespace; also of others),
  `cgroups` (share of the processors, out-of-memory kills), `libc` (what Python has no name for).
* Logs and messages: `logs`, `log_writer` (held up by no reader), `channel` (messages over a socket).
* Files: `pidfile` is the lock, `run_directory` where it lies, `private_directory` makes or checks that directory, and
  `working_directory` is the one to work in.
* systemd: `notify` sends notifications, `fdstore` keeps listeners in its file descriptor store.
"""
