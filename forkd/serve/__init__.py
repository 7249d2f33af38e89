"""The serving side: what runs in a worker. It never imports the master's side, and the master never imports it."""
