"""Assembly: settings, sockets, the master and the workers are put together here.

Here alone the master's side and the serving side meet: the master is handed the function that its forked children run.

In reading order:

* `daemon`: a daemon assembled and started, in the foreground or the background, and resumed after an upgrade.
* `detach`: a process in the background that tells its starter that it serves, or why not.
* `reload_helper`: the helper process that reads the settings of a reload and binds what is new.
* `once`: single-connection mode.
* `check`: what `forkd check` tries.
"""
