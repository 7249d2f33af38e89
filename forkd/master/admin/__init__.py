"""What the master tells of the daemon to those outside: by HTTP, to a load balancer, as metrics. Nothing changes here.

In reading order:

* `server`: the master's own addresses, and the clients there.
* `client`: what is sent to one client, within its bounds.
* `http`: a client that asks by HTTP.
* `agent`: a client that is HAProxy's agent check.
* `pages`: what there is by HTTP.
* `page`: the page for people.
* `history`: the last ten minutes, for that page.
* `metrics`: what is counted and measured, for machines.
* `exposition`: the same in Prometheus's text.
* `statsd`: the same in statsd's datagrams.
* `loading`: imports what only some of these need.
"""
