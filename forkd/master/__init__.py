"""The master's side: one process, one thread, one loop, no code of the user's. It never imports the serving side.

In reading order:

* `master`: the loop that drives all of these.
* `state`: what they share.
* `plan`: what to do about the workers, as a pure function.
* `workers`: the pool of children, and what is asked of them.
* `spawn`: the one place that forks, reaps and signals.
* `generation`: settings, sockets and log that belong together.
* `certificates`: what those of its listeners say, and their renewal.
* `reload`: how one generation gives way to the next.
* `upgrade`: how the master's image is replaced, and what is handed over.
* `control_socket`: its clients.
* `commands`: what they may ask.
* `status`: what the master reports of itself.
* `service_manager`: what systemd is told.
* `admin`: what others outside are told: health, metrics, state.
"""
